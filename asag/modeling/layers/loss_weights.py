"""How much a matched pair counts: by the object's size, and by how good the prediction is.

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
    """Weight of an object by the share of the image or patch that it covers, 0 to 1 (not in the
    paper; in the authors' code).

    Args:
        share: any shape.
        strength: weight of a vanishing object, falling to 1 with the square root of the share.
        large: the other way round, 1 for a vanishing object.

    Returns:
        Weights of the same shape.
    """
    side = share.clamp(min=0).sqrt()
    return 1 + (strength - 1) * (side if large else 1 - side)


@dataclass(frozen=True)
class QueryWeights:
    """Weights of matched queries by score p and IoU u, without gradient.

    Attributes:
        score_exponent: gamma1 of p.
        iou_exponent: gamma2 of u.
    """

    score_exponent: float = 0.4
    iou_exponent: float = 0.6

    @torch.no_grad()
    def positive(self, score: Tensor, iou: Tensor) -> Tensor:
        """w_pos of Eq. 1: how good the pair is, about 0.19 to 1."""
        return _normalize(score**self.score_exponent * iou**self.iou_exponent)

    @torch.no_grad()
    def negative(self, score: Tensor, iou: Tensor) -> Tensor:
        """w_neg of Eqs. 2 and 3: how sure a badly placed query is of itself, 0 to about 0.81."""
        badness = negative_probability(iou**self.iou_exponent)
        return _normalize(score**self.score_exponent * badness) - _BOTTOM


def negative_probability(x: Tensor) -> Tensor:
    """P_neg of Eq. 3: 1 below one half, then falling to 0 at 1."""
    return torch.where(x < 0.5, torch.ones_like(x), (1 - x.square()) / 0.75)


def _normalize(x: Tensor) -> Tensor:
    return ((x - _SHIFT) * _SLOPE).sigmoid() / _TOP


def mean_over_workers(count: Tensor) -> Tensor:
    """Mean of a count over all training processes, at least one, so that it can divide."""
    if comm.get_world_size() > 1:
        count = count.clone()
        torch.distributed.all_reduce(count)
        count = count / comm.get_world_size()
    return count.clamp(min=1)
