"""Scalars of recent steps, kept on the device until the log wants them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.utils import comm
from torch import Tensor

# Names of scalars that must be finite: the losses. The gradient norm of a step that overflowed in
# float16 is infinite by design, and a matcher's statistic may be a mean over nothing.
LOSS = "loss"
MAX_LISTED_FILES = 32


class NonFiniteLossError(FloatingPointError):
    """The training diverged; the message names iteration, terms, learning rate and images."""


@dataclass(frozen=True)
class StepRecord:
    """Scalars of one step on the host, averaged over the processes."""

    iteration: int
    scalars: dict[str, float]


@dataclass(frozen=True)
class _Pending:
    iteration: int
    names: tuple[str, ...]
    values: Tensor
    files: tuple[str, ...]
    lr: float


class LossLog:
    """Collects the scalars of each step and hands them over in one device-to-host copy.

    All processes must add and collect at the same iterations.
    """

    def __init__(self) -> None:
        self._pending: list[_Pending] = []

    def add(
        self, iteration: int, scalars: dict[str, Tensor], batch: Sequence[dict[str, Any]], lr: float
    ) -> None:
        """Remembers a step; copies nothing.

        Args:
            iteration: number of the step.
            scalars: 0-dim tensors of one device.
            batch: the images of this process, for the error message.
            lr: learning rate of the step.
        """
        values = torch.stack([value.detach().float() for value in scalars.values()])
        self._pending.append(_Pending(iteration, tuple(scalars), values, file_names(batch), lr))

    def discard(self, iterations: Sequence[int]) -> None:
        """Forgets steps that were left out, the same on all processes."""
        self._pending = [step for step in self._pending if step.iteration not in iterations]

    def collect(self) -> list[StepRecord]:
        """The steps added since the last call, oldest first.

        Raises:
            NonFiniteLossError: a loss is NaN or infinite on any process (raised on all of them).
        """
        pending, self._pending = self._pending, []
        if not pending:
            return []
        values = torch.cat([step.values for step in pending])
        if comm.get_world_size() > 1:
            torch.distributed.all_reduce(values)
            values = values / comm.get_world_size()
        numbers = iter(values.cpu().tolist())
        records = []
        for step in pending:
            scalars = dict(zip(step.names, itertools.islice(numbers, len(step.names)), strict=True))
            if not all(math.isfinite(v) for name, v in scalars.items() if LOSS in name):
                raise NonFiniteLossError(_complaint(step, scalars))
            records.append(StepRecord(step.iteration, scalars))
        return records


def file_names(batch: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """What to call the images of a batch in a message."""
    return tuple(str(x.get("file_name", x.get("image_id", "without a name"))) for x in batch)


def divergence_message(iteration: int, what: str, lr: float, files: Sequence[str]) -> str:
    """What a user needs to know when numbers stop being numbers and the training ends."""
    return f"training diverged at iteration {iteration}: {describe_step(what, lr, files)}"


def describe_step(what: str, lr: float, files: Sequence[str]) -> str:
    """What was wrong with a step, with which rate and images, and what helps."""
    listed = ", ".join(files[:MAX_LISTED_FILES]) + (
        ", ..." if len(files) > MAX_LISTED_FILES else ""
    )
    return (
        f"{what}. Learning rate {lr:.4g}; images: {listed}. Lower SOLVER.BASE_LR or lengthen "
        "SOLVER.WARMUP_ITERS, keep SOLVER.CLIP_GRADIENTS on, and prefer SOLVER.AMP.DTYPE bfloat16 "
        "to float16."
    )


def _complaint(step: _Pending, scalars: dict[str, float]) -> str:
    losses = {name: value for name, value in scalars.items() if LOSS in name}
    bad = [f"{name} = {value}" for name, value in losses.items() if not math.isfinite(value)]
    good = [f"{name} = {value:.4g}" for name, value in losses.items() if math.isfinite(value)]
    what = ", ".join(bad) + (f" (finite: {', '.join(good)})" if good else "")
    # Every process sees the same mean and comes here, so this collective call is safe.
    files = list(itertools.chain(*comm.all_gather(step.files)))
    return divergence_message(step.iteration, what, step.lr, files)
