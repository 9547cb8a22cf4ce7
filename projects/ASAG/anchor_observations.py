"""Intermediate results of ASAG for one image, and statistics of a data set.

N anchors, M objects, P patches, C channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from asag.evaluation.recall import average_recall, matched_overlaps
from asag.modeling import SparseDetector
from asag.modeling.layers.boxes import cxcywh_to_xyxy
from asag.modeling.proposal_generator import AdaptiveSparseAnchors
from asag.structures import ImageSizes

import numpy as np
import torch
from torch import Tensor

Sample = dict[str, Any]
COARSEST = 5  # the level that is always used


@dataclass
class Observation:
    """Intermediate results for one image; boxes are xyxy in pixels of the network input.

    Attributes:
        image_rgb: (H, W, 3) uint8, the network input.
        objects: (M, 4) ground truth.
        anchors: (N, 4), in descending order of score.
        proposals: (N, 4) output of the proposal block for the anchors.
        detections: (k, 4) final boxes above the score threshold.
        patches: probed level -> (P, 4).
        maps: feature name -> (h, w) discriminability: the norm of each cell's features.
    """

    image_rgb: np.ndarray
    objects: Tensor
    anchors: Tensor
    proposals: Tensor
    detections: Tensor
    patches: dict[int, Tensor]
    maps: dict[str, Tensor]

    @property
    def finest_level(self) -> int:
        """The finest level with anchors: 5 without probing, else 4 or 3."""
        return min((x for x, boxes in self.patches.items() if len(boxes)), default=COARSEST)


def check_model(model: SparseDetector) -> None:
    """Raises ValueError if the detector has no adaptive anchors."""
    if not isinstance(model.proposal_generator, AdaptiveSparseAnchors):
        raise ValueError(
            "MODEL.PROPOSAL_GENERATOR.NAME must be 'AdaptiveSparseAnchors' for these figures, got "
            f"{type(model.proposal_generator).__name__!r}"
        )


@torch.no_grad()
def observe(model: SparseDetector, sample: Sample, threshold: float = 0.3) -> Observation:
    """Runs the detector on one image.

    Args:
        model: in evaluation mode, with adaptive anchors.
        sample: of the data mapper, with objects if it has any.
        threshold: score above which a detection is final.
    """
    generator = model.proposal_generator
    images = model.preprocess_images([sample])
    sizes = ImageSizes.from_images(images)
    features = model.backbone(images.tensor)
    if model.neck is not None:
        features = model.neck(features, sizes)
    generated = generator.generate(features, sizes)
    queries, _ = generator(features, sizes)
    answer = model.roi_heads(features, queries, sizes)
    valid = generated.anchors.valid[0]
    confident = (answer.logits[-1, 0].sigmoid().amax(dim=-1) > threshold) & queries.valid[0]
    objects = sample["instances"].gt_boxes.tensor if "instances" in sample else torch.empty(0, 4)
    return Observation(
        image_rgb=_pixels(model, sample),
        objects=objects.float(),
        anchors=cxcywh_to_xyxy(generated.anchors.boxes_cxcywh)[0, valid].cpu(),
        proposals=queries.boxes_xyxy[0, queries.valid[0]].cpu(),
        detections=answer.boxes_xyxy[-1, 0, confident].cpu(),
        patches={
            x.level: _patch_boxes(x.corner[0, x.valid[0]], x.side, x.stride)
            for x in generated.probed
        },
        maps={name: _stand_out(x[0], sizes) for name, x in features.items()},
    )


def _stand_out(features: Tensor, sizes: ImageSizes) -> Tensor:
    """Returns the norms of the cells of a map (C, h, w) that belong to the image."""
    rows, columns = (
        -(-side * cells // padded)
        for side, cells, padded in zip(
            sizes.hw[0], features.shape[1:], sizes.padded_hw, strict=True
        )
    )
    return features[:, :rows, :columns].norm(dim=0).cpu()


def _patch_boxes(corner: Tensor, side: int, stride: int) -> Tensor:
    low = corner.cpu().float() * stride
    return torch.cat((low, low + side * stride), dim=1)


def _pixels(model: SparseDetector, sample: Sample) -> np.ndarray:
    pixels = sample["image"].permute(1, 2, 0).numpy().astype(np.uint8)
    return pixels[..., ::-1] if model.input_format == "BGR" else pixels


@dataclass
class Statistics:
    """Figures of a data set (Fig. 6 and Table 5e).

    Attributes:
        objects, anchors: of every image.
        finest_level: of every image.
        patches: of every image, level -> number.
        anchor_recall, proposal_recall: AR over IoU 0.50 to 0.95 in percent.
    """

    objects: list[int]
    anchors: list[int]
    finest_level: list[int]
    patches: list[dict[int, int]]
    anchor_recall: float
    proposal_recall: float

    def correlation(self) -> float:
        """Pearson correlation of the numbers of objects and anchors; NaN if one is constant."""
        if min(np.std(self.objects), np.std(self.anchors)) == 0:
            return float("nan")
        return float(np.corrcoef(self.objects, self.anchors)[0, 1])

    def summary(self) -> dict[str, float]:
        """Returns the numbers of the paper's tables: #An, N_P4, N_P3, AR, shares of the levels."""
        images = max(len(self.anchors), 1)
        numbers = {
            "images": len(self.anchors),
            "anchors": sum(self.anchors) / images,
            "patches_p4": sum(x.get(4, 0) for x in self.patches) / images,
            "patches_p3": sum(x.get(3, 0) for x in self.patches) / images,
            "correlation": self.correlation(),
            "AR_anchors": self.anchor_recall,
            "AR_proposals": self.proposal_recall,
        }
        shares = {f"share_p{k}": self.finest_level.count(k) / images for k in (5, 4, 3)}
        return numbers | shares


def collect(observations: Iterable[Observation], limit: int = 1000) -> Statistics:
    """Collects statistics of many images, with at most `limit` boxes for each image."""
    result = Statistics([], [], [], [], float("nan"), float("nan"))
    overlaps: tuple[list[float], list[float]] = ([], [])
    for x in observations:
        result.objects.append(len(x.objects))
        result.anchors.append(len(x.anchors))
        result.finest_level.append(x.finest_level)
        result.patches.append({level: len(boxes) for level, boxes in x.patches.items()})
        for values, boxes in zip(overlaps, (x.anchors, x.proposals), strict=True):
            values += matched_overlaps(boxes[:limit], x.objects).tolist()
    result.anchor_recall, result.proposal_recall = map(average_recall, overlaps)
    return result


def normalized(maps: Sequence[Tensor]) -> list[Tensor]:
    """Rescales each map to the range 0 to 1."""
    return [(x - x.min()) / (x.max() - x.min()).clamp(min=1e-6) for x in maps]
