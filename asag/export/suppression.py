"""Non-maximum suppression without a look at the data: every shape and step is known beforehand.

B images, D boxes an image.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..modeling.layers.boxes import box_iou


def keep_best(
    boxes_xyxy: Tensor, labels: Tensor, candidates: Tensor, iou_threshold: float
) -> Tensor:
    """Class-wise greedy suppression of boxes in falling order of score.

    A box stays if no better box that stays, of its class, overlaps it by more than the threshold.
    Read as an equation, that has exactly one solution, and repeated substitution finds it: round t
    settles the first t + 1 boxes for good, so D - 1 rounds settle all. A round is one small product
    of a matrix and a vector, which every runtime knows; no loop depends on the boxes.

    Args:
        boxes_xyxy: (B, D, 4), the best first.
        labels: (B, D) integers.
        candidates: (B, D) bool; the others neither stay nor suppress.
        iou_threshold: 0 to 1.

    Returns:
        (B, D) bool, which boxes stay.
    """
    count = boxes_xyxy.shape[1]
    overlap = box_iou(boxes_xyxy[:, :, None], boxes_xyxy[:, None]) > iou_threshold  # (B, D, D)
    rank = torch.arange(count, device=boxes_xyxy.device)
    better = rank < rank[:, None]  # column j stands before row i
    rivals = overlap & (labels[:, :, None] == labels[:, None]) & better & candidates[:, None]
    rivals = rivals.to(boxes_xyxy.dtype)
    stays = torch.ones_like(boxes_xyxy[..., :1])  # (B, D, 1), 0 or 1
    for _ in range(count - 1):
        stays = (1 - rivals @ stays).relu()
    return (stays[..., 0] > 0) & candidates
