"""Initialization of parameters."""

from __future__ import annotations

import math

from torch import nn


def xavier_init_matrices(module: nn.Module) -> None:
    """Initializes all parameters with more than one dimension from the Xavier uniform
    distribution."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)


def prior_bias(prob: float) -> float:
    """Returns the bias for which a sigmoid classifier starts at probability `prob` (focal loss,
    Section 4.1)."""
    return -math.log((1 - prob) / prob)
