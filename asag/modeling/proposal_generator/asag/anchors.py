"""Adaptive anchor generation: fixed part, Adaptive Probing, replacement, assembly.

ASAG (Fu et al., ICCV 2023), Section 3.2, with details of the authors' code. B images, A anchors, P
patches, N anchors of an image in the end. Boxes are cxcywh in pixels of the unpadded image.

Patches and anchors are padded to common numbers of slots and masked by `valid`. With fixed
capacities all shapes are known beforehand and no synchronization is needed; otherwise the number of
slots is that of the fullest image. Both compute the same anchors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .network import AnchorNetwork
from .patches import centered_corners, greedy_nms

LEVELS = (4, 3)  # pyramid levels that may be probed, in this order


@dataclass(frozen=True)
class ProbingRules:
    """Thresholds and limits of the generator, with the paper's symbols.

    Attributes:
        eta_f: anchors with a higher score are kept (a negative value keeps all).
        eta_l, eta_h: anchors with a score between them are probed.
        eta_iou: IoU threshold of the NMS on patches.
        min_anchors: smallest number of anchors of an image from the fixed part.
        max_anchors: largest number of anchors of an image, by score.
        min_side: anchors with a smaller side score 0, in pixels.
        finest_level: 3 probes P4 and P3, 4 only P4, 5 neither.
        min_selected: an image with fewer selected anchors is not probed further (fast: 3).
        max_patches: largest number of patches an image and level, 0 is no limit (fast: 15).
        replace: replace selected anchors by the predictions of their patches.
    """

    eta_f: float = 0.1
    eta_l: float = 0.1
    eta_h: float = 0.7
    eta_iou: float = 0.25
    min_anchors: int = 5
    max_anchors: int = 200
    min_side: float = 3.0
    finest_level: int = 3
    min_selected: int = 1
    max_patches: int = 0
    replace: bool = True

    def __post_init__(self) -> None:
        if self.min_anchors > self.max_anchors:
            raise ValueError(
                f"MODEL.ASAG.MIN_ANCHORS is {self.min_anchors}; it must be at most "
                f"MODEL.ASAG.MAX_ANCHORS ({self.max_anchors})"
            )


@dataclass
class Anchors:
    """Padded anchors of every image.

    Attributes:
        boxes_cxcywh: (B, A, 4) pixels.
        scores: (B, A) location scores, 0 to 1.
        valid: (B, A) bool.
    """

    boxes_cxcywh: Tensor
    scores: Tensor
    valid: Tensor

    def where(self, mask: Tensor) -> Anchors:
        """Returns the same slots, valid only where `mask` (B, A) is True as well."""
        return Anchors(self.boxes_cxcywh, self.scores, self.valid & mask)


@dataclass
class ProbedPatches:
    """Patches of one level and their predictions.

    Attributes:
        level: 4 or 3.
        side: cells of a patch's side.
        corner: (B, P, 2) int64 cells.
        valid: (B, P) bool.
        forward: (B, P) bool mask of patches whose anchors become queries.
        raw: (B, P, A, 5), boxes relative to the patch and location logits.
        num_selected: (B,) int64 number of selected anchors before the NMS.
        kind: (B, P) int64, see `training_patches.PatchKind`; generated patches are 0.
    """

    level: int
    side: int
    corner: Tensor
    valid: Tensor
    forward: Tensor
    raw: Tensor
    num_selected: Tensor
    kind: Tensor

    @property
    def stride(self) -> int:
        """Pixels a cell."""
        return 2**self.level


@dataclass
class GeneratedAnchors:
    """Anchors of a batch, and the raw predictions for their losses.

    Attributes:
        anchors: (B, N), the best first, padding last; padding slots hold the whole image.
        p6: (B, 1 or 4, A, 5) raw predictions of the whole image (in training also flipped).
        p5: (B, 4, A, 5) raw predictions of the quadrants.
        probed: patches of each probed level.
    """

    anchors: Anchors
    p6: Tensor
    p5: Tensor
    probed: list[ProbedPatches]


Completion = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]
"""(stride, corner, valid) of generated patches -> corner, valid, forward, kind of all patches."""


class AdaptiveAnchorGenerator(nn.Module):
    """Generates a variable number of anchors an image from its features."""

    def __init__(
        self,
        *,
        network: AnchorNetwork,
        rules: ProbingRules,
        inference_rules: ProbingRules | None = None,
        patch_capacity: int = 0,
        anchor_capacity: int = 0,
    ) -> None:
        """
        Args:
            network: predicts anchors from patches.
            rules: thresholds and limits.
            inference_rules: rules of inference; None uses `rules`.
            patch_capacity: patch slots an image and level; 0 is that of the fullest image.
            anchor_capacity: anchor slots an image; 0 is that of the fullest image.

        Raises:
            ValueError: only one of the capacities is positive.
        """
        super().__init__()
        if bool(patch_capacity) != bool(anchor_capacity):
            raise ValueError(
                f"MODEL.ASAG.PATCH_CAPACITY is {patch_capacity} and MODEL.ASAG.ANCHOR_CAPACITY is "
                f"{anchor_capacity}; they must be both 0 (sizes follow the data) or both positive "
                "(fixed sizes)"
            )
        self.network = network
        self.rules = rules
        self.inference_rules = inference_rules or rules
        self.patch_capacity = patch_capacity
        self.anchor_capacity = anchor_capacity

    @property
    def static(self) -> bool:
        """True if all shapes are fixed, so that no synchronization is needed."""
        return self.patch_capacity > 0

    def forward(
        self,
        maps: Sequence[Tensor],
        whwh: Tensor,
        completion: Completion | None = None,
        probing: Tensor | None = None,
    ) -> GeneratedAnchors:
        """Generates the anchors.

        Args:
            maps: P3, P4, P5, each (B, C, H, W).
            whwh: (B, 4) sizes of the unpadded images.
            completion: adds training patches to the generated ones of a level; None in inference.
            probing: 0-d bool, False disables probing (start of training); None is True.
        """
        rules = self.inference_rules if completion is None else self.rules
        p6, p5 = self.network.fixed(maps[2], whwh, flips=completion is not None)
        current = fixed_anchors(p5, p6[:, :1], whwh, rules.min_side)
        settled: list[Anchors] = []
        probed: list[ProbedPatches] = []
        for level in LEVELS:
            if level < rules.finest_level:
                break
            selected = select(current, self.network.side / 2 * 2**level, rules)
            if probing is not None:
                selected = selected & probing
            if completion is None and not self.static and not bool(selected.any()):
                break
            leaving = current.where(~selected) if rules.replace else current
            settled.append(settle(leaving, current, rules, first=not probed))
            patches = self.probe(maps[level - 3], current, selected, whwh, level, rules, completion)
            probed.append(patches)
            current = probed_anchors(patches, whwh, rules.min_side)
        settled.append(settle(current, current, rules, first=not probed))
        anchors = self.assemble(settled, whwh, rules.max_anchors)
        return GeneratedAnchors(anchors, p6, p5, probed)

    def probe(
        self,
        features: Tensor,
        current: Anchors,
        selected: Tensor,
        whwh: Tensor,
        level: int,
        rules: ProbingRules,
        completion: Completion | None,
    ) -> ProbedPatches:
        """Adaptive Probing: predicts anchors in patches around selected anchors.

        NMS on the patches precedes moving them inside the image.
        """
        stride = 2**level
        center, extent = current.boxes_cxcywh[..., :2], float(self.network.side * stride)
        squares = torch.cat((center - extent / 2, center + extent / 2), dim=-1)
        limits = [x for x in (rules.max_patches, self.patch_capacity) if x]
        index, valid = greedy_nms(
            squares.detach(),
            current.scores,
            selected,
            iou_threshold=rules.eta_iou,
            limit=min(limits, default=None),
            static=self.static,
        )
        picked = center.gather(1, index[..., None].expand(-1, -1, 2))
        corner = centered_corners(picked, whwh, stride, self.network.side)
        forward, kind = valid, torch.zeros_like(index)
        if completion is not None:
            corner, valid, forward, kind = completion(stride, corner, valid)
        raw = self.network.probe(self.network.compress[level - 3](features), corner, level)
        count = selected.sum(dim=1)
        return ProbedPatches(level, self.network.side, corner, valid, forward, raw, count, kind)

    def assemble(self, settled: list[Anchors], whwh: Tensor, max_anchors: int) -> Anchors:
        """Returns the best `max_anchors` anchors of all levels, best first, padding last."""
        boxes = torch.cat([x.boxes_cxcywh for x in settled], dim=1)
        scores = torch.cat([x.scores for x in settled], dim=1)
        valid = torch.cat([x.valid for x in settled], dim=1)
        slots = min(max_anchors, boxes.shape[1])
        if self.static:
            slots = min(slots, self.anchor_capacity)
        else:
            slots = min(slots, max(1, int(valid.sum(dim=1).max())))
        # Stable, so that the order of equal scores (useless anchors all have 0) does not depend on
        # the padding between them.
        scores, index = scores.masked_fill(~valid, -1).sort(dim=1, descending=True, stable=True)
        scores, index = scores[:, :slots], index[:, :slots]
        valid = scores >= 0
        boxes = boxes.gather(1, index[..., None].expand(-1, -1, 4))
        whole_image = torch.cat((whwh[:, :2] / 2, whwh[:, 2:]), dim=1)[:, None]
        boxes = torch.where(valid[..., None], boxes, whole_image)
        return Anchors(boxes, scores.clamp(min=0), valid)


def select(anchors: Anchors, largest: float, rules: ProbingRules) -> Tensor:
    """Returns a mask (B, A) of the anchors to probe: uncertain ones with sides below `largest`
    pixels, which fit a patch of the next level."""
    selected = (
        anchors.valid
        & (anchors.scores > rules.eta_l)
        & (anchors.scores < rules.eta_h)
        & (anchors.boxes_cxcywh[..., 2:] < largest).all(dim=-1)
    )
    return selected & (selected.sum(dim=1, keepdim=True) >= rules.min_selected)


def settle(leaving: Anchors, level: Anchors, rules: ProbingRules, first: bool) -> Anchors:
    """Returns the final anchors of a level: those of `leaving` with scores above eta_f, and for the
    `first` level at least the min_anchors best of `level`."""
    final = leaving.where(leaving.scores > rules.eta_f)
    if not first or not rules.min_anchors:
        return final
    best = level.scores.topk(min(rules.min_anchors, level.scores.shape[1]), dim=1).indices
    fallback = torch.zeros_like(level.valid).scatter(1, best, 1)
    enough = final.valid.sum(dim=1, keepdim=True) >= rules.min_anchors
    # Logical operators instead of torch.where, which onnxruntime does not support for bool.
    valid = (final.valid & enough) | (fallback & ~enough)
    return Anchors(final.boxes_cxcywh, final.scores, valid)


@torch.no_grad()
def fixed_anchors(p5: Tensor, p6: Tensor, whwh: Tensor, min_side: float) -> Anchors:
    """Converts the raw predictions of the quadrants (B, 4, A, 5) and of the whole image
    (B, 1, A, 5) to anchors (B, 5 A), in that order."""
    offset = p5.new_zeros(4, 1, 4)
    offset[1::2, :, 0] = 0.5
    offset[2:, :, 1] = 0.5
    relative = torch.cat((p5[..., :4] / 2 + offset, p6[..., :4]), dim=1).flatten(1, 2)
    logits = torch.cat((p5[..., 4], p6[..., 4]), dim=1).flatten(1)
    boxes = relative * whwh[:, None]
    small = (boxes[..., 2:] < min_side).any(dim=-1)
    scores = logits.sigmoid().masked_fill(small, 0)
    return Anchors(boxes, scores, torch.ones_like(small))


@torch.no_grad()
def probed_anchors(patches: ProbedPatches, whwh: Tensor, min_side: float) -> Anchors:
    """Converts the raw predictions of probed patches (B, P, A, 5) to anchors (B, P A)."""
    stride, raw = patches.stride, patches.raw
    center = (raw[..., :2] * patches.side + patches.corner[:, :, None]) * stride
    size = raw[..., 2:4] * (patches.side * stride)
    useless = (center >= whwh[:, None, None, :2]).any(dim=-1) | (size < min_side).any(dim=-1)
    scores = raw[..., 4].sigmoid().masked_fill(useless, 0)
    valid = (patches.valid & patches.forward)[..., None].expand_as(useless)
    boxes = torch.cat((center, size), dim=-1)
    return Anchors(boxes.flatten(1, 2), scores.flatten(1), valid.flatten(1))
