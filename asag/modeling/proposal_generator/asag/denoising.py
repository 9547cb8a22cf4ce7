"""Denoising queries: noised ground truth boxes beside the anchors in training (ASAG, supplement,
Table A-1; Li et al., "DN-DETR", CVPR 2022).

There is no label noise and no label embedding: the content of a noised box comes from RoIAlign, as
for an anchor. B images, D denoising queries, N anchors, L = D + N, M padded ground truths.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ....structures import Targets
from ...layers.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from .training_patches import Uniform, draw_uniform


def noised_gt(targets: Targets, slots: int) -> tuple[Tensor, Tensor]:
    """Assigns objects to the denoising queries.

    An image with g objects gets floor(D / g) groups of all its objects in order; the remaining
    slots are padding, which includes all slots if g is 0 or larger than D.

    Args:
        targets: padded ground truth.
        slots: D.

    Returns:
        Index of the ground truth and of the group, (B, D) int64 each, -1 on padding.
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
    """Returns randomly moved and resized copies of the objects, (B, D, 4) xyxy in pixels.

    Args:
        targets: padded ground truth.
        gt: ground truth (B, D) int64, -1 on padding, which gets the whole image.
        noise: lambda, largest change of a side in sides, and of a center in half sides.
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
    """Returns the attention mask of denoising queries and anchors, in that order.

    Anchors do not attend to denoising queries, which contain the ground truth. Denoising queries
    attend to those of their group and to the valid anchors; in images without objects, to all.

    Args:
        group: (B, D) int64, -1 on padding.
        anchors_valid: (B, N) bool.
        no_objects: (B,) bool mask of the images without objects.

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
