"""Targets of patches, in coordinates of the patch.

ASAG (Fu et al., ICCV 2023), Section 3.3, and the authors' code. B images, P patches, M padded
ground truths. Boxes are cxcywh in shares of the patch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ....structures import Targets
from ...layers.boxes import xyxy_to_cxcywh


@dataclass
class PatchTargets:
    """Ground truth of patches.

    Attributes:
        boxes_cxcywh: (B, P, M, 4) relative to the patch, of positive size also on padding.
        valid: (B, P, M) bool mask of the objects that belong to the patch.
    """

    boxes_cxcywh: Tensor
    valid: Tensor


def whole_image_targets(targets: Targets, flips: bool, released_flip: bool = False) -> PatchTargets:
    """Returns the targets of P6: all objects.

    Args:
        targets: padded ground truth.
        flips: also return those of P6 flipped horizontally, vertically and both ways.
        released_flip: flip like the authors' code, which treats center and size as corners, so that
            three of the four are wrong. Only to reproduce the published training.
    """
    boxes = xyxy_to_cxcywh(targets.boxes_xyxy / targets.image_whwh[:, None])
    views = [boxes]
    if flips:
        flip = _released_flip if released_flip else _flip
        views += [flip(boxes, 0), flip(boxes, 1), flip(flip(boxes, 0), 1)]
    stacked = torch.stack(views, dim=1)
    return PatchTargets(stacked, targets.valid[:, None].expand(stacked.shape[:3]))


def _flip(boxes_cxcywh: Tensor, axis: int) -> Tensor:
    flipped = boxes_cxcywh.clone()
    flipped[..., axis] = 1 - boxes_cxcywh[..., axis]
    return flipped


def _released_flip(boxes_cxcywh: Tensor, axis: int) -> Tensor:
    flipped = boxes_cxcywh.clone()
    flipped[..., axis] = 1 - boxes_cxcywh[..., axis + 2]
    flipped[..., axis + 2] = 1 - boxes_cxcywh[..., axis]
    return flipped


def quadrant_targets(targets: Targets) -> PatchTargets:
    """Returns the targets of the quadrants of P5: objects with their center in the quadrant,
    including its border."""
    quadrant = torch.arange(4, device=targets.image_whwh.device)
    corner = torch.stack((quadrant % 2, quadrant // 2), dim=-1)  # (4, 2)
    half = targets.image_whwh[:, None, :2] / 2
    return window_targets(targets, corner * half, half)


def probed_targets(targets: Targets, corner: Tensor, stride: int, side: int) -> PatchTargets:
    """Returns the targets of patches with corners (B, P, 2) and sides of `side` cells: objects with
    their center in the closed patch that are not larger than the patch."""
    extent = targets.image_whwh.new_full((1, 1, 2), side * stride)
    low = corner.to(extent.dtype) * stride
    result = window_targets(targets, low, extent)
    size = targets.boxes_xyxy[..., 2:] - targets.boxes_xyxy[..., :2]
    result.valid &= (size <= side * stride).all(dim=-1)[:, None]
    return result


def window_targets(targets: Targets, low: Tensor, size: Tensor) -> PatchTargets:
    """Returns the objects with their center in a closed window, clipped and in its coordinates.

    Args:
        targets: padded ground truth.
        low: (B, P, 2) top left corners in pixels.
        size: (B or 1, P or 1, 2) width and height in pixels.
    """
    low, size = low[:, :, None], size[:, :, None]  # (B, P, 1, 2)
    boxes = targets.boxes_xyxy[:, None]  # (B, 1, M, 4)
    center = (boxes[..., :2] + boxes[..., 2:]) / 2
    inside = ((center >= low) & (center <= low + size)).all(dim=-1)  # (B, P, M)
    valid = inside & targets.valid[:, None]
    relative = torch.cat(((boxes[..., :2] - low) / size, (boxes[..., 2:] - low) / size), dim=-1)
    relative = relative.clamp(0, 1)
    # Boxes of other windows may be empty here; the whole window replaces them, so that all
    # arithmetic stays finite.
    whole = relative.new_zeros(4)
    whole[2:] = 1
    return PatchTargets(xyxy_to_cxcywh(torch.where(valid[..., None], relative, whole)), valid)
