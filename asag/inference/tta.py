"""Test-time augmentation for box detectors: several sizes and flips of an image, one answer.

A augmented copies of an image, D detections of all copies together, L leaders of clusters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling.test_time_augmentation import DatasetMapperTTA
from detectron2.structures import Boxes, Instances
from fvcore.transforms.transform import TransformList
from torch import Tensor, nn
from torchvision.ops import batched_nms, nms

from ..config.rules import check_section
from ..data.image_io import read_image
from ..modeling.layers.boxes import box_area, box_iou

Detections = tuple[Tensor, Tensor, Tensor]
"""Boxes (D, 4) xyxy, scores (D,), classes (D,)."""


class DetectorWithTTA(nn.Module):
    """Wraps a detector: same call, same answer format, each image seen in several versions.

    What Detectron2's `GeneralizedRCNNWithTTA` does for its own R-CNNs, and built like it:
    `DetectorWithTTA(cfg, model)`. Inputs need no mapper: a dict with a file name is enough. An
    image that was resized before is enlarged again for the larger sizes, so give the original.
    """

    @configurable
    def __init__(
        self,
        *,
        model: nn.Module,
        augment: Callable[[dict[str, Any]], list[dict[str, Any]]],
        merge: Callable[[Detections], Detections],
        top_k: int,
        size_ranges: Sequence[tuple[float, float]] = (),
        batch_size: int = 2,
        input_format: str = "RGB",
    ) -> None:
        """
        Args:
            model: Detectron2 inputs -> list of `{"instances": Instances}`; used in evaluation mode.
            augment: input dict -> A dicts with `image` and `transforms`, as `DatasetMapperTTA`.
            merge: all detections of an image -> the ones to keep.
            top_k: detections an image.
            size_ranges: for each copy, the open range of sqrt(box area) in pixels of that copy that
                is believed; empty believes all boxes.
            batch_size: copies that go through the model together.
            input_format: color order for images that are read from their file.
        """
        super().__init__()
        self.model = model
        self.augment = augment
        self.merge = merge
        self.top_k = top_k
        self.size_ranges = tuple(size_ranges)
        self.batch_size = batch_size
        self.input_format = input_format
        # Whoever changes the mode of the wrapper and restores it restores the model's.
        self.train(model.training)

    @classmethod
    def from_config(cls, cfg: CfgNode, model: nn.Module) -> dict[str, Any]:
        check_test_augmentation(cfg)
        aug = cfg.TEST.AUG

        def merge(found: Detections) -> Detections:
            if aug.MERGE == "nms":
                return merge_by_nms(found, aug.MERGE_IOU)
            return merge_by_vote(found, aug.MERGE_IOU, aug.MIN_SCORE)

        copies = 2 if aug.FLIP else 1  # DatasetMapperTTA gives each size once plain, once flipped
        return {
            "model": getattr(model, "module", model),  # out of DistributedDataParallel
            "augment": DatasetMapperTTA(cfg),
            "merge": merge,
            "top_k": cfg.TEST.DETECTIONS_PER_IMAGE,
            "size_ranges": [pair for pair in aug.SIZE_RANGES for _ in range(copies)],
            "batch_size": aug.BATCH_SIZE,
            "input_format": cfg.INPUT.FORMAT,
        }

    @torch.no_grad()
    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Instances]]:
        """
        Args:
            batched_inputs: dicts with `image` (3, H, W) or `file_name`, and optionally `height` and
                `width` of the wanted output.

        Returns:
            One `{"instances": Instances}` an input, in the wanted resolution, best score first.

        Raises:
            RuntimeError: the model is in training mode.
        """
        if self.model.training:
            raise RuntimeError("test-time augmentation needs a model in evaluation mode: .eval()")
        return [{"instances": self._detect(self._read(x))} for x in batched_inputs]

    def _read(self, x: dict[str, Any]) -> dict[str, Any]:
        x = copy.copy(x)
        if "image" not in x:
            pixels = read_image(x["file_name"], self.input_format)
            x["image"] = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
        x["image"] = x["image"].cpu()
        x.setdefault("height", x["image"].shape[1])
        x.setdefault("width", x["image"].shape[2])
        return x

    def _detect(self, x: dict[str, Any]) -> Instances:
        size = (x["height"], x["width"])
        augmented = self.augment({key: x[key] for key in ("image", "height", "width")})
        found = []
        for start in range(0, len(augmented), self.batch_size):
            batch = augmented[start : start + self.batch_size]
            outputs = self.model([{"image": a["image"]} for a in batch])
            for i, (a, output) in enumerate(zip(batch, outputs, strict=True), start):
                believed = self._believed(output["instances"], i)
                found.append(_in_original(believed, a["transforms"]))
        boxes, scores, classes = self.merge(tuple(torch.cat(x) for x in zip(*found, strict=True)))
        scores, best = scores.topk(min(self.top_k, len(scores)))
        result = Instances(size, pred_boxes=Boxes(boxes[best]), scores=scores)
        result.pred_classes = classes[best]
        result.pred_boxes.clip(size)
        return result[result.pred_boxes.nonempty()]

    def _believed(self, found: Instances, index: int) -> Instances:
        """Drops boxes of a size that the copy of this index is not trusted with."""
        if not self.size_ranges:
            return found
        low, high = self.size_ranges[index]
        area = box_area(found.pred_boxes.tensor)
        return found[(area > low**2) & (area < high**2)]


def check_test_augmentation(cfg: CfgNode) -> None:
    """Raises ValueError that names the first of the keys TEST.AUG.* that do not fit together."""
    check_section(cfg, "TEST.AUG")
    aug = cfg.TEST.AUG
    pairs = all(isinstance(x, list | tuple) and len(x) == 2 for x in aug.SIZE_RANGES)
    if len(aug.SIZE_RANGES) not in (0, len(aug.MIN_SIZES)) or not pairs:
        raise ValueError(
            f"TEST.AUG.SIZE_RANGES is {aug.SIZE_RANGES}; it must be (), or one (low, high) for "
            f"each of the {len(aug.MIN_SIZES)} TEST.AUG.MIN_SIZES"
        )


def _in_original(found: Instances, transforms: TransformList) -> Detections:
    """Detections of an augmented copy in pixels of the wanted output."""
    boxes = found.pred_boxes.tensor
    if len(boxes):
        inverted = transforms.inverse().apply_box(boxes.cpu().numpy())
        boxes = torch.as_tensor(inverted, dtype=boxes.dtype).to(boxes.device)
    return boxes, found.scores, found.pred_classes


def merge_by_nms(found: Detections, iou_threshold: float) -> Detections:
    """Class-wise non-maximum suppression: of boxes that overlap more, the best-scored stays."""
    boxes, scores, classes = found
    keep = batched_nms(boxes, scores, classes, iou_threshold)
    return boxes[keep], scores[keep], classes[keep]


def merge_by_vote(found: Detections, iou_threshold: float, min_score: float) -> Detections:
    """Clusters of each class answer with their average, and once more with their members.

    A cluster is the best-scored box that is left and all of its class that overlap it by
    `iou_threshold`. It yields the mean of its boxes weighted by score, with the best score; and
    every member as it is, its score times (1 - IoU with the best box), if that is `min_score` at
    least: objects that stand close together are lowered, not lost.

    Returns:
        Detections in no particular order.
    """
    boxes, scores, classes = found
    parts = []
    # By class, because the overlaps of all boxes at once would be a matrix of gigabytes.
    for label in classes.unique():
        chosen = classes == label
        merged = _vote(boxes[chosen], scores[chosen], iou_threshold, min_score)
        parts.append((*merged, label.expand(len(merged[1]))))
    if not parts:
        return found
    merged_boxes, merged_scores, merged_classes = (torch.cat(x) for x in zip(*parts, strict=True))
    return merged_boxes, merged_scores, merged_classes


def _vote(
    boxes: Tensor, scores: Tensor, iou_threshold: float, min_score: float
) -> tuple[Tensor, Tensor]:
    """`merge_by_vote` for boxes (D, 4) and scores (D,) of one class."""
    leaders = nms(boxes, scores, iou_threshold)  # (L,) best first
    overlap = box_iou(boxes[leaders][:, None], boxes[None])  # (L, D)
    # A box belongs to the first leader that reaches it, which is the greedy clustering. A leader
    # reaches itself first; rounding at the threshold may leave a box to its nearest leader.
    reached = overlap >= iou_threshold
    owner = torch.where(reached.any(dim=0), reached.int().argmax(dim=0), overlap.argmax(dim=0))
    owner[leaders] = torch.arange(len(leaders), device=owner.device)
    weight = torch.zeros_like(boxes[leaders]).index_add_(
        0, owner, scores[:, None].expand(-1, 4).contiguous()
    )
    total = torch.zeros_like(boxes[leaders]).index_add_(0, owner, boxes * scores[:, None])
    # Scores of zero have no say, and no weight to be divided by.
    mean = torch.where(weight > 0, total / weight.clamp(min=1e-12), boxes[leaders])
    again = scores * (1 - overlap[owner, torch.arange(len(boxes), device=owner.device)])
    kept = again >= min_score
    kept[leaders] = False
    return torch.cat((mean, boxes[kept])), torch.cat((scores[leaders], again[kept]))
