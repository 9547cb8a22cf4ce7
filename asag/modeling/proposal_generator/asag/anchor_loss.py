"""Anchor losses: one-to-one matching inside of each patch, quality focal loss, weighted box losses.

ASAG (Fu et al., ICCV 2023), Sections 3.3 and 3.4, and the authors' code. B images, P patches, A
anchors of a patch, M padded ground truths, Q = B * P problems.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from ....structures import Targets
from ...layers.boxes import box_giou, box_iou, cxcywh_to_xyxy
from ...layers.loss_weights import QueryWeights, mean_over_workers, weigh_area
from ...matching.cost import MatchingCost, focal_cost
from ...matching.hungarian import NonFiniteCostError
from .anchors import GeneratedAnchors
from .patch_targets import PatchTargets, probed_targets, quadrant_targets, whole_image_targets

IGNORED_IOU = 0.5  # unmatched anchors with this IoU to an object are not negatives


@dataclass
class PatchGroup:
    """Patches with a common kind of targets and weights.

    Attributes:
        raw: (B, P, A, 5) predictions, boxes relative to the patch and location logits.
        valid: (B, P) bool.
        targets: ground truth of the patches.
        large: large objects have larger weights (P6) instead of small ones.
    """

    raw: Tensor
    valid: Tensor
    targets: PatchTargets
    large: bool = False


class AnchorCriterion(nn.Module):
    """Losses of all anchors of P6, P5 and the probed patches."""

    def __init__(
        self,
        *,
        cost: MatchingCost,
        weights: QueryWeights | None = None,
        class_weight: float = 8.0,
        l1_weight: float = 4.0,
        giou_weight: float = 2.0,
        focal_gamma: float = 2.0,
        nominal_patches: float = 4.0,
        released_flip: bool = False,
    ) -> None:
        """
        Args:
            cost: weights of the matching cost; its class term applies to the location logit.
            weights: exponents of score and IoU; None uses the paper's.
            class_weight, l1_weight, giou_weight: weights of the three losses.
            focal_gamma: exponent of the quality focal loss.
            nominal_patches: sums over probed patches are scaled to this number of patches a batch.
            released_flip: see `whole_image_targets`.
        """
        super().__init__()
        self.cost = cost
        self.query_weights = weights or QueryWeights()
        self.coefficients = {"ce": class_weight, "bbox": l1_weight, "giou": giou_weight}
        self.focal_gamma = focal_gamma
        self.nominal_patches = nominal_patches
        self.released_flip = released_flip

    def forward(self, generated: GeneratedAnchors, targets: Targets) -> dict[str, Tensor]:
        """Computes the weighted losses `loss_ce_anchor`, `loss_bbox_anchor`, `loss_giou_anchor`."""
        groups = self.groups(generated, targets)
        matches = self.match(groups)
        patches = sum((x.valid.sum() for x in generated.probed), targets.valid.new_zeros(()).sum())
        rescale = self.nominal_patches / patches.clamp(min=1)
        norm = mean_over_workers(targets.valid.sum().to(targets.boxes_xyxy.dtype))
        totals: dict[str, Tensor] = {}
        for i, (group, match) in enumerate(zip(groups, matches, strict=True)):
            for name, value in self.terms(group, match).items():
                value = value * rescale if i >= 2 else value
                totals[name] = totals[name] + value if name in totals else value
        return {
            f"loss_{name}_anchor": self.coefficients[name] * total / norm
            for name, total in totals.items()
        }

    def groups(self, generated: GeneratedAnchors, targets: Targets) -> list[PatchGroup]:
        """Returns the groups of P6, P5, and each probed level."""
        p6, p5 = generated.p6, generated.p5
        whole = whole_image_targets(targets, p6.shape[1] > 1, self.released_flip)
        everywhere = torch.ones(p5.shape[:2], dtype=torch.bool, device=p5.device)
        return [
            PatchGroup(p6, everywhere[:, : p6.shape[1]], whole, large=True),
            PatchGroup(p5, everywhere, quadrant_targets(targets)),
            *(
                PatchGroup(x.raw, x.valid, probed_targets(targets, x.corner, x.stride, x.side))
                for x in generated.probed
            ),
        ]

    @torch.no_grad()
    def match(self, groups: Sequence[PatchGroup]) -> list[Tensor]:
        """Returns the matching (B, P, A), int64, of each group; -1 is background.

        All costs are copied to the host at once.
        """
        costs = [self.pair_cost(x) for x in groups]
        usable = [x.targets.valid & x.valid[..., None] for x in groups]
        flat = [*(x.flatten() for x in costs), *(x.flatten().to(costs[0].dtype) for x in usable)]
        host = torch.cat(flat).cpu().numpy()
        pieces = np.split(host, np.cumsum([len(x) for x in flat])[:-1])
        matches = []
        for cost, mask, shape in zip(
            pieces[: len(groups)], pieces[len(groups) :], [x.shape for x in costs], strict=True
        ):
            batch, patches, anchors, objects = shape
            match = solve_patches(cost.reshape(-1, anchors, objects), mask.reshape(-1, objects) > 0)
            match = torch.from_numpy(match.reshape(batch, patches, anchors))
            matches.append(match.to(costs[0].device, non_blocking=True))
        return matches

    def pair_cost(self, group: PatchGroup) -> Tensor:
        """Computes the matching cost (B, P, A, M) of every anchor and object of a patch."""
        cost = self.cost
        boxes, gt = group.raw[..., None, :4], group.targets.boxes_cxcywh[..., None, :, :]
        location = focal_cost(group.raw[..., 4], cost.alpha, cost.gamma)[..., None]
        l1 = sum((boxes[..., i] - gt[..., i]).abs() for i in range(4))
        giou = box_giou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(gt))
        total = cost.class_weight * location + cost.l1_weight * l1 - cost.giou_weight * giou
        return self._area(group, gt) * total

    def _area(self, group: PatchGroup, gt_cxcywh: Tensor) -> Tensor:
        share = gt_cxcywh[..., 2] * gt_cxcywh[..., 3]
        return weigh_area(share, self.cost.area_weight, large=group.large)

    def terms(self, group: PatchGroup, match: Tensor) -> dict[str, Tensor]:
        """Computes the unweighted losses, summed over the group's anchors, 0-d each."""
        matched = (match >= 0) & group.valid[..., None]  # (B, P, A)
        index = match.clamp(min=0)[..., None].expand(*match.shape, 4)
        gt = group.targets.boxes_cxcywh.gather(2, index)  # (B, P, A, 4)
        boxes, logit = group.raw[..., :4], group.raw[..., 4]
        corners = cxcywh_to_xyxy(boxes)
        with torch.no_grad():
            iou = box_iou(corners, cxcywh_to_xyxy(gt))
            area = self._area(group, gt) * matched
            weight = area * self.query_weights.positive(logit.sigmoid(), iou)
            negative = self._negatives(group, corners.detach(), matched)
        # Quality focal loss (Li et al., NeurIPS 2020): the IoU is the label.
        quality = F.binary_cross_entropy_with_logits(logit, iou, reduction="none")
        quality = quality * (iou - logit.sigmoid()).abs().pow(self.focal_gamma)
        background = F.softplus(logit) * logit.sigmoid().pow(self.focal_gamma)
        giou = box_giou(corners, cxcywh_to_xyxy(gt))
        return {
            "ce": (area * quality).sum() + (negative * background).sum(),
            "bbox": (weight * (boxes - gt).abs().sum(dim=-1)).sum(),
            "giou": (weight * (1 - giou)).sum(),
        }

    @staticmethod
    def _negatives(group: PatchGroup, corners: Tensor, matched: Tensor) -> Tensor:
        """Returns a mask (B, P, A) of unmatched anchors with low IoU to all objects."""
        gt = cxcywh_to_xyxy(group.targets.boxes_cxcywh)
        overlap = box_iou(corners[..., None, :], gt[..., None, :, :])  # (B, P, A, M)
        best = (overlap * group.targets.valid[..., None, :]).amax(dim=-1)
        return ~matched & group.valid[..., None] & (best < IGNORED_IOU)


def solve_patches(cost: np.ndarray, usable: np.ndarray) -> np.ndarray:
    """Solves the one-to-one assignment of minimum cost in each patch.

    Args:
        cost: (Q, A, M).
        usable: (Q, M) bool mask of the objects that belong to the patch.

    Returns:
        (Q, A) int64 index of the object of each anchor, or -1.

    Raises:
        NonFiniteCostError: a cost is NaN or infinite.
    """
    match = np.full(cost.shape[:2], -1, dtype=np.int64)
    for q in np.flatnonzero(usable.any(axis=1)):
        objects = np.flatnonzero(usable[q])
        problem = cost[q][:, objects]
        if not np.isfinite(problem).all():
            raise NonFiniteCostError(
                f"{int((~np.isfinite(problem)).sum())} of {problem.size} matching costs of the "
                "anchors of a patch are NaN or infinite. The predictions diverged: lower "
                "SOLVER.BASE_LR or keep gradient clipping on."
            )
        anchors, chosen = linear_sum_assignment(problem)
        match[q, anchors] = objects[chosen]
    return match
