"""Non-maximum suppression with static shapes and no data-dependent control flow.

B images, D boxes of an image.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..modeling.layers.boxes import box_iou


def keep_best(
    boxes_xyxy: Tensor, labels: Tensor, candidates: Tensor, iou_threshold: float
) -> Tensor:
    """Applies class-wise greedy suppression to boxes in descending order of score.

    A box is kept if no kept box of its class with a higher score overlaps it by more than the
    threshold. This equation has exactly one solution, which fixed-point iteration finds: iteration
    t determines the first t + 1 boxes, so D - 1 iterations determine all. An iteration is a
    matrix-vector product, which every runtime supports; no loop depends on the boxes.

    Args:
        boxes_xyxy: (B, D, 4), in descending order of score.
        labels: (B, D) integers.
        candidates: (B, D) bool; other boxes are neither kept nor suppress any.
        iou_threshold: 0 to 1.

    Returns:
        (B, D) bool, the kept boxes.
    """
    count = boxes_xyxy.shape[1]
    overlap = box_iou(boxes_xyxy[:, :, None], boxes_xyxy[:, None]) > iou_threshold  # (B, D, D)
    rank = torch.arange(count, device=boxes_xyxy.device)
    better = rank < rank[:, None]  # column j comes before row i
    rivals = overlap & (labels[:, :, None] == labels[:, None]) & better & candidates[:, None]
    rivals = rivals.to(boxes_xyxy.dtype)
    stays = torch.ones_like(boxes_xyxy[..., :1])  # (B, D, 1), 0 or 1
    for _ in range(count - 1):
        stays = (1 - rivals @ stays).relu()
    return (stays[..., 0] > 0) & candidates
