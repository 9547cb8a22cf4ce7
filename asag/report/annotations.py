"""Ground truth of a data set as arrays, and its statistics.

m objects of an image, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from detectron2.structures import BoxMode

from ..data.coco_report import MEDIUM_AREA, SMALL_AREA

SIZES = ("small", "medium", "large")


@dataclass(frozen=True)
class GroundTruth:
    """Annotations of one image.

    Attributes:
        boxes_xyxy: (m, 4) float64, pixels of the original image.
        labels: (m,) int64, index of the class.
        ignored: (m,) bool, crowd regions and difficult objects; detections of them are not
            counted.
    """

    boxes_xyxy: np.ndarray
    labels: np.ndarray
    ignored: np.ndarray

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> GroundTruth:
        """Reads the annotations of one of Detectron2's dataset dicts."""
        annotations = entry.get("annotations", [])
        boxes = np.array([a["bbox"] for a in annotations], dtype=np.float64).reshape(-1, 4)
        modes = [BoxMode(a["bbox_mode"]) for a in annotations]
        for mode in {*modes} - {BoxMode.XYXY_ABS}:
            rows = [x is mode for x in modes]
            if mode is BoxMode.XYWH_ABS:  # the mode of COCO; a hundred times as fast as `convert`
                boxes[rows, 2:] += boxes[rows, :2]
            else:
                boxes[rows] = BoxMode.convert(boxes[rows], mode, BoxMode.XYXY_ABS)
        return cls(
            boxes,
            np.array([a["category_id"] for a in annotations], dtype=np.int64),
            np.array(
                [bool(a.get("iscrowd", 0) or a.get("difficult", 0)) for a in annotations],
                dtype=bool,
            ),
        )


@dataclass(frozen=True)
class DatasetSummary:
    """Counts of a data set.

    Attributes:
        images: number of images.
        empty: images without objects.
        ignored: crowd regions and difficult objects, which do not count as objects.
        fullest: objects in the fullest image.
        objects: (K, 3) int64, by class and by box area: small, medium, large by COCO's limits of
            32^2 and 96^2 square pixels of the original image.
        median_side: median square root of the box areas, pixels; NaN without objects.
    """

    images: int
    empty: int
    ignored: int
    fullest: int
    objects: np.ndarray
    median_side: float

    @classmethod
    def of(cls, gts: Sequence[GroundTruth], num_classes: int) -> DatasetSummary:
        """Counts the annotations of all images."""
        nothing = GroundTruth.of({})
        ignored = np.concatenate([t.ignored for t in (*gts, nothing)])
        boxes = np.concatenate([t.boxes_xyxy for t in (*gts, nothing)])[~ignored]
        labels = np.concatenate([t.labels for t in (*gts, nothing)])[~ignored]
        areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
        # Area ranges of COCO share their ends; an object on one counts for the smaller size.
        size = np.searchsorted((SMALL_AREA, MEDIUM_AREA), areas, side="left")
        counts = np.zeros((num_classes, len(SIZES)), dtype=np.int64)
        np.add.at(counts, (labels, size), 1)
        in_images = [int((~t.ignored).sum()) for t in gts]
        return cls(
            images=len(gts),
            empty=in_images.count(0),
            ignored=int(ignored.sum()),
            fullest=max(in_images, default=0),
            objects=counts,
            median_side=float(np.sqrt(np.median(areas))) if len(areas) else float("nan"),
        )
