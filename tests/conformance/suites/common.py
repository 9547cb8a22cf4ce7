"""Comparison of tensors, and the error for unknown cases."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class UnknownCase(ValueError):
    """The keys of a file fit no case of its suite."""


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
    """Compares the two tensors of a check.

    Returns:
        Largest absolute error, and True if the check passes. It fails for NaN and unequal shapes.
    """
    actual = torch.as_tensor(check.actual).detach().double()
    expected = torch.as_tensor(check.expected).detach().double()
    if actual.shape != expected.shape:
        return float("inf"), False
    if actual.numel() == 0:
        return 0.0, True
    error = (actual - expected).abs()
    within = error <= check.atol + check.rtol * expected.abs()
    return float(error.max()), bool(within.all())
