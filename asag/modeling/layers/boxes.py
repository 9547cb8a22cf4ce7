"""Box arithmetic of matching, losses and stages.

Every function broadcasts over leading dimensions: paired boxes are (..., 4) against (..., 4), all
pairs are `boxes_a[..., :, None, :]` against `boxes_b[..., None, :, :]`. Boxes are xyxy, both in the
same unit.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

# Largest factor by which one stage may stretch a side: a box of 16 px may grow to 100 000 px.
MAX_SCALE = 100000.0 / 16


def at_least_float32(x: Tensor) -> Tensor:
    """Converts half precision to float32 and keeps float32 and float64.

    Boxes are never stored in half precision.
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))


def cxcywh_to_xyxy(boxes_cxcywh: Tensor) -> Tensor:
    """Converts center and size to corners, (..., 4)."""
    center, size = boxes_cxcywh[..., :2], boxes_cxcywh[..., 2:]
    return torch.cat((center - size / 2, center + size / 2), dim=-1)


def xyxy_to_cxcywh(boxes_xyxy: Tensor) -> Tensor:
    """Converts corners to center and size, (..., 4)."""
    low, high = boxes_xyxy[..., :2], boxes_xyxy[..., 2:]
    return torch.cat(((low + high) / 2, high - low), dim=-1)


def box_area(boxes_xyxy: Tensor) -> Tensor:
    """Computes the signed areas (...) of boxes (..., 4)."""
    return (boxes_xyxy[..., 2] - boxes_xyxy[..., 0]) * (boxes_xyxy[..., 3] - boxes_xyxy[..., 1])


def intersection_and_union(boxes_a: Tensor, boxes_b: Tensor) -> tuple[Tensor, Tensor]:
    """Computes areas of intersection and union, broadcast over leading dimensions."""
    width, height = _overlap(boxes_a, boxes_b, torch.minimum, torch.maximum)
    intersection = width * height
    return intersection, box_area(boxes_a) + box_area(boxes_b) - intersection


def box_iou(boxes_a: Tensor, boxes_b: Tensor) -> Tensor:
    """Computes the IoU, in [0, 1]; exactly 1 for equal boxes with area, 0 if the union is empty."""
    intersection, union = intersection_and_union(boxes_a, boxes_b)
    return intersection / _divisor(union)


def box_giou(boxes_a: Tensor, boxes_b: Tensor) -> Tensor:
    """Computes the generalized IoU, in [-1, 1] (Rezatofighi et al., CVPR 2019)."""
    intersection, union = intersection_and_union(boxes_a, boxes_b)
    width, height = _overlap(boxes_a, boxes_b, torch.maximum, torch.minimum)
    hull = width * height
    return intersection / _divisor(union) - (hull - union) / _divisor(hull)


def _overlap(
    boxes_a: Tensor,
    boxes_b: Tensor,
    end: Callable[[Tensor, Tensor], Tensor],
    start: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """Computes width and height of intersection or hull.

    Coordinates are processed one by one: a last dimension of two would make all pairs several times
    slower.

    Args:
        boxes_a, boxes_b: (..., 4).
        end, start: elementwise minimum and maximum for the intersection, the reverse for the hull.
    """
    left_a, top_a, right_a, bottom_a = boxes_a.unbind(-1)
    left_b, top_b, right_b, bottom_b = boxes_b.unbind(-1)
    width = (end(right_a, right_b) - start(left_a, left_b)).clamp(min=0)
    return width, (end(bottom_a, bottom_b) - start(top_a, top_b)).clamp(min=0)


def _divisor(area: Tensor) -> Tensor:
    """Replaces empty areas by one; a small epsilon instead would make gradients infinite."""
    return torch.where(area > 0, area, 1.0)


def decode_deltas(
    deltas: Tensor,
    boxes_xyxy: Tensor,
    center_weight: float = 2.0,
    size_weight: float = 1.0,
    min_scale: float = 0.0,
    max_scale: float = MAX_SCALE,
) -> Tensor:
    """Applies predicted deltas to boxes.

    Args:
        deltas: (..., 4) dx, dy in units of the box side times `center_weight`, and dw, dh as log
            factors times `size_weight`.
        boxes_xyxy: (..., 4) input boxes of the stage.
        center_weight, size_weight: divisors of the deltas. They are numbers because a tensor would
            have to be copied to the device in every stage.
        min_scale, max_scale: bounds of the factor by which a side changes; 0 leaves shrinking free.

    Returns:
        (..., 4) boxes xyxy, at least float32. not clipped to the image.
    """
    deltas, boxes = at_least_float32(deltas), xyxy_to_cxcywh(at_least_float32(boxes_xyxy))
    center, size = boxes[..., :2], boxes[..., 2:]
    center = center + deltas[..., :2] / center_weight * size
    smallest = math.log(min_scale) if min_scale > 0 else None
    log_scale = (deltas[..., 2:] / size_weight).clamp(min=smallest, max=math.log(max_scale))
    size = size * log_scale.exp()
    return torch.cat((center - size / 2, center + size / 2), dim=-1)
