"""Convolutions that only produce their output shape, for counting operations quickly.

A trace records operators and shapes; the values matter only where shapes depend on them. On a CPU,
nine tenths of the time of a trace are spent in convolutions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from fvcore.nn.jit_handles import conv_flop_count, get_shape
from torch import Tensor

OPERATOR = "asag_count::conv2d"
_LIBRARY = torch.library.Library("asag_count", "DEF")
_LIBRARY.define(
    "conv2d(Tensor x, Tensor weight, int[] stride, int[] padding, int[] dilation) -> Tensor"
)


def _zeros(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    sides = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(
            x.shape[2:], padding, dilation, weight.shape[2:], stride, strict=True
        )
    ]
    return torch.zeros(x.shape[0], weight.shape[0], *map(int, sides), device=x.device)


_LIBRARY.impl("conv2d", _zeros, "CPU")


@contextmanager
def free_convolutions() -> Iterator[None]:
    """Replaces 2-D convolutions within the block.

    They return zeros of the right shape, are traced as an operator that `count` handles, and have
    no gradient.
    """

    def conv2d(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        pairs = [[x, x] if isinstance(x, int) else list(x) for x in (stride, padding, dilation)]
        return torch.ops.asag_count.conv2d(input, weight, *pairs)

    with mock.patch("torch.nn.functional.conv2d", conv2d):
        yield


def count(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    """Counts the multiply-adds of one such convolution by fvcore's rule, as a handle."""
    x_shape, w_shape = get_shape(inputs[0]), get_shape(inputs[1])
    return Counter({"conv": conv_flop_count(x_shape, w_shape, get_shape(outputs[0]))})
