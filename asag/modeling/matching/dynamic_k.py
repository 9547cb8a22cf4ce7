"""Number of positive predictions of each object: dynamic k, unit increase, cap on positives.

Dynamic Sparse R-CNN (Hong et al., CVPR 2022), Section 3.2: every ground truth supplies k units of
positive labels, estimated from the IoU of the predictions (after OTA, Ge et al., CVPR 2021); early
stages supply fewer (Eq. 2); at least a fifth of the predictions stays negative.

S stages, B images, M padded ground truths, N predictions. Units are float32 because crowded images
and `rounding="none"` make them fractional.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Rounding error around whole numbers in float32. Quotients of whole numbers below a few thousand
# differ more than this from the next whole number, so flooring after adding it is exact.
ROUNDING_SLACK = 1e-5


def iou_units(iou: Tensor, q: int) -> Tensor:
    """Computes dynamic k: the sum of the q largest IoUs of a ground truth, floored, at least one.

    Args:
        iou: (..., M, N), zero for padded predictions.
        q: number of predictions in the sum.

    Returns:
        (..., M) float, whole numbers in 1..max(q, 1).
    """
    best = iou.topk(min(q, iou.shape[-1]), dim=-1).values
    return best.sum(dim=-1).floor().clamp(min=1)


def grow_units(units: Tensor, *, step: float, rounding: str) -> Tensor:
    """Applies the unit increase (Eq. 2): k - step * (T - t) in stage t = 1..T, T = S.

    The equation can yield zero, negative and fractional units, which the paper does not discuss:
    units are clamped to at least one and then rounded.

    Args:
        units: (S, B, M).
        step: increase from one stage to the next.
        rounding: "floor", "round" (halves up) or "none".
    """
    stages = units.shape[0]
    missing = step * torch.arange(stages - 1, -1, -1, device=units.device, dtype=units.dtype)
    grown = (units - missing[:, None, None]).clamp(min=1)
    if rounding == "floor":
        return (grown + ROUNDING_SLACK).floor()
    if rounding == "round":
        return (grown + 0.5 + ROUNDING_SLACK).floor()
    return grown


def cap_units(
    units: Tensor,
    present: Tensor,
    num_predictions: Tensor,
    *,
    cap: float,
    largest: int,
    whole: bool = True,
) -> Tensor:
    """Reduces the units of crowded images so that at most a share `cap` of the predictions is
    positive.

    All ground truths are scaled by one factor (Section 3.2). Whole units are then floored to at
    least one, and the remaining excess is taken from the largest, one unit at a time. Images with
    more objects than allowed positives share the limit equally, less than one unit each.

    Args:
        units: (..., M), at least one where present.
        present: (..., M) bool, False on padding.
        num_predictions: (...) valid predictions of each problem.
        cap: largest share of positives, in (0, 1].
        largest: upper bound of `units`, known on the host.
        whole: keep units whole; False allows fractions.

    Returns:
        (..., M), zero on padding; the sum never exceeds `cap * num_predictions`.
    """
    units = units * present
    limit = (cap * num_predictions.to(units.dtype))[..., None]
    whole_limit = (limit + 10 * ROUNDING_SLACK).floor()
    total = units.sum(dim=-1, keepdim=True)
    scaled = units * limit / total.clamp(min=1)
    if whole:
        scaled = (scaled + ROUNDING_SLACK).floor().clamp(min=1) * present
        scaled = take_from_largest(scaled, whole_limit, largest)
    units = torch.where(total > limit + 10 * ROUNDING_SLACK, scaled, units)
    objects = present.sum(dim=-1, keepdim=True)
    shared = limit / objects.clamp(min=1) * present
    return torch.where(objects > whole_limit, shared, units)


def take_from_largest(units: Tensor, limit: Tensor, largest: int) -> Tensor:
    """Takes single units from the largest entry (the first of equals) until the sum is at most
    `limit`.

    All problems are solved at once: the result is a common upper bound, which only the last few
    entries above it exceed, by one unit.

    Args:
        units: (..., M) whole numbers in 0..largest.
        limit: (..., 1) whole number.
        largest: bound of `units`, on the host.
    """
    levels = torch.arange(largest + 1, device=units.device, dtype=units.dtype)
    filled = torch.minimum(units[..., None], levels).sum(dim=-2)  # (..., largest + 1), rising
    level = ((filled <= limit).sum(dim=-1, keepdim=True) - 1).clamp(min=0).to(units.dtype)
    base = torch.minimum(units, level)
    above = units > level
    spare = limit - base.sum(dim=-1, keepdim=True)
    place_from_end = above.flip(-1).cumsum(dim=-1).flip(-1)
    return base + (above & (place_from_end <= spare)).to(units.dtype)


@dataclass(frozen=True, kw_only=True)
class UnitPolicy:
    """Computes the units of every ground truth in every stage.

    Attributes:
        q: predictions whose IoUs are summed (paper: best AP with 8).
        fixed_k: fixed number of units of every ground truth; 0 is dynamic k.
        unit_increase: apply Eq. 2.
        unit_step: increase per stage (paper: 0.5).
        unit_rounding: "floor", "round" or "none".
        cap: largest share of positive predictions (paper: 0.8).
    """

    q: int = 8
    fixed_k: int = 0
    unit_increase: bool = True
    unit_step: float = 0.5
    unit_rounding: str = "floor"
    cap: float = 0.8

    def __call__(
        self, iou: Tensor | None, present: Tensor, num_predictions: Tensor, num_stages: int
    ) -> Tensor:
        """Returns the units (S, B, M), float32.

        Args:
            iou: (S, B, M, N) of ground truth and predicted boxes, zero for padded predictions; not
                used (None) with `fixed_k`.
            present: (B, M) bool, False on padding.
            num_predictions: (B,) valid predictions.
            num_stages: S.
        """
        if self.fixed_k:
            shape = (num_stages, *present.shape)
            units = torch.full(shape, float(self.fixed_k), device=present.device)
        else:
            units = iou_units(iou, self.q)
        if self.unit_increase:
            units = grow_units(units, step=self.unit_step, rounding=self.unit_rounding)
        return cap_units(
            units,
            present.expand(num_stages, -1, -1),
            num_predictions.expand(num_stages, -1),
            cap=self.cap,
            largest=self.fixed_k or self.q,
            whole=not self.unit_increase or self.unit_rounding != "none",
        )
