"""Test-time augmentation for box detectors: several sizes and flips of an image.

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
    """Detector that runs a model on several augmented copies of each image and merges the results.

    The counterpart of Detectron2's `GeneralizedRCNNWithTTA`, created like it by
    `DetectorWithTTA(cfg, model)`, with the inputs and outputs of the model. Inputs need no mapper:
    a dict with a file name is enough. Pass original images, not resized ones.
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
            augment: input dict -> A dicts with `image` and `transforms`, like `DatasetMapperTTA`.
            merge: detections of all copies -> detections of the image.
            top_k: detections an image.
            size_ranges: for each copy, the open range of sqrt(box area), in pixels of that copy, of
                boxes that are kept; empty keeps all boxes.
            batch_size: copies in one batch.
            input_format: color order of images that are read from files.
        """
        super().__init__()
        self.model = model
        self.augment = augment
        self.merge = merge
        self.top_k = top_k
        self.size_ranges = tuple(size_ranges)
        self.batch_size = batch_size
        self.input_format = input_format
        # Evaluators change the mode of the wrapper and restore it, and with it the model's.
        self.train(model.training)

    @classmethod
    def from_config(cls, cfg: CfgNode, model: nn.Module) -> dict[str, Any]:
        check_test_augmentation(cfg)
        aug = cfg.TEST.AUG

        def merge(detections: Detections) -> Detections:
            if aug.MERGE == "nms":
                return merge_by_nms(detections, aug.MERGE_IOU)
            return merge_by_vote(detections, aug.MERGE_IOU, aug.MIN_SCORE)

        copies = 2 if aug.FLIP else 1  # of each size, as DatasetMapperTTA makes them
        return {
            "model": getattr(model, "module", model),  # unwrap DistributedDataParallel
            "augment": DatasetMapperTTA(cfg),
            "merge": merge,
            "top_k": cfg.TEST.DETECTIONS_PER_IMAGE,
            "size_ranges": [pair for pair in aug.SIZE_RANGES for _ in range(copies)],
            "batch_size": aug.BATCH_SIZE,
            "input_format": cfg.INPUT.FORMAT,
        }

    @torch.no_grad()
    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Instances]]:
        """Detects objects in each image.

        Args:
            batched_inputs: dicts with `image` (3, H, W) or `file_name`, and optionally `height` and
                `width` of the requested output.

        Returns:
            One `{"instances": Instances}` an input, in the requested resolution, best score first.

        Raises:
            RuntimeError: the model is in training mode.
        """
        if self.model.training:
            raise RuntimeError(
                "the model is in training mode; test-time augmentation needs evaluation mode: call "
                ".eval()"
            )
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
        parts = []
        for start in range(0, len(augmented), self.batch_size):
            batch = augmented[start : start + self.batch_size]
            outputs = self.model([{"image": a["image"]} for a in batch])
            for i, (a, output) in enumerate(zip(batch, outputs, strict=True), start):
                kept = self._in_size_range(output["instances"], i)
                parts.append(_invert_transforms(kept, a["transforms"]))
        boxes, scores, classes = self.merge(tuple(torch.cat(x) for x in zip(*parts, strict=True)))
        scores, best = scores.topk(min(self.top_k, len(scores)))
        result = Instances(size, pred_boxes=Boxes(boxes[best]), scores=scores)
        result.pred_classes = classes[best]
        if not self.clip_boxes:
            return result
        result.pred_boxes.clip(size)
        return result[result.pred_boxes.nonempty()]

    @property
    def clip_boxes(self) -> bool:
        """True if detections are clipped to the image, as the model's own are."""
        return getattr(self.model, "clip_boxes", True)

    def _in_size_range(self, instances: Instances, index: int) -> Instances:
        """Drops boxes outside of the size range of the copy `index`."""
        if not self.size_ranges:
            return instances
        low, high = self.size_ranges[index]
        area = box_area(instances.pred_boxes.tensor)
        return instances[(area > low**2) & (area < high**2)]


def check_test_augmentation(cfg: CfgNode) -> None:
    """Raises ValueError if a key TEST.AUG.* has a wrong value, or one that contradicts another."""
    check_section(cfg, "TEST.AUG")
    aug = cfg.TEST.AUG
    pairs = all(isinstance(x, list | tuple) and len(x) == 2 for x in aug.SIZE_RANGES)
    if len(aug.SIZE_RANGES) not in (0, len(aug.MIN_SIZES)) or not pairs:
        raise ValueError(
            f"TEST.AUG.SIZE_RANGES is {aug.SIZE_RANGES}; it must be (), or one (low, high) for "
            f"each of the {len(aug.MIN_SIZES)} TEST.AUG.MIN_SIZES"
        )


def _invert_transforms(instances: Instances, transforms: TransformList) -> Detections:
    """Maps the detections of an augmented copy to pixels of the requested output."""
    boxes = instances.pred_boxes.tensor
    if len(boxes):
        inverted = transforms.inverse().apply_box(boxes.cpu().numpy())
        boxes = torch.as_tensor(inverted, dtype=boxes.dtype).to(boxes.device)
    return boxes, instances.scores, instances.pred_classes


def merge_by_nms(detections: Detections, iou_threshold: float) -> Detections:
    """Merges detections by class-wise non-maximum suppression."""
    boxes, scores, classes = detections
    keep = batched_nms(boxes, scores, classes, iou_threshold)
    return boxes[keep], scores[keep], classes[keep]


def merge_by_vote(detections: Detections, iou_threshold: float, min_score: float) -> Detections:
    """Merges detections by box voting within clusters of each class.

    A cluster is the best-scored remaining box and all boxes of its class that overlap it by at
    least `iou_threshold`. It yields the mean of its boxes weighted by score, with the best score;
    and each member with its score multiplied by (1 - IoU with the best box), if that is at least
    `min_score`, so that objects close to each other are not lost.

    Returns:
        Detections in no particular order.
    """
    boxes, scores, classes = detections
    parts = []
    # By class: the overlaps of all boxes at once would be a matrix of gigabytes.
    for label in classes.unique():
        chosen = classes == label
        merged = _vote(boxes[chosen], scores[chosen], iou_threshold, min_score)
        parts.append((*merged, label.expand(len(merged[1]))))
    if not parts:
        return detections
    merged_boxes, merged_scores, merged_classes = (torch.cat(x) for x in zip(*parts, strict=True))
    return merged_boxes, merged_scores, merged_classes


def _vote(
    boxes: Tensor, scores: Tensor, iou_threshold: float, min_score: float
) -> tuple[Tensor, Tensor]:
    """Implements `merge_by_vote` for boxes (D, 4) and scores (D,) of one class."""
    leaders = nms(boxes, scores, iou_threshold)  # (L,) best first
    overlap = box_iou(boxes[leaders][:, None], boxes[None])  # (L, D)
    # Greedy clustering: a box belongs to the first leader that overlaps it enough. Because of
    # rounding at the threshold a box may have none; it then belongs to the nearest leader.
    reached = overlap >= iou_threshold
    owner = torch.where(reached.any(dim=0), reached.int().argmax(dim=0), overlap.argmax(dim=0))
    owner[leaders] = torch.arange(len(leaders), device=owner.device)
    weight = torch.zeros_like(boxes[leaders]).index_add_(
        0, owner, scores[:, None].expand(-1, 4).contiguous()
    )
    total = torch.zeros_like(boxes[leaders]).index_add_(0, owner, boxes * scores[:, None])
    # A cluster whose scores are all zero keeps the box of its leader.
    mean = torch.where(weight > 0, total / weight.clamp(min=1e-12), boxes[leaders])
    again = scores * (1 - overlap[owner, torch.arange(len(boxes), device=owner.device)])
    kept = again >= min_score
    kept[leaders] = False
    return torch.cat((mean, boxes[kept])), torch.cat((scores[leaders], again[kept]))
