"""Set prediction loss: class, L1 and GIoU loss of every stage (Sparse R-CNN, Section 3.4; DETR, Eq.
2).

B images, N queries, S stages, K classes, M padded ground truths.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from fvcore.nn import sigmoid_focal_loss
from torch import Tensor, nn

from ...structures import Predictions, Targets
from ..layers.boxes import at_least_float32, box_giou, xyxy_to_cxcywh
from ..layers.loss_weights import mean_over_workers
from ..registry import CRITERION_REGISTRY


@CRITERION_REGISTRY.register()
class SetCriterion(nn.Module):
    """Computes the losses of all stages at once, with shapes that do not depend on the matching.

    Every prediction is compared with its assigned ground truth (unmatched ones with a dummy that is
    masked out), so several predictions may share an object, images may be empty, and no loop or
    synchronization is needed. All sums are computed in at least float32 under autocast.
    """

    @configurable
    def __init__(
        self,
        *,
        class_loss: str = "focal",
        class_weight: float = 2.0,
        l1_weight: float = 5.0,
        giou_weight: float = 2.0,
        l1_format: str = "xyxy",
        focal_alpha: float = 0.25,
        focal_gamma: float = 2.0,
        no_object_weight: float = 0.1,
        normalizer: str = "objects",
        deep_supervision: bool = True,
    ) -> None:
        """
        Args:
            class_loss: "focal" or "softmax" (cross entropy with a background column, weighted
                mean).
            class_weight, l1_weight, giou_weight: weights of the three losses.
            l1_format: box format of the L1 loss, "xyxy" or "cxcywh", in shares of the image size.
            focal_alpha, focal_gamma: parameters of the focal loss.
            no_object_weight: weight of background in the cross entropy.
            normalizer: divide sums by the number of "objects" or, per stage, of "positives".
            deep_supervision: losses of every stage; False keeps those of the last one only.
        """
        super().__init__()
        self.class_loss = class_loss
        self.weights = {"ce": class_weight, "bbox": l1_weight, "giou": giou_weight}
        self.l1_format = l1_format
        self.focal_alpha = focal_alpha
        self.focal_gamma = focal_gamma
        self.no_object_weight = no_object_weight
        self.normalizer = normalizer
        self.deep_supervision = deep_supervision

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        c = cfg.MODEL.CRITERION
        return {
            "class_loss": c.CLASS_LOSS,
            "class_weight": c.CLASS_WEIGHT,
            "l1_weight": c.L1_WEIGHT,
            "giou_weight": c.GIOU_WEIGHT,
            "l1_format": c.L1_FORMAT,
            "focal_alpha": c.FOCAL_ALPHA,
            "focal_gamma": c.FOCAL_GAMMA,
            "no_object_weight": c.NO_OBJECT_WEIGHT,
            "normalizer": c.NORMALIZER,
            "deep_supervision": c.DEEP_SUPERVISION,
        }

    def forward(
        self, predictions: Predictions, targets: Targets, assignment: Tensor
    ) -> dict[str, Tensor]:
        """Computes the weighted losses.

        Args:
            predictions: of all stages.
            targets: padded ground truth.
            assignment: (S, B, N) int64, -1 for background.

        Returns:
            `loss_ce`, `loss_bbox` and `loss_giou` of the last stage; with suffix `_0`, `_1`, ...
            those of the earlier stages; with `loss_dn_` those of denoising queries.
        """
        if not self.deep_supervision:
            predictions, assignment = predictions.last(), assignment[-1:]
        losses = self.stage_losses(predictions, targets, assignment, "loss_")
        if predictions.noised is not None:
            noised, gt = predictions.noised.predictions, predictions.noised.gt
            gt = gt.expand(noised.num_stages, -1, -1)
            # Divided by the number of slots, as in the authors' code of ASAG.
            slots = noised.logits.new_full((noised.num_stages,), max(noised.valid.numel(), 1))
            losses |= self.stage_losses(noised, targets, gt, "loss_dn_", at_least_float32(slots))
        return losses

    def stage_losses(
        self,
        predictions: Predictions,
        targets: Targets,
        assignment: Tensor,
        prefix: str,
        norm: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Computes the weighted losses of each stage, named `prefix` + loss + stage.

        `norm` (S,) divides the sums; None is the configured normalizer.
        """
        matched = (assignment >= 0) & predictions.valid  # (S, B, N)
        index = assignment.clamp(min=0)
        if norm is None:
            norm = self._normalizer(matched, targets)  # (S,)
        terms = self.terms(predictions, targets, index, matched, norm)
        last = predictions.num_stages - 1
        return {
            f"{prefix}{name}" + (f"_{s}" if s < last else ""): self.weights[name] * values[s]
            for name, values in terms.items()
            for s in range(last + 1)
        }

    def terms(
        self,
        predictions: Predictions,
        targets: Targets,
        index: Tensor,
        matched: Tensor,
        norm: Tensor,
    ) -> dict[str, Tensor]:
        """Computes the unweighted losses, (S,) each.

        Args:
            predictions: of all stages.
            targets: padded ground truth.
            index: (S, B, N) int64 ground truth of each prediction, arbitrary if not matched.
            matched: (S, B, N) bool.
            norm: (S,) divisor.
        """
        labels = gather_targets(targets.labels, index)  # (S, B, N)
        l1, giou = self.boxes(predictions, targets, index, matched, norm)
        ce = self.classification(predictions, labels, matched, norm)
        return {"ce": ce, "bbox": l1, "giou": giou}

    def classification(
        self, predictions: Predictions, labels: Tensor, matched: Tensor, norm: Tensor
    ) -> Tensor:
        """Computes the unweighted class loss of each stage, (S,)."""
        logits = at_least_float32(predictions.logits)
        if self.class_loss == "focal":
            gt = torch.zeros_like(logits)
            gt.scatter_(-1, labels[..., None], matched[..., None].to(logits.dtype))
            loss = sigmoid_focal_loss(
                logits, gt, alpha=self.focal_alpha, gamma=self.focal_gamma, reduction="none"
            )
            return (loss * predictions.valid[..., None]).sum(dim=(1, 2, 3)) / norm
        background = logits.shape[-1] - 1
        labels = labels.masked_fill(~matched, background)
        weight = torch.where(matched, 1.0, self.no_object_weight) * predictions.valid
        loss = F.cross_entropy(logits.flatten(0, 2), labels.flatten(), reduction="none")
        loss = loss.view(labels.shape) * weight
        return loss.sum(dim=(1, 2)) / weight.sum(dim=(1, 2)).clamp(min=1e-6)

    def boxes(
        self,
        predictions: Predictions,
        targets: Targets,
        index: Tensor,
        matched: Tensor,
        norm: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Computes the unweighted L1 and GIoU loss of each stage, (S,) each."""
        gt = gather_targets(targets.boxes_xyxy, index)  # (S, B, N, 4)
        # Unmatched predictions are replaced before the arithmetic: masking afterwards would give
        # NaN gradients for infinite boxes.
        boxes = torch.where(matched[..., None], at_least_float32(predictions.boxes_xyxy), gt)
        giou = ((1 - box_giou(boxes, gt)) * matched).sum(dim=(1, 2))
        scale = targets.image_whwh[:, None]
        boxes, gt = boxes / scale, gt / scale
        if self.l1_format == "cxcywh":
            boxes, gt = xyxy_to_cxcywh(boxes), xyxy_to_cxcywh(gt)
        l1 = ((boxes - gt).abs().sum(dim=-1) * matched).sum(dim=(1, 2))
        return l1 / norm, giou / norm

    def _normalizer(self, matched: Tensor, targets: Targets) -> Tensor:
        """Returns the divisor of the sums, (S,): mean over the processes, at least one."""
        if self.normalizer == "positives":
            count = matched.sum(dim=(1, 2)).to(targets.boxes_xyxy.dtype)
        else:
            count = targets.valid.sum().to(targets.boxes_xyxy.dtype).expand(len(matched)).clone()
        return mean_over_workers(count)


def gather_targets(values: Tensor, index: Tensor) -> Tensor:
    """Gathers `values` (B, M, ...) by the ground truth `index` (S, B, N) -> (S, B, N, ...)."""
    stages, batch, count = index.shape
    tail = values.shape[2:]
    flat = index.transpose(0, 1).reshape(batch, stages * count)  # (B, S * N)
    flat = flat.view(batch, -1, *(1 for _ in tail)).expand(-1, -1, *tail)
    return values.gather(1, flat).view(batch, stages, count, *tail).transpose(0, 1)
