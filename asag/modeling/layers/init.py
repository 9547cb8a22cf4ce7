"""Initialization shared by the decoders of this family."""

from __future__ import annotations

import math

from torch import nn


def xavier_init_matrices(module: nn.Module) -> None:
    """Xavier-uniform for every parameter with more than one dimension; vectors keep their
    defaults."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)


def prior_bias(prob: float) -> float:
    """Bias that makes a sigmoid classifier start at probability `prob` (focal loss, Section
    4.1)."""
    return -math.log((1 - prob) / prob)
