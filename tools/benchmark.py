#!/usr/bin/env python3
"""Measures time and memory of detectors by phase, several of them side by side.

    python tools/benchmark.py configs/SparseRCNN/sparse_rcnn_tiny.yaml --size 128x160
    python tools/benchmark.py A.yaml B.yaml --device cuda --batch 16 --amp bfloat16 --json out.json
    python tools/benchmark.py A.yaml A.yaml@MODEL.CHANNELS_LAST=True   # one option against another
    python tools/benchmark.py A.yaml A.yaml@fold-norms --mode inference
    python tools/benchmark.py --profile A.yaml    # where a real training step spends its time

The configurations (arms) take turns (A B A B ...), so that warm-up and other load affect all alike.
Images are random, weights are as initialized, and training updates them by the configured recipe.
"Other" is the work outside of the components: normalizing and padding images, postprocessing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from asag import load_config
from asag.config.loading import find_config
from asag.data import SampleError
from asag.diagnostics.profiling import (
    PhaseTimer,
    host_waits,
    resident_bytes,
    saved_bytes,
)
from asag.diagnostics.step_profile import (
    THRESHOLDS,
    hints,
    profile_steps,
)
from asag.diagnostics.step_profile import render as render_profile
from asag.engine import NonFiniteLossError
from asag.engine.memory import NotEnoughMemoryError
from asag.engine.optimizer import build_clipper, build_optimizer
from asag.engine.step import AMP_DTYPES, TrainStep
from asag.inference.deploy import fold_batch_norms

import torch
from benchmarks.measuring import device_name, image_size, positive
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

MODES = ("inference", "training")
STEP_ERRORS = (NonFiniteLossError, NotEnoughMemoryError, SampleError)  # of --profile
FOLD_NORMS = "fold-norms"


class Arm:
    """A configuration under test with its model, optimizer, batch and times."""

    def __init__(self, spec: str, args: argparse.Namespace) -> None:
        """
        Args:
            spec: path of a yaml file, then any number of "@KEY=VALUE", and "@fold-norms".
            args: of the command line.
        """
        cfg = arm_config(spec, args)
        torch.manual_seed(args.seed)  # equal models start equal
        self.name = spec
        self.amp = AMP_DTYPES.get(args.amp)
        self.model = build_model(cfg)
        if folds_norms(spec, args):
            fold_batch_norms(self.model.eval().backbone)
        self.optimizer = build_optimizer(cfg, self.model, clip_in_step=False)
        self.timer = PhaseTimer(self.model, self.optimizer)
        self.train_step = TrainStep(
            self.model,
            self.optimizer,
            amp_dtype=self.amp,
            clip=self.timer.as_optimizer(build_clipper(cfg)),
        )
        self.batch = random_batch(
            args.batch, args.size, args.objects, cfg.MODEL.ROI_HEADS.NUM_CLASSES, args.device
        )
        self.times: dict[str, list[dict[str, float]]] = {mode: [] for mode in MODES}
        self.peak: dict[str, int] = {}

    def run(self, mode: str) -> None:
        """Runs one forward pass in evaluation mode, or one training step."""
        if mode == "training":
            self.model.train()
            self.train_step(self.batch)
            return
        self.model.eval()
        device = self.model.device.type
        with torch.no_grad(), torch.autocast(device, self.amp, enabled=self.amp is not None):
            self.model(self.batch)

    def measure(self, mode: str) -> None:
        """Times one run and keeps the highest peak of device memory."""
        cuda = self.model.device.type == "cuda"
        if cuda:
            before = torch.cuda.memory_allocated()
            own = resident_bytes(self.model, self.optimizer)
            torch.cuda.reset_peak_memory_stats()
        with self.timer:
            self.times[mode].append(self.timer.measure(lambda: self.run(mode)))
        if cuda:  # without the memory that the other arms hold
            peak = torch.cuda.max_memory_allocated() - before + own
            self.peak[mode] = max(peak, self.peak.get(mode, 0))

    def report(self, modes: Sequence[str]) -> dict[str, Any]:
        """Returns all figures as plain numbers: milliseconds, bytes, counts."""
        result: dict[str, Any] = {
            "config": self.name,
            "parameters": sum(p.numel() for p in self.model.parameters()),
        }
        for mode in modes:
            times = self.times[mode]
            median = statistics.median([t["total"] for t in times])
            result[mode] = {
                "median_ms": _of_phases(times, statistics.median),
                "p95_ms": _of_phases(times, percentile_95),
                "images_per_second": 1000 * len(self.batch) / median,
                "host_waits": host_waits(lambda mode=mode: self.run(mode)),
                "peak_bytes": self.peak.get(mode),
            }
        if "training" in modes:
            result["saved_bytes"] = saved_bytes(self.model, lambda: self.run("training"))
        result["resident_bytes"] = resident_bytes(self.model, self.optimizer)
        return result


def folds_norms(spec: str, args: argparse.Namespace) -> bool:
    """Returns True if the norms of this arm are folded into its convolutions."""
    return args.fold_norms or FOLD_NORMS in spec.split("@")


def arm_config(spec: str, args: argparse.Namespace) -> CfgNode:
    """Loads the configuration of "FILE@KEY=VALUE..." with the options of the command line."""
    path, *own = spec.split("@")
    options = [word for pair in own if pair != FOLD_NORMS for word in pair.split("=", 1)]
    flags = {"MODEL.CHANNELS_LAST": args.channels_last, "MODEL.COMPILE": args.compile}
    common = [word for key, on in flags.items() if on for word in (key, "True")]
    options = [*common, *args.opts, *options, "MODEL.DEVICE", args.device]
    return load_config(str(find_config(path)), options)


def random_batch(
    batch: int, size: tuple[int, int], objects: int, classes: int, device: str
) -> list[dict[str, Any]]:
    """Makes random images (on the device) with `objects` random boxes each (on the host)."""
    height, width = size
    whwh = torch.tensor([width, height, width, height])
    samples = []
    for i in range(batch):
        center, half = torch.rand(objects, 2), 0.05 + 0.2 * torch.rand(objects, 2)
        instances = Instances(size)
        instances.gt_boxes = Boxes(torch.cat((center - half, center + half), dim=1) * whwh)
        instances.gt_boxes.clip(size)
        instances.gt_classes = torch.randint(classes, (objects,))
        image = torch.randint(256, (3, height, width), dtype=torch.uint8).to(device)
        samples.append({"image": image, "instances": instances, "file_name": f"random image {i}"})
    return samples


def measure_arms(
    arms: Sequence[Arm], modes: Sequence[str], warmup: int, iterations: int
) -> list[dict[str, Any]]:
    """Runs every arm in turn, `iterations` times after `warmup` untimed ones, mode after mode."""
    for mode in modes:
        for arm in arms:
            for _ in range(warmup):
                arm.run(mode)
        for _ in range(iterations):
            for arm in arms:
                arm.measure(mode)
    return [arm.report(modes) for arm in arms]


def profile(spec: str, args: argparse.Namespace) -> dict[str, Any]:
    """Profiles training steps of one configuration and prints the result.

    Returns:
        All figures as plain numbers, and the hints.

    Raises:
        ValueError: the configuration is not valid; the message names the key.
    """
    cfg = arm_config(spec, args)
    cfg.defrost()
    if args.batch:
        cfg.SOLVER.IMS_PER_BATCH = args.batch
    if args.amp:
        cfg.SOLVER.AMP.ENABLED = args.amp in AMP_DTYPES
        cfg.SOLVER.AMP.DTYPE = args.amp if args.amp in AMP_DTYPES else cfg.SOLVER.AMP.DTYPE
    batches = None
    if args.size:
        classes, batch = cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.SOLVER.IMS_PER_BATCH
        batches = [random_batch(batch, args.size, args.objects, classes, args.device)]
    found = profile_steps(cfg, steps=args.iterations, warmup=args.warmup, batches=batches)
    workers = f"DATALOADER.NUM_WORKERS {cfg.DATALOADER.NUM_WORKERS}"
    source = "random" if batches else f"of {', '.join(cfg.DATASETS.TRAIN)}; {workers}"
    print(
        f"{spec}: {args.iterations} training steps of {found.images} images ({source}), "
        f"{found.cores} core(s)"
    )
    print(render_profile(found, cfg) + "\n")
    return {
        "config": spec,
        **asdict(found),
        "total_ms": found.total_ms,
        "shares": {phase: found.share(phase) for phase in found.phase_ms},
        "images_per_second": found.images_per_second,
        "hints": hints(found, cfg),
    }


def percentile_95(values: Sequence[float]) -> float:
    """Returns the smallest value that at least 95 % of all values do not exceed."""
    return sorted(values)[-(-95 * len(values) // 100) - 1]


def _of_phases(
    times: list[dict[str, float]], statistic: Callable[[list[float]], float]
) -> dict[str, float]:
    return {phase: statistic([t[phase] for t in times]) for phase in times[0]}


def render(settings: dict[str, Any], reports: list[dict[str, Any]]) -> str:
    """Formats tables with a column for each arm and its ratio to the first arm."""
    names = [r["config"] for r in reports]
    lines = [f"{chr(65 + i)}: {name}" for i, name in enumerate(names)]
    lines.append(", ".join(f"{key} {value}" for key, value in settings.items()))
    for mode in (m for m in MODES if m in reports[0]):
        columns = [r[mode] for r in reports]
        heads = "".join(f"{chr(65 + i):>20}" for i in range(len(names)))
        lines += ["", f"{mode + ' (ms)':<22}{heads}"]
        phases = dict.fromkeys(phase for c in columns for phase in c["median_ms"])
        for phase in (*(p for p in phases if p != "total"), "total"):
            lines.append(_row(phase, [c["median_ms"].get(phase) for c in columns]))
        lines.append(_row("total, 95th percentile", [c["p95_ms"]["total"] for c in columns]))
        lines.append(_row("images a second", [c["images_per_second"] for c in columns]))
        lines.append(_row("host waits", [sum(c["host_waits"].values()) for c in columns], "d"))
        if columns[0]["peak_bytes"] is not None:
            lines.append(_row("peak memory (MB)", [c["peak_bytes"] / 1e6 for c in columns]))
    lines += ["", _row("resident memory (MB)", [r["resident_bytes"] / 1e6 for r in reports])]
    if "saved_bytes" in reports[0]:
        lines.append(_row("saved activations (MB)", [r["saved_bytes"] / 1e6 for r in reports]))
    return "\n".join(lines)


def _row(name: str, values: Sequence[float | None], style: str = ".2f") -> str:
    cells = []
    for i, value in enumerate(values):
        if value is None:
            cells.append("-")
        elif i and values[0]:
            cells.append(f"{value:{style}} ({value / values[0]:.2f}x)")
        else:
            cells.append(f"{value:{style}}")
    return f"{name:<22}" + "".join(f"{cell:>20}" for cell in cells)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog=f"--profile: {THRESHOLDS}."
    )
    add = parser.add_argument
    add("configs", nargs="+", metavar="CONFIG[@KEY=VALUE...]", help="arms of the comparison")
    add("--mode", choices=(*MODES, "both"), default="both")
    add(
        "--profile",
        action="store_true",
        help="train for --iterations steps as configured, data loader included (random images only "
        "with --size), and print the share of each phase and the keys to change",
    )
    add("--batch", type=positive, help="images (default 2; --profile: SOLVER.IMS_PER_BATCH)")
    add("--size", type=image_size, metavar="HxW", help="default 800x1216; --profile: the data's")
    add("--objects", type=int, default=7, help="objects of an image (default 7)")
    add("--iterations", type=positive, default=20, help="timed runs of an arm (default 20)")
    add("--warmup", type=positive, default=3, help="runs before (default 3)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    add("--threads", type=positive, help="CPU threads")
    add(
        "--amp",
        choices=("float32", *AMP_DTYPES),
        help="number format (default float32; --profile: SOLVER.AMP)",
    )
    add("--tf32", action="store_true", help="allow TF32 products (CUDA)")
    add("--channels-last", action="store_true", help="MODEL.CHANNELS_LAST for all arms")
    add(
        "--fold-norms",
        action="store_true",
        help="into convolutions, of all arms, for --mode inference",
    )
    add("--compile", action="store_true", help="MODEL.COMPILE for all arms")
    add("--seed", type=int, default=0)
    add("--json", metavar="FILE", help="write all figures there as well")
    add("--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE for all arms, last")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    args = parse(arguments)
    modes = MODES if args.mode == "both" else (args.mode,)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.tf32
    try:
        if args.json and not Path(args.json).parent.is_dir():
            raise ValueError(f"--json {args.json}: there is no such folder")
        if args.device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError("there is no CUDA device here; use --device cpu")
        if args.profile and (args.fold_norms or args.mode != "both"):
            raise ValueError("--profile trains; leave out --mode and --fold-norms")
        folded = any(folds_norms(spec, args) for spec in args.configs)
        if folded and args.mode != "inference":
            raise ValueError("fold-norms is for inference; add --mode inference")
        if args.profile:
            profiles = [profile(spec, args) for spec in args.configs]
            write_json(args, {"device": device_name(args.device), "profiles": profiles})
            return 0
        args.batch, args.size = args.batch or 2, args.size or (800, 1216)
        args.amp = args.amp or "float32"
        arms = [Arm(spec, args) for spec in args.configs]
    except (OSError, KeyError, ValueError, *STEP_ERRORS) as error:
        print(f"benchmark: {error.args[0] if len(error.args) == 1 else error}", file=sys.stderr)
        return 2
    settings = {
        "device": device_name(args.device),
        "torch": torch.__version__,
        "batch": args.batch,
        "size": "x".join(map(str, args.size)),
        "objects": args.objects,
        "format": args.amp + (" (TF32)" if args.tf32 else ""),
        "rounds": args.iterations,
    }
    reports = measure_arms(arms, modes, args.warmup, args.iterations)
    print(render(settings, reports))
    write_json(args, {"settings": settings, "arms": reports})
    return 0


def write_json(args: argparse.Namespace, figures: dict[str, Any]) -> None:
    """Writes the figures to the file of --json, if it was given."""
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    sys.exit(main())
