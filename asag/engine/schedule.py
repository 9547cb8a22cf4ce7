"""Training schedule: converts a recipe in epochs to iterations, for any batch and data set size.

An epoch is one pass over the training images, an iteration one optimizer step of
SOLVER.IMS_PER_BATCH images (all processes and accumulated micro-batches together).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from detectron2.config import CfgNode

from ..modeling.registry import check_choice

# A learning rate per image above this multiple of the recipe's is almost always a mistake.
SUSPICIOUS_RATIO = 10.0
# Largest share of a run that warm-up may take.
MAX_WARMUP_SHARE = 0.25
SCHEDULERS = ("WarmupMultiStepLR", "WarmupCosineLR")


@dataclass(frozen=True)
class Schedule:
    """Resolved schedule of a run.

    Attributes:
        images: size of the training set.
        batch: images of one iteration.
        iterations: length of the run.
        steps: iterations at which the learning rate drops by SOLVER.GAMMA.
        base_lr: learning rate after scaling.
        warmup_iters: iterations of warm-up.
            eval_period: iterations between two evaluations; 0 is one at the end.
        notes: changes to the configured values, one sentence each.
        warnings: likely mistakes, one sentence each.
    """

    images: int
    batch: int
    iterations: int
    steps: tuple[int, ...]
    base_lr: float
    warmup_iters: int
    eval_period: int = 0
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def epochs(self) -> float:
        """Number of passes over the training set."""
        return self.iterations * self.batch / self.images

    def summary(self) -> str:
        """Formats the schedule for a terminal or log."""
        drops = ", ".join(map(str, self.steps)) or "never"
        lines = [
            f"schedule: {self.images} images, batch {self.batch}, {self.iterations} iterations "
            f"({self.epochs:.4g} epochs)",
            f"  learning rate {self.base_lr:.4g}, warm-up {self.warmup_iters} iterations, "
            f"drops at {drops}",
        ]
        lines += [f"  note: {sentence}" for sentence in self.notes]
        lines += [f"  WARNING: {sentence}" for sentence in self.warnings]
        return "\n".join(lines)


def resolve_schedule(
    cfg: CfgNode, num_images: int, *, recipe: CfgNode | None = None
) -> tuple[CfgNode, Schedule]:
    """Converts epochs to iterations and scales the learning rate; idempotent.

        SOLVER.EPOCHS and EPOCH_STEPS become MAX_ITER and STEPS. EPOCHS of 0 leaves the length to
    SOLVER.BY_DATA, within its bounds; where that is off as well, MAX_ITER and STEPS hold as they
    stand. Where TEST.EVAL_PERIOD is 0, TEST.NUM_EVALUATIONS decides about it. SOLVER.SCALE_LR
    adapts BASE_LR from REFERENCE_BATCH to IMS_PER_BATCH. The warm-up stays a number of iterations,
    because the optimizer's moment estimates need steps rather than images; it is shortened to a
    quarter of a training that is too short for it.

    Args:
        cfg: not changed.
        num_images: images of the training set.
        recipe: the configuration file without overrides, to warn if the learning rate per image is
            far above the recipe's; None compares with `cfg` before scaling.

    Returns:
        The resolved configuration (frozen if `cfg` was) and the schedule.

    Raises:
        ValueError: names the key with a wrong value and the allowed values.
    """
    if num_images < 1:
        raise ValueError(f"DATASETS.TRAIN = {tuple(cfg.DATASETS.TRAIN)}: no images to train on")
    check_solver(cfg)
    solver = cfg.SOLVER
    notes: list[str] = []

    base_lr = solver.BASE_LR * _lr_factor(solver)
    if base_lr != solver.BASE_LR:
        notes.append(
            f"SOLVER.BASE_LR {solver.BASE_LR:.4g} for batch {solver.REFERENCE_BATCH} becomes "
            f"{base_lr:.4g} for batch {solver.IMS_PER_BATCH} (SOLVER.SCALE_LR {solver.SCALE_LR})"
        )
    elif solver.IMS_PER_BATCH != solver.REFERENCE_BATCH:
        notes.append(
            f"SOLVER.BASE_LR {base_lr:.4g} is meant for batch {solver.REFERENCE_BATCH} "
            f"(SOLVER.REFERENCE_BATCH), the batch is {solver.IMS_PER_BATCH}; SOLVER.SCALE_LR "
            "linear (or sqrt) adapts it"
        )
    iterations, steps = solver.MAX_ITER, tuple(solver.STEPS)
    per_epoch = num_images / solver.IMS_PER_BATCH
    if solver.EPOCHS > 0:
        iterations = max(1, round(solver.EPOCHS * per_epoch))
        steps = tuple(round(epoch * per_epoch) for epoch in solver.EPOCH_STEPS)
    elif solver.BY_DATA.EPOCHS > 0:
        iterations, note = _length_by_data(solver.BY_DATA, per_epoch)
        notes += note
    reachable = tuple(sorted({step for step in steps if 0 < step < iterations}))
    if reachable != steps:
        notes.append(f"of the drops at {steps}, only {reachable} are within the run")
    warmup = min(solver.WARMUP_ITERS, int(MAX_WARMUP_SHARE * iterations))
    if warmup < solver.WARMUP_ITERS:
        notes.append(f"warm-up shortened from {solver.WARMUP_ITERS} to {warmup} iterations")

    schedule = Schedule(
        images=num_images,
        batch=solver.IMS_PER_BATCH,
        iterations=iterations,
        steps=reachable,
        base_lr=base_lr,
        warmup_iters=warmup,
        eval_period=_eval_period(cfg.TEST, iterations),
        notes=tuple(notes),
        warnings=_warnings(base_lr, solver, (recipe or cfg).SOLVER),
    )
    return _with_schedule(cfg, schedule), schedule


def check_solver(cfg: CfgNode) -> None:
    """Checks the keys of the schedule.

    Raises:
        ValueError: names the first key with an impossible value and the allowed values.
    """
    s = cfg.SOLVER
    check_choice("SOLVER.SCALE_LR", s.SCALE_LR, ("none", "linear", "sqrt"))
    check_choice("SOLVER.LR_SCHEDULER_NAME", s.LR_SCHEDULER_NAME, SCHEDULERS)
    for key in ("IMS_PER_BATCH", "REFERENCE_BATCH", "ACCUMULATE_STEPS"):
        if s[key] < 1:
            raise ValueError(f"SOLVER.{key} is {s[key]}; it must be at least 1")
    if not (s.BASE_LR > 0 and math.isfinite(s.BASE_LR)):
        raise ValueError(f"SOLVER.BASE_LR is {s.BASE_LR}; it must be a positive number")
    for key in ("EPOCHS", "WARMUP_ITERS", "WEIGHT_DECAY"):
        if not (s[key] >= 0 and math.isfinite(s[key])):
            raise ValueError(f"SOLVER.{key} is {s[key]}; it must be zero or a positive number")
    low, high = s.BY_DATA.MIN_ITERS, s.BY_DATA.MAX_ITERS
    if high and low > high:
        raise ValueError(
            f"SOLVER.BY_DATA.MIN_ITERS is {low}; it must be at most SOLVER.BY_DATA.MAX_ITERS, "
            f"{high} (0 is no limit)"
        )
    if s.EPOCHS == 0 and s.MAX_ITER < 1:
        raise ValueError(f"SOLVER.MAX_ITER is {s.MAX_ITER}; it must be at least 1")
    epoch_steps = tuple(s.EPOCH_STEPS)
    if s.EPOCHS > 0 and not _rises(epoch_steps, s.EPOCHS):
        raise ValueError(
            f"SOLVER.EPOCH_STEPS is {epoch_steps}; it must rise and stay between 0 and "
            f"SOLVER.EPOCHS = {s.EPOCHS}. To train shorter, shrink both."
        )
    if s.EPOCHS == 0 and not _rises(tuple(s.STEPS), math.inf):
        raise ValueError(f"SOLVER.STEPS is {tuple(s.STEPS)}; it must rise and be above 0")


def _rises(steps: tuple[float, ...], end: float) -> bool:
    numbers = (0, *steps)
    rising = all(a < b for a, b in itertools.pairwise(numbers))
    return rising and numbers[-1] <= end


def _lr_factor(solver: CfgNode) -> float:
    ratio = solver.IMS_PER_BATCH / solver.REFERENCE_BATCH
    return {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[solver.SCALE_LR]


def _length_by_data(by_data: CfgNode, per_epoch: float) -> tuple[int, list[str]]:
    """Iterations, and a note where a bound decided."""
    wanted = max(1, round(by_data.EPOCHS * per_epoch))
    iterations = max(wanted, by_data.MIN_ITERS)
    if by_data.MAX_ITERS:
        iterations = min(iterations, by_data.MAX_ITERS)
    if iterations == wanted:
        return iterations, []
    bound = "MIN_ITERS" if iterations > wanted else "MAX_ITERS"
    return iterations, [
        f"{by_data.EPOCHS:g} epochs are {wanted} iterations, SOLVER.BY_DATA.{bound} makes it "
        f"{iterations}; SOLVER.EPOCHS N trains N epochs whatever the size of the data"
    ]


def _eval_period(test: CfgNode, iterations: int) -> int:
    if test.EVAL_PERIOD or not test.NUM_EVALUATIONS:
        return test.EVAL_PERIOD
    return math.ceil(iterations / test.NUM_EVALUATIONS)


def _warnings(base_lr: float, solver: CfgNode, recipe: CfgNode) -> tuple[str, ...]:
    """Warns if the learning rate per image is far above the recipe's."""
    if solver.OPTIMIZER != recipe.OPTIMIZER:
        return ()  # learning rates of different optimizers are not comparable
    ratio = (base_lr / solver.IMS_PER_BATCH) / (recipe.BASE_LR / recipe.REFERENCE_BATCH)
    if ratio <= SUSPICIOUS_RATIO:
        return ()
    return (
        f"the learning rate {base_lr:.4g} for a batch of {solver.IMS_PER_BATCH} is {ratio:.3g} "
        f"times the recipe's per image ({recipe.BASE_LR:.4g} for {recipe.REFERENCE_BATCH}); "
        "training may diverge. Lower SOLVER.BASE_LR, or set SOLVER.SCALE_LR to 'linear' or 'sqrt'.",
    )


def _with_schedule(cfg: CfgNode, schedule: Schedule) -> CfgNode:
    resolved = cfg.clone()
    resolved.defrost()
    solver = resolved.SOLVER
    solver.BASE_LR = schedule.base_lr
    solver.MAX_ITER = schedule.iterations
    solver.STEPS = schedule.steps
    solver.WARMUP_ITERS = schedule.warmup_iters
    solver.EPOCHS = 0.0
    solver.EPOCH_STEPS = ()
    solver.BY_DATA.EPOCHS = 0.0
    resolved.TEST.EVAL_PERIOD = schedule.eval_period
    resolved.TEST.NUM_EVALUATIONS = 0
    solver.REFERENCE_BATCH = schedule.batch
    solver.SCALE_LR = "none"
    if cfg.is_frozen():
        resolved.freeze()
    return resolved
