#!/usr/bin/env python3
"""Times methods of pooling boxes from a feature pyramid side by side.

    python tools/benchmarks/benchmark_roi_align.py --images 2 --queries 100
    python tools/benchmarks/benchmark_roi_align.py --device cuda --images 16 --json out.json

"gather" and "kernel" are the two methods of `PyramidRoIAlign`, "loop" is Detectron2's `ROIPooler`,
which selects the boxes of each level in a loop. Each arm pools for all stages of a detector, from
boxes that move from stage to stage, and computes gradients; the arms take turns, so that other load
on the machine affects all alike. Times are of the pooling alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from asag.modeling.layers.roi_align import PyramidRoIAlign

import torch
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from measuring import device_name, image_size, positive
from torch import Tensor

STRIDES = (4, 8, 16, 32)
PHASES = ("forward", "backward", "total")

Pool = Callable[[list[Tensor], list[Tensor]], list[Tensor]]
"""Maps of the levels, boxes (B, N, 4) of the stages -> pooled (B * N, C, P, P) of the stages."""


def arms(resolution: int, sampling_ratio: int) -> dict[str, Pool]:
    """Returns the methods under test by name."""
    ours = PyramidRoIAlign(strides=STRIDES, output_size=resolution, sampling_ratio=sampling_ratio)
    theirs = ROIPooler(
        output_size=resolution,
        scales=[1 / stride for stride in STRIDES],
        sampling_ratio=sampling_ratio,
        pooler_type="ROIAlignV2",
    )

    def pool(method: str, maps: list[Tensor], stages: list[Tensor]) -> list[Tensor]:
        prepared = ours.prepare(maps, method)
        return [ours(prepared, boxes) for boxes in stages]

    def loop(maps: list[Tensor], stages: list[Tensor]) -> list[Tensor]:
        return [theirs(maps, [Boxes(x) for x in boxes]) for boxes in stages]

    return {
        "gather": lambda maps, stages: pool("gather", maps, stages),
        "kernel": lambda maps, stages: pool("kernel", maps, stages),
        "loop": loop,
    }


def make_scene(args: argparse.Namespace) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Makes random maps, boxes of every stage, and the gradient of a pooled tensor."""
    rng = torch.Generator().manual_seed(args.seed)
    height, width = args.size
    maps = [
        torch.randn(args.images, args.channels, -(-height // s), -(-width // s), generator=rng)
        for s in STRIDES
    ]
    whwh = torch.tensor([width, height, width, height])
    center = torch.rand(args.images, args.queries, 2, generator=rng)
    # From 1/30 of a side to all of it on a logarithmic scale, so that every level is read.
    half = 0.5 * 30 ** -torch.rand(args.images, args.queries, 2, generator=rng)
    boxes = torch.cat((center - half, center + half), dim=-1)
    noise = 0.02 * torch.randn(args.stages, *boxes.shape, generator=rng)
    stages = ((boxes + noise * half.repeat(1, 1, 2)).clamp(0, 1) * whwh).unbind()
    shape = (args.images * args.queries, args.channels, args.resolution, args.resolution)
    gradient = torch.randn(shape, generator=rng)
    device = torch.device(args.device)
    return [x.to(device) for x in maps], [x.to(device) for x in stages], gradient.to(device)


def measure_once(
    pool: Pool, maps: list[Tensor], stages: list[Tensor], gradient: Tensor
) -> tuple[dict[str, float], list[Tensor]]:
    """Returns the milliseconds of forward and backward, and the gradients of the maps."""
    leaves = [x.detach().requires_grad_() for x in maps]
    marks = [_now(gradient.device)]
    pooled = pool(leaves, stages)
    marks.append(_now(gradient.device))
    torch.autograd.backward(pooled, [gradient] * len(pooled))
    marks.append(_now(gradient.device))
    forward, backward = (1000 * (b - a) for a, b in itertools.pairwise(marks))
    times = {"forward": forward, "backward": backward, "total": forward + backward}
    return times, [x.grad for x in leaves]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Runs all arms in turn, `args.rounds` times after one untimed round."""
    maps, stages, gradient = make_scene(args)
    pools = arms(args.resolution, args.sampling_ratio)
    times: dict[str, list[dict[str, float]]] = {name: [] for name in pools}
    for round_index in range(args.rounds + 1):
        for name, pool in pools.items():
            elapsed, _ = measure_once(pool, maps, stages, gradient)
            if round_index:
                times[name].append(elapsed)
    with torch.no_grad():
        expected = pools["loop"](maps, stages)
    report = {}
    for name, pool in pools.items():
        with torch.no_grad():
            answer = pool(maps, stages)
        report[name] = {
            "median_ms": {p: statistics.median([t[p] for t in times[name]]) for p in PHASES},
            "fastest_ms": {p: min(t[p] for t in times[name]) for p in PHASES},
            "largest_difference": max(
                float((a - b).abs().max()) for a, b in zip(answer, expected, strict=True)
            ),
        }
    return {
        "device": device_name(args.device),
        "torch": torch.__version__,
        "setting": vars(args),
        "arms": report,
    }


def render(result: dict[str, Any]) -> str:
    """Formats a table of medians and their ratios to the first arm."""
    setting = result["setting"]
    names = list(result["arms"])
    lines = [
        f"{result['device']}, torch {result['torch']}, {setting['images']} images of "
        f"{setting['size'][0]}x{setting['size'][1]}, {setting['queries']} boxes each, "
        f"{setting['stages']} stages, {setting['channels']} channels, {setting['rounds']} rounds",
        f"{'median ms':<24}" + "".join(f"{name:>20}" for name in names),
    ]
    for phase in PHASES:
        values = [result["arms"][name]["median_ms"][phase] for name in names]
        cells = [f"{values[0]:.1f}", *(f"{v:.1f} ({v / values[0]:.2f}x)" for v in values[1:])]
        lines.append(f"{phase:<24}" + "".join(f"{cell:>20}" for cell in cells))
    differences = [result["arms"][name]["largest_difference"] for name in names]
    lines.append(f"{'difference from loop':<24}" + "".join(f"{x:>20.1e}" for x in differences))
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--images", type=positive, default=2, help="batch size (default 2)")
    add("--size", type=image_size, default=(800, 1216), metavar="HxW", help="default 800x1216")
    add("--queries", type=positive, default=100, help="boxes of an image (default 100)")
    add("--stages", type=positive, default=6)
    add("--channels", type=positive, default=256)
    add("--resolution", type=positive, default=7, help="pooled side (default 7)")
    add("--sampling-ratio", type=positive, default=2)
    add("--rounds", type=positive, default=7, help="timed calls of every arm (default 7)")
    add("--threads", type=positive, help="CPU threads")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--json", metavar="FILE", help="write all figures there as well")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    args = parse(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    result = measure(args)
    print(render(result))
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
