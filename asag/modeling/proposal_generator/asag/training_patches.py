"""Training patches, which are added to the generated ones up to a minimum for each image and level.

ASAG (Fu et al., ICCV 2023), Section 3.2 and the authors' code. B images, P patches, M padded ground
ground truths, G generated patches.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum

import torch
from torch import Tensor

from ....structures import Targets
from ...layers.boxes import xyxy_to_cxcywh
from .patches import greedy_nms, map_cells, pull_inside

Uniform = Callable[[tuple[int, ...], torch.device], Tensor]
"""(shape, device) -> independent draws from [0, 1)."""


class PatchKind(IntEnum):
    """Source of a training patch."""

    GENERATED = 0
    GROUND_TRUTH = 1
    RANDOM = 2


def draw_uniform(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Draws from torch's default generator of the device."""
    return torch.rand(shape, device=device)


class PatchCompletion:
    """Completes the patches of a level to a minimum: ground-truth patches first, then random ones.

    Added patches are used in the loss only; their anchors do not become queries. In the warm-up
    nothing is generated, *all* ground-truth patches are used, and their anchors become queries.
    """

    def __init__(
        self,
        targets: Targets,
        *,
        side: int = 15,
        minimum: int = 4,
        iou_threshold: float = 0.25,
        warmup: Tensor | None = None,
        capacity: int = 0,
        uniform: Uniform = draw_uniform,
    ) -> None:
        """
        Args:
            targets: padded ground truth.
            side: side of a patch in cells.
            minimum: smallest number of patches of an image in each level (N_TP).
            iou_threshold: of the NMS on ground-truth boxes.
            warmup: 0-d bool on the device, True during the warm-up; None is False.
            capacity: patch slots an image; 0 is that of the fullest image.
            uniform: source of randomness.
        """
        self.targets = targets
        self.side = side
        self.minimum = minimum
        self.iou_threshold = iou_threshold
        device = targets.valid.device
        self.warmup = torch.zeros((), dtype=torch.bool, device=device) if warmup is None else warmup
        self.capacity = capacity
        self.uniform = uniform

    def __call__(
        self, stride: int, corner: Tensor, valid: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Adds patches to the generated ones of a level.

        Args:
            stride: of the level.
            corner: (B, G, 2) int64 of the generated patches.
            valid: (B, G) bool.

        Returns:
            corner (B, P, 2), valid and forward (B, P) bool, and kind (B, P) int64 of all patches:
            generated, ground truth, random, then empty slots.
        """
        gt, gt_exists = self.ground_truth_patches(stride)
        generated = valid.sum(dim=1, keepdim=True)
        missing = (self.minimum - generated).clamp(min=0)
        gt_used = gt_exists & (self._shuffled_rank(gt_exists) < missing)
        gt_used = torch.where(self.warmup, gt_exists, gt_used)
        missing = missing - gt_used.sum(dim=1, keepdim=True)
        random = self.random_patches(stride)
        random_used = torch.arange(self.minimum, device=valid.device) < missing  # (B, minimum)
        used = torch.cat((valid, gt_used, random_used), dim=1)
        forward = torch.cat((valid, gt_used & self.warmup, torch.zeros_like(random_used)), dim=1)
        kind = torch.cat(
            [
                torch.full_like(mask, int(k), dtype=torch.long)
                for k, mask in zip(PatchKind, (valid, gt_used, random_used), strict=True)
            ],
            dim=1,
        )
        slots = self.capacity or max(1, int(used.sum(dim=1).max()))
        first = (~used).to(torch.uint8).argsort(dim=1, stable=True)[:, :slots]
        corner = torch.cat((corner, gt, random), dim=1)
        corner = corner.gather(1, first[..., None].expand(-1, -1, 2))
        return corner, used.gather(1, first), forward.gather(1, first), kind.gather(1, first)

    def ground_truth_patches(self, stride: int) -> tuple[Tensor, Tensor]:
        """Returns patches with a small object at a random position: corners (B, P, 2) and mask
        (B, P).

        The NMS prefers objects with many other objects nearby. Corners are whole cells, so an
        object may exceed its patch by less than a cell.
        """
        targets = self.targets
        boxes = xyxy_to_cxcywh(targets.boxes_xyxy)
        small = targets.valid & (boxes[..., 2:] < self.side / 2 * stride).all(dim=-1)
        offset = boxes[:, :, None, :2] - boxes[:, None, :, :2]  # (B, M, M, 2)
        distance = (offset.square().sum(dim=-1) * small[:, None]).sum(dim=-1)
        index, valid = greedy_nms(
            targets.boxes_xyxy,
            -distance,
            small,
            iou_threshold=self.iou_threshold,
            limit=min(self.capacity, small.shape[1]) if self.capacity else None,
            static=self.capacity > 0,
        )
        chosen = targets.boxes_xyxy.gather(1, index[..., None].expand(-1, -1, 4))
        corner = (chosen[..., :2] / stride).floor()
        corner = pull_inside(corner, map_cells(targets.image_whwh, stride), self.side)
        slack = (corner + self.side - chosen[..., 2:] / stride).clamp(min=0)
        shift = self.uniform(tuple(slack.shape), slack.device).to(slack.dtype) * slack
        return (corner - shift).floor().long().clamp(min=0), valid

    def random_patches(self, stride: int) -> Tensor:
        """Draws corners (B, minimum, 2), int64, uniformly over the image."""
        span = (map_cells(self.targets.image_whwh, stride) - self.side).clamp(min=1)  # (B, 1, 2)
        shape = (len(span), self.minimum, 2)
        # A draw next to 1 may round up to the excluded end.
        corner = (self.uniform(shape, span.device).to(span.dtype) * span).floor()
        return torch.minimum(corner, span - 1).long()

    def _shuffled_rank(self, exists: Tensor) -> Tensor:
        """Returns ranks (B, P), int64, in a random order with the slots that do not exist last."""
        key = self.uniform(tuple(exists.shape), exists.device).masked_fill(~exists, 2.0)
        return key.argsort(dim=1, stable=True).argsort(dim=1)
