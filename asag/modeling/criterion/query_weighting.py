"""Query Weighting: losses of matched queries weighted by their quality (ASAG, Section 3.4, Eqs.
1-3).

B images, N queries, S stages, K classes, M padded ground truths.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from torch import Tensor

from ...structures import Predictions, Targets
from ..layers.boxes import at_least_float32, box_area, box_giou, box_iou, xyxy_to_cxcywh
from ..layers.loss_weights import QueryWeights, weigh_area
from ..registry import CRITERION_REGISTRY
from .set_criterion import SetCriterion, gather_targets


@CRITERION_REGISTRY.register()
class QueryWeightingCriterion(SetCriterion):
    """Set prediction loss with a positive and a negative weight for each matched query.

    The positive weight grows with the quality of score and box, the negative one with the score of
    a bad box. Works with any matcher and any number of stages. Unlike in `SetCriterion`, the focal
    loss of negatives has no factor alpha.
    """

    @configurable
    def __init__(
        self, *, weights: QueryWeights | None = None, area_weight: float = 4.0, **common: Any
    ) -> None:
        """
        Args:
            weights: exponents of score and IoU; None uses the paper's.
            area_weight: see `weigh_area`; 1 is off.
            common: arguments of `SetCriterion`; the class loss must be "focal".

        Raises:
            ValueError: the class loss is not "focal".
        """
        super().__init__(**common)
        if self.class_loss != "focal":
            raise ValueError(
                f"MODEL.CRITERION.CLASS_LOSS is {self.class_loss!r}; it must be 'focal' with "
                "MODEL.CRITERION.NAME 'QueryWeightingCriterion', which weighs sigmoid scores"
            )
        self.query_weights = weights or QueryWeights()
        self.area_weight = area_weight

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        c = cfg.MODEL.CRITERION
        return {
            **SetCriterion.from_config(cfg),
            "weights": QueryWeights(c.SCORE_EXPONENT, c.IOU_EXPONENT),
            "area_weight": c.AREA_WEIGHT,
        }

    def terms(
        self,
        predictions: Predictions,
        targets: Targets,
        index: Tensor,
        matched: Tensor,
        norm: Tensor,
    ) -> dict[str, Tensor]:
        """Computes the unweighted losses of each stage, (S,); arguments as in `SetCriterion`."""
        logits = at_least_float32(predictions.logits)
        label = gather_targets(targets.labels, index)[..., None]  # (S, B, N, 1)
        gt = gather_targets(targets.boxes_xyxy, index)  # (S, B, N, 4)
        boxes = torch.where(matched[..., None], at_least_float32(predictions.boxes_xyxy), gt)
        scale = targets.image_whwh[:, None]
        area = weigh_area(box_area(gt / scale), self.area_weight) * matched  # (S, B, N)
        logit = logits.gather(-1, label)[..., 0]
        with torch.no_grad():
            score, iou = logit.sigmoid(), box_iou(boxes, gt)
            positive = area * self.query_weights.positive(score, iou)
            negative = area * self.query_weights.negative(score, iou)

        background = logits.sigmoid().pow(self.focal_gamma) * F.softplus(logits)
        others = background.sum(dim=-1) - background.gather(-1, label)[..., 0] * matched
        of_matched = positive * F.softplus(-logit) + negative * F.softplus(logit)
        ce = torch.where(predictions.valid, others + of_matched, 0).sum(dim=(1, 2))

        giou = (positive * (1 - box_giou(boxes, gt))).sum(dim=(1, 2))
        boxes, gt = boxes / scale, gt / scale
        if self.l1_format == "cxcywh":
            boxes, gt = xyxy_to_cxcywh(boxes), xyxy_to_cxcywh(gt)
        l1 = (positive * (boxes - gt).abs().sum(dim=-1)).sum(dim=(1, 2))
        return {"ce": ce / norm, "bbox": l1 / norm, "giou": giou / norm}
