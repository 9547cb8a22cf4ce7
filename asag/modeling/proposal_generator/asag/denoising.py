"""Denoising queries: noised ground truths that train the stages beside the anchors (ASAG,
supplement, Table A-1; Li et al., "DN-DETR", CVPR 2022).

There is no label noise and no label embedding: a noised box gets its content from RoIAlign, like an
anchor. B images, D denoising queries, N anchors, L = D + N, M padded ground truths.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ....structures import Targets
from ...layers.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from .training_patches import Uniform, draw_uniform


def noised_truth(targets: Targets, slots: int) -> tuple[Tensor, Tensor]:
    """Which object each denoising query is a copy of.

    An image with g objects gets floor(D / g) groups of all its objects in order; what is left over
    is padding, which is all there is where g is 0 or more than D.

    Args:
        targets: padded ground truth.
        slots: D.

    Returns:
        Ground truth (B, D) int64, -1 on padding, and group (B, D) int64, -1 on padding.
    """
    count = targets.valid.sum(dim=1, keepdim=True)
    divisor = count.clamp(min=1)
    slot = torch.arange(slots, device=count.device)
    used = (slot < slots // divisor * count) & (count > 0)
    group = torch.where(used, slot // divisor, -1)
    return torch.where(used, slot % divisor, -1), group


def noised_boxes(
    targets: Targets, gt: Tensor, noise: Tensor | float, uniform: Uniform = draw_uniform
) -> Tensor:
    """Boxes (B, D, 4) xyxy in pixels: copies of objects, moved and resized at random.

    Args:
        targets: padded ground truth.
        gt: ground truth (B, D) int64, -1 on padding, which gets the whole image.
        noise: largest change of a side, in sides, and of a center, in half sides (lambda).
        uniform: source of randomness.
    """
    scale = targets.image_whwh[:, None]
    boxes = xyxy_to_cxcywh(targets.boxes_xyxy / scale)
    boxes = boxes.gather(1, gt.clamp(min=0)[..., None].expand(-1, -1, 4))
    reach = torch.cat((boxes[..., 2:] / 2, boxes[..., 2:]), dim=-1)
    draw = uniform(tuple(boxes.shape), boxes.device).to(boxes.dtype) * 2 - 1
    boxes = (boxes + draw * reach * noise).clamp(0, 1)
    whole = boxes.new_tensor((0.5, 0.5, 1, 1))
    return cxcywh_to_xyxy(torch.where(gt[..., None] >= 0, boxes, whole)) * scale


def attendable_pairs(group: Tensor, anchors_valid: Tensor, no_objects: Tensor) -> Tensor:
    """Who may attend to whom: denoising queries first, then anchors.

    Anchors never see denoising queries, which know the answers; groups see neither each other nor
    padding; all see the real anchors. In images without objects denoising slots see everything.

    Args:
        group: (B, D) int64, -1 on padding.
        anchors_valid: (B, N) bool.
        no_objects: (B,) bool, which images have none.

    Returns:
        (B, L, L) bool, queries in rows, keys in columns.
    """
    slots, count = group.shape[1], anchors_valid.shape[1]
    same = group[:, :, None] == group[:, None]  # (B, D, D)
    to_anchors = (anchors_valid[:, None] | no_objects[:, None, None]).expand(-1, slots, -1)
    anchors = anchors_valid[:, None] | ~anchors_valid[..., None]
    blind = torch.zeros_like(same[:, :1, :]).expand(-1, count, -1)
    upper, lower = torch.cat((same, to_anchors), dim=2), torch.cat((blind, anchors), dim=2)
    return torch.cat((upper, lower), dim=1)
