"""Scalars of recent steps, kept on the device until the log wants them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.utils import comm
from torch import Tensor

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


class LossLog:
    """Collects the scalars of each step and hands them over in one device-to-host copy.

    All processes must add and collect at the same iterations.
    """

    def __init__(self) -> None:
        self._pending: list[_Pending] = []

    def add(self, iteration: int, scalars: dict[str, Tensor]) -> None:
        """Remembers a step; copies nothing.

        Args:
            iteration: number of the step.
            scalars: 0-dim tensors of one device.
        """
        values = torch.stack([value.detach().float() for value in scalars.values()])
        self._pending.append(_Pending(iteration, tuple(scalars), values))

    def discard(self, iterations: Sequence[int]) -> None:
        """Forgets steps that were left out, the same on all processes."""
        self._pending = [step for step in self._pending if step.iteration not in iterations]

    def collect(self) -> list[StepRecord]:
        """The steps added since the last call, oldest first."""
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
