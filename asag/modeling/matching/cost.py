"""Matching cost of predictions and ground truth (Sparse R-CNN, Section 3.4; DETR, Section 3.1).

B images, N queries, S stages, K classes, M padded ground truths. Every cost is computed in float32
(float64 if the boxes are) for all stages and images at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from detectron2.config import CfgNode
from torch import Tensor

from ...structures import Predictions, Targets
from ..layers.boxes import at_least_float32, box_area, box_giou, xyxy_to_cxcywh
from ..layers.loss_weights import weigh_area

EPS = 1e-8  # inside the logarithms of the focal cost, as in the authors' implementations


def focal_cost(logits: Tensor, alpha: float, gamma: float) -> Tensor:
    """Computes the focal loss as a positive minus that as a negative, elementwise."""
    prob = logits.sigmoid()
    positive = alpha * (1 - prob) ** gamma * -(prob + EPS).log()
    negative = (1 - alpha) * prob**gamma * -(1 - prob + EPS).log()
    return positive - negative


@dataclass(frozen=True)
class MatchingCost:
    """Weighted sum of classification, L1 and GIoU cost of every prediction-object pair.

    Attributes:
        class_weight: weight of the class term.
        l1_weight: weight of the L1 distance of boxes normalized by the image size.
        giou_weight: weight of the negative GIoU.
        class_cost: "focal" (sigmoid, one column a class) or "softmax" (negative probability).
        box_format: box format of the L1 distance, "xyxy" or "cxcywh".
        alpha, gamma: parameters of the focal cost.
        area_weight: factor of the costs of an object of size zero, falling to 1 for one as large as
            the image (see `weigh_area`); 1 is off.
    """

    class_weight: float = 2.0
    l1_weight: float = 5.0
    giou_weight: float = 2.0
    class_cost: str = "focal"
    box_format: str = "xyxy"
    alpha: float = 0.25
    gamma: float = 2.0
    area_weight: float = 1.0

    @classmethod
    def from_config(cls, cfg: CfgNode) -> MatchingCost:
        """Reads MODEL.MATCHER.*_COST, and the parameters shared with the loss from
        MODEL.CRITERION."""
        return cls(
            class_weight=cfg.MODEL.MATCHER.CLASS_COST,
            l1_weight=cfg.MODEL.MATCHER.L1_COST,
            giou_weight=cfg.MODEL.MATCHER.GIOU_COST,
            class_cost=cfg.MODEL.CRITERION.CLASS_LOSS,
            box_format=cfg.MODEL.CRITERION.L1_FORMAT,
            alpha=cfg.MODEL.CRITERION.FOCAL_ALPHA,
            gamma=cfg.MODEL.CRITERION.FOCAL_GAMMA,
            area_weight=cfg.MODEL.CRITERION.AREA_WEIGHT,
        )

    def classification(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Computes the unweighted class cost (S, B, N, M) of logits (S, B, N, K), labels (B, M)."""
        logits = at_least_float32(logits)
        if self.class_cost == "softmax":
            logits = logits.softmax(dim=-1)
        index = labels[None, :, None, :].expand(*logits.shape[:3], -1)  # (S, B, N, M)
        chosen = logits.gather(-1, index)
        if self.class_cost == "softmax":
            return -chosen
        return focal_cost(chosen, self.alpha, self.gamma)

    def l1(self, boxes_xyxy: Tensor, targets: Targets) -> Tensor:
        """Computes the unweighted L1 cost (S, B, N, M) of boxes divided by the image size."""
        scale = targets.image_whwh[:, None]
        boxes, gt = boxes_xyxy / scale, targets.boxes_xyxy / scale
        if self.box_format == "cxcywh":
            boxes, gt = xyxy_to_cxcywh(boxes), xyxy_to_cxcywh(gt)
        # Coordinate by coordinate, without a tensor (S, B, N, M, 4).
        return sum((boxes[..., :, None, i] - gt[:, None, :, i]).abs() for i in range(4))

    def giou(self, boxes_xyxy: Tensor, targets: Targets) -> Tensor:
        """Computes the generalized IoU (S, B, N, M) of all pairs."""
        return box_giou(boxes_xyxy[..., :, None, :], targets.boxes_xyxy[:, None])

    @torch.no_grad()
    def __call__(self, predictions: Predictions, targets: Targets) -> Tensor:
        """Computes the cost (S, B, N, M); columns of padding hold finite but meaningless values."""
        boxes = at_least_float32(predictions.boxes_xyxy)
        cost = (
            self.class_weight * self.classification(predictions.logits, targets.labels)
            + self.l1_weight * self.l1(boxes, targets)
            - self.giou_weight * self.giou(boxes, targets)
        )
        if self.area_weight == 1:
            return cost
        share = box_area(targets.boxes_xyxy / targets.image_whwh[:, None])
        return cost * weigh_area(share, self.area_weight)[:, None]
