"""Weights of matched pairs by the size of the object and the quality of the prediction.

ASAG (Fu et al., ICCV 2023), Section 3.4, Eqs. 1-3, and the authors' code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from detectron2.utils import comm
from torch import Tensor

# norm(x) = sigmoid((x - 1/3) * 4.5) / sigmoid(3), from about 0.19 to 1.
_SHIFT, _SLOPE = 1 / 3, 4.5


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


_TOP = _sigmoid(_SLOPE * (1 - _SHIFT))
_BOTTOM = _sigmoid(-_SLOPE * _SHIFT) / _TOP


def weigh_area(share: Tensor, strength: float, large: bool = False) -> Tensor:
    """Returns the weight of objects by their size (not in the paper; in the authors' code).

    Args:
        share: share of the image or patch that each object covers, 0 to 1, any shape.
        strength: weight of an object of size zero; falls to 1 with the square root of the share.
        large: the reverse, 1 for an object of size zero.

    Returns:
        Weights of the same shape.
    """
    side = share.clamp(min=0).sqrt()
    return 1 + (strength - 1) * (side if large else 1 - side)


@dataclass(frozen=True)
class QueryWeights:
    """Query Weighting: weights of matched queries by score p and IoU u, without gradient.

    Attributes:
        score_exponent: gamma1 of p.
        iou_exponent: gamma2 of u.
    """

    score_exponent: float = 0.4
    iou_exponent: float = 0.6

    @torch.no_grad()
    def positive(self, score: Tensor, iou: Tensor) -> Tensor:
        """Returns w_pos of Eq. 1, about 0.19 to 1: high for a good score and box."""
        return _normalize(score**self.score_exponent * iou**self.iou_exponent)

    @torch.no_grad()
    def negative(self, score: Tensor, iou: Tensor) -> Tensor:
        """Returns w_neg of Eqs. 2 and 3, 0 to about 0.81: high for a good score with a bad box."""
        badness = negative_probability(iou**self.iou_exponent)
        return _normalize(score**self.score_exponent * badness) - _BOTTOM


def negative_probability(x: Tensor) -> Tensor:
    """Returns P_neg of Eq. 3: 1 below one half, falling to 0 at 1."""
    return torch.where(x < 0.5, torch.ones_like(x), (1 - x.square()) / 0.75)


def _normalize(x: Tensor) -> Tensor:
    return ((x - _SHIFT) * _SLOPE).sigmoid() / _TOP


def mean_over_workers(count: Tensor) -> Tensor:
    """Returns the mean of a count over all processes, at least one, as a divisor."""
    if comm.get_world_size() > 1:
        count = count.clone()
        torch.distributed.all_reduce(count)
        count = count / comm.get_world_size()
    return count.clamp(min=1)
