"""What the suites share: the comparison record and the issue about cases nobody recognizes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class UnknownCase(ValueError):
    """A file whose keys fit no case of the suite that its folder names."""


class MissingCheckpoint(ValueError):
    """A case whose weights are not beside it; it is left out."""


class Check(NamedTuple):
    """One comparison: passes when |actual - expected| <= atol + rtol * |expected| everywhere."""

    name: str
    actual: Tensor | float
    expected: Tensor | float
    atol: float
    rtol: float = 0.0


Checks = Iterator[Check]


def compare(check: Check) -> tuple[float, bool]:
    """Largest absolute error of a check and whether it passes; shapes must agree, NaN never
    passes."""
    actual = torch.as_tensor(check.actual).detach().double()
    expected = torch.as_tensor(check.expected).detach().double()
    if actual.shape != expected.shape:
        return float("inf"), False
    if actual.numel() == 0:
        return 0.0, True
    error = (actual - expected).abs()
    within = error <= check.atol + check.rtol * expected.abs()
    return float(error.max()), bool(within.all())
