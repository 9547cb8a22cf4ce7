"""Profile of training steps, with hints on the configuration.

The steps are those of `Trainer`, with its loader and its check for non-finite numbers. Files are
written into a temporary folder only.
"""

from __future__ import annotations

import itertools
import math
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils.events import EventStorage

from ..engine.step import unwrap
from ..engine.trainer import Trainer
from .profiling import BACKWARD, DATA, OPTIMIZER, OTHER, PhaseTimer, device_busy_ms, host_waits

# Shares of a step (and a count) above which a hint is given.
DATA_SHARE = 0.15
MATCHER_SHARE = 0.10
OPTIMIZER_SHARE = 0.20
IDLE_SHARE = 0.30  # of the forward pass
HOST_WAITS = 16  # a step; a detector of static shapes needs about ten

THRESHOLDS = (
    f"a hint is given when the wait for data takes more than {DATA_SHARE:.0%} of a step, matching "
    f"more than {MATCHER_SHARE:.0%}, the optimizer more than {OPTIMIZER_SHARE:.0%}, when the host "
    f"waits for the device more than {HOST_WAITS} times, when a GPU is idle for more than "
    f"{IDLE_SHARE:.0%} of the forward pass, and when there are more loader processes than cores"
)

COMPONENTS = {
    "backbone": "backbone",
    "neck": "neck",
    "proposal_generator": "proposals",
    "roi_heads": "heads",
}
BATCHES = 3  # prepared in the foreground to measure the time of one

Sample = dict[str, Any]


@dataclass(frozen=True)
class StepProfile:
    """Measurements of a training step.

    Attributes:
        phase_ms: phase -> milliseconds, mean of the steps, see `PhaseTimer`; "data" is the wait for
            the loader.
        images: number of images in a step.
        host_waits: operation -> number of host waits in a step, see `profiling.host_waits`.
        batch_ms: time to prepare one batch in the foreground; None for images that were not loaded.
        idle_share: share of the forward pass without the matcher in which the GPU was idle; None
            without a GPU.
        cores: number of CPU cores that this process may use.
    """

    phase_ms: dict[str, float]
    images: int
    host_waits: dict[str, int]
    batch_ms: float | None
    idle_share: float | None
    cores: int

    @property
    def total_ms(self) -> float:
        """Duration of a step in milliseconds."""
        return sum(self.phase_ms.values())

    @property
    def images_per_second(self) -> float:
        """Throughput of this process."""
        return 1000 * self.images / self.total_ms

    def share(self, phase: str) -> float:
        """Share of a phase in the step, 0 to 1."""
        return self.phase_ms.get(phase, 0.0) / self.total_ms

    def workers_needed(self) -> int:
        """Number of loader processes that keep up with the steps, each with its own core."""
        return math.ceil((self.batch_ms or 0.0) / (self.total_ms - self.phase_ms.get(DATA, 0.0)))


def profile_steps(
    cfg: CfgNode, *, steps: int, warmup: int, batches: Iterable[list[Sample]] | None = None
) -> StepProfile:
    """Trains for a few steps and measures them.

    Args:
        cfg: the configuration of the run. DATASETS.TRAIN is read unless `batches` are given.
        steps: number of timed steps, at least 1.
        warmup: number of steps before; at least as many as batches that the loader's processes have
            prepared in advance.
        batches: train on these repeatedly instead of the data set.

    Raises:
        ValueError: a configuration that cannot work; the message names the key.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.DATASETS.TEST = ()
    cfg.SOLVER.MEMORY_CHECK = "never"
    cfg.SOLVER.EARLY_STOP_PATIENCE = 0
    dicts = None
    if batches is not None:
        batches = list(batches)
        cfg.DATASETS.TRAIN, cfg.DATALOADER.NUM_WORKERS = (), 0
        dicts = [{}] * sum(map(len, batches))
    with tempfile.TemporaryDirectory(prefix="profile_") as folder:
        cfg.OUTPUT_DIR = folder
        trainer = _ProfiledTrainer(cfg, dataset_dicts=dicts)
        trainer.data_loader = (
            trainer.loader(cfg.DATALOADER.NUM_WORKERS)
            if batches is None
            else itertools.cycle(batches)
        )
        # Each process of the loader is two batches ahead when the first step begins.
        phases = trainer.time_steps(steps, max(warmup, 2 * cfg.DATALOADER.NUM_WORKERS))
        return StepProfile(
            phase_ms=phases,
            images=len(trainer.batch),
            host_waits=trainer.count_host_waits(),
            batch_ms=trainer.time_of_a_batch() if batches is None else None,
            idle_share=trainer.idle_share(),
            cores=usable_cores(),
        )


class _ProfiledTrainer(Trainer):
    """A trainer that times its steps, without evaluations, checkpoints and logs."""

    batch: list[Sample]  # of the latest step

    def build_hooks(self) -> list[HookBase | None]:
        return []

    def loader(self, num_workers: int) -> Iterable[list[Sample]]:
        """Builds the training loader with another number of processes."""
        cfg = self.cfg.clone()
        cfg.defrost()
        cfg.DATALOADER.NUM_WORKERS = num_workers
        return self.build_train_loader(cfg, self.dataset_dicts, seed=self.seed)

    def time_steps(self, steps: int, warmup: int) -> dict[str, float]:
        """Returns phase -> milliseconds, mean of `steps` steps after `warmup` others."""
        step = self._trainer
        self.timer = PhaseTimer(unwrap(self.model), self.optimizer)
        step.clip = self.timer.as_optimizer(step.clip)
        step.guard.examine = self.timer.as_optimizer(step.guard.examine)
        with EventStorage() as self.storage, self.timer:
            self.before_train()
            self._batches = self._timed(self._batches)
            try:
                self._run(warmup)
                # In one measurement, so that the host may run ahead of the device as in training.
                spent = self.timer.measure(lambda: self._run(steps))
            finally:
                self._batches = None  # stops the loader's processes
        del spent["total"]
        return {phase: ms / steps for phase, ms in spent.items()}

    def _run(self, steps: int) -> None:
        for _ in range(steps):
            self.before_step()
            self.run_step()
            self.timer.turn_to(OTHER)
            self.iter += 1

    def _timed(self, batches: Iterator[list[Sample]]) -> Iterator[list[Sample]]:
        while True:
            self.timer.turn_to(DATA)
            self.batch = next(batches)
            self.timer.turn_to(OTHER)
            yield self.batch

    def count_host_waits(self) -> dict[str, int]:
        """Counts the host waits of one more step on the latest batch."""
        return host_waits(lambda: self._trainer(self.batch, self.iter))

    def time_of_a_batch(self) -> float:
        """Milliseconds to prepare a batch in this process."""
        batches = iter(self.loader(0))
        next(batches)  # opens files
        start = time.perf_counter()
        for _ in range(BATCHES):
            next(batches)
        return 1000 * (time.perf_counter() - start) / BATCHES

    def idle_share(self) -> float | None:
        """Share of the forward pass without the matcher in which the GPU is idle."""
        step = self._trainer
        if step.device.type != "cuda":
            return None

        def forward() -> None:
            with torch.autocast("cuda", step.amp_dtype, enabled=step.amp_dtype is not None):
                self.model(self.batch)

        with self.timer:
            spent = min((self.timer.measure(forward) for _ in range(3)), key=lambda t: t["total"])
        busy = device_busy_ms(forward)
        if busy == 0:
            return None  # the profiler has no access to the device
        return max(0.0, 1 - busy / (spent["total"] - spent.get("matcher", 0.0)))


def usable_cores() -> int:
    """Number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def hints(profile: StepProfile, cfg: CfgNode) -> list[str]:
    """Returns a sentence for each value above its threshold, with the keys to change."""
    sentences = []
    if profile.share(DATA) > DATA_SHARE:
        sentences.append(_loader_hint(profile, cfg))
    workers = cfg.DATALOADER.NUM_WORKERS
    if profile.batch_ms is not None and workers > profile.cores:
        sentences.append(
            f"too many loader processes: DATALOADER.NUM_WORKERS {workers} on {profile.cores} "
            f"core(s); about {max(1, min(profile.workers_needed(), profile.cores))} are enough"
        )
    if profile.share("matcher") > MATCHER_SHARE:
        sentences.append(
            f"bound by matching ({profile.share('matcher'):.0%}): " + _matcher_advice(cfg)
        )
    if profile.share(OPTIMIZER) > OPTIMIZER_SHARE:
        sentences.append(
            f"the optimizer takes {profile.share(OPTIMIZER):.0%}: more images an update, by "
            f"SOLVER.IMS_PER_BATCH (now {cfg.SOLVER.IMS_PER_BATCH}) or, where memory is short, "
            f"SOLVER.ACCUMULATE_STEPS (now {cfg.SOLVER.ACCUMULATE_STEPS})"
        )
    waits = sum(profile.host_waits.values())
    if waits > HOST_WAITS:
        most = sorted(profile.host_waits.items(), key=lambda item: -item[1])[:3]
        sentences.append(
            f"the host waits for the device {waits} times a step ({_counts(dict(most))} most often)"
            + _waits_advice(cfg)
        )
    if profile.idle_share is not None and profile.idle_share > IDLE_SHARE:
        compiled = "" if cfg.MODEL.COMPILE else "MODEL.COMPILE True, or "
        sentences.append(
            f"the GPU is idle for {profile.idle_share:.0%} of the forward pass, waiting for "
            f"kernels to be launched: {compiled}more images at once (SOLVER.IMS_PER_BATCH, now "
            f"{cfg.SOLVER.IMS_PER_BATCH})"
        )
    return sentences


def _loader_hint(profile: StepProfile, cfg: CfgNode) -> str:
    workers, needed, cores = cfg.DATALOADER.NUM_WORKERS, profile.workers_needed(), profile.cores
    start = (
        f"bound by the loader ({profile.share(DATA):.0%}): a batch takes {profile.batch_ms:.0f} ms "
        f"to prepare, a step without waiting {profile.total_ms - profile.phase_ms[DATA]:.0f} ms; "
    )
    cheaper = (
        "reduce the cost of an image: a faster disk, files no larger than INPUT.MIN_SIZE_TRAIN "
        f"{tuple(cfg.INPUT.MIN_SIZE_TRAIN)} needs, or a smaller such size"
    )
    if needed > cores:
        return f"{start}{needed} processes are needed, but there are {cores} core(s): {cheaper}"
    if workers >= needed:
        return (
            f"{start}DATALOADER.NUM_WORKERS {workers} would be enough with a core for each; "
            f"leave cores to them (torch uses {torch.get_num_threads()} threads of {cores} cores), "
            f"or {cheaper}"
        )
    return f"{start}set DATALOADER.NUM_WORKERS to about {needed} (now {workers})"


def _matcher_advice(cfg: CfgNode) -> str:
    queries = (
        "fewer queries (MODEL.PROPOSAL_GENERATOR.NUM_QUERIES, now "
        f"{cfg.MODEL.PROPOSAL_GENERATOR.NUM_QUERIES})"
    )
    if cfg.MODEL.MATCHER.NAME != "OptimalTransportMatcher":
        return f"{queries} or stages (MODEL.DECODER.NUM_STAGES), each of which is matched"
    ot, cuda = cfg.MODEL.MATCHER.OT, cfg.MODEL.DEVICE.startswith("cuda")
    if ot.SOLVER == "exact" and cuda:
        return "MODEL.MATCHER.OT.SOLVER sinkhorn stays on the GPU (now exact), or " + queries
    if ot.SOLVER == "sinkhorn" and not cuda:
        return "MODEL.MATCHER.OT.SOLVER exact is faster on a CPU (now sinkhorn), or " + queries
    if cuda:
        return f"a lower MODEL.MATCHER.OT.ITERS (now {ot.ITERS}), or {queries}"
    return queries


def _waits_advice(cfg: CfgNode) -> str:
    if cfg.MODEL.PROPOSAL_GENERATOR.NAME == "AdaptiveSparseAnchors" and not (
        cfg.MODEL.ASAG.PATCH_CAPACITY and cfg.MODEL.ASAG.ANCHOR_CAPACITY
    ):
        return "; MODEL.ASAG.PATCH_CAPACITY and MODEL.ASAG.ANCHOR_CAPACITY fix the shapes"
    return ""


def render(profile: StepProfile, cfg: CfgNode) -> str:
    """Formats the profile and the hints as a table for a terminal."""
    forward = [
        (f"  {name}", profile.phase_ms[p])
        for p, name in COMPONENTS.items()
        if p in profile.phase_ms
    ]
    rows = [
        ("data (waiting for it)", profile.phase_ms.get(DATA, 0.0)),
        ("forward", sum(ms for _, ms in forward)),
        *forward,
        ("matching", profile.phase_ms.get("matcher", 0.0)),
        ("criterion", profile.phase_ms.get("criterion", 0.0)),
        ("backward", profile.phase_ms.get(BACKWARD, 0.0)),
        ("optimizer and clipping", profile.phase_ms.get(OPTIMIZER, 0.0)),
        ("other", profile.phase_ms.get(OTHER, 0.0)),
        ("step", profile.total_ms),
    ]
    lines = [f"{name:<24}{ms:>12.2f} ms{ms / profile.total_ms:>9.1%}" for name, ms in rows]
    waits = f"{sum(profile.host_waits.values())} a step ({_counts(profile.host_waits) or 'none'})"
    if not cfg.MODEL.DEVICE.startswith("cuda"):
        waits += "; counted on a CPU, for operations that make the host wait for a GPU"
    lines += [f"{'images a second':<24}{profile.images_per_second:>12.2f}", f"host waits: {waits}"]
    advice = hints(profile, cfg)
    lines += [f"hint: {text}" for text in advice] or ["no hints"]
    return "\n".join(lines)


def _counts(host_waits: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in host_waits.items())
