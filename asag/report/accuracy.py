"""COCO metrics by class and size, and precision-recall curves, from a file of detections.

T IoU thresholds, R = 101 recall thresholds, K classes, A area ranges.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.coco import COCO

from ..evaluation.coco import evaluate_boxes

AREAS = ("all", "small", "medium", "large")  # in the order of COCO's evaluation


@dataclass(frozen=True)
class CocoAccuracy:
    """Interpolated precision of a detector at every recall.

    Attributes:
        precision: (T, R, K, A), 0 to 1; -1 where a class has no objects of that size. From
            the 100 best detections of an image and class.
        ious: (T,) 0.5 to 0.95.
        recalls: (R,) 0 to 1.
        class_names: K names.
    """

    precision: np.ndarray
    ious: np.ndarray
    recalls: np.ndarray
    class_names: tuple[str, ...]

    def ap(self, *, label: int | None = None, area: str = "all", iou: float | None = None) -> float:
        """Returns the average precision in percent; NaN if there are no objects.

        Args:
            label: index of the class; None is the mean of all.
            area: one of `AREAS`.
            iou: one of `ious`; None is their mean.
        """
        found = self._at(iou)[..., AREAS.index(area)]
        found = found if label is None else found[..., label]
        found = found[found > -1]
        return 100 * float(found.mean()) if found.size else float("nan")

    def curve(self, *, label: int | None = None, iou: float | None = None) -> np.ndarray:
        """Returns the precision at each of `recalls`, (R,) 0 to 1; NaN without objects.

        Arguments are those of `ap`. Classes without objects are left out of the mean.
        """
        found = self._at(iou)[..., 0]
        found = found if label is None else found[..., [label]]
        with_objects = found[0, 0] > -1  # (K,), the same for all thresholds
        if not with_objects.any():
            return np.full(len(self.recalls), np.nan)
        return found[..., with_objects].mean(axis=(0, 2))

    def _at(self, iou: float | None) -> np.ndarray:
        if iou is None:
            return self.precision
        return self.precision[[int(np.abs(self.ious - iou).argmin())]]


def read_detections(path: Path) -> list[dict[str, Any]]:
    """Reads a COCO result list.

    Raises:
        ValueError: the file is no such list.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON file ({error}); evaluate again") from error
    needed = {"image_id", "category_id", "bbox", "score"}
    rows = found if isinstance(found, list) else [None]
    if not all(isinstance(x, dict) and needed <= x.keys() for x in rows):
        raise ValueError(f"{path} is no list of detections ({', '.join(sorted(needed))})")
    return found


def coco_accuracy(
    json_file: Path,
    detections: Sequence[dict[str, Any]],
    *,
    class_names: Sequence[str],
    labels: Mapping[int, int],
) -> CocoAccuracy | None:
    """Evaluates detections with COCO's metrics.

    Args:
        json_file: annotations in COCO format.
        detections: see `read_detections`.
        class_names: K names.
        labels: category id -> index of the class.

    Returns:
        The accuracy; None without detections, which COCO's code cannot evaluate.
    """
    if not detections:
        return None
    with contextlib.redirect_stdout(io.StringIO()):
        gt = COCO(str(json_file))
    evaluation = evaluate_boxes(gt, detections)
    columns = [evaluation.params.catIds.index(i) for i in sorted(labels, key=labels.__getitem__)]
    return CocoAccuracy(
        precision=np.asarray(evaluation.eval["precision"])[..., -1][:, :, columns],
        ious=np.asarray(evaluation.params.iouThrs),
        recalls=np.asarray(evaluation.params.recThrs),
        class_names=tuple(class_names),
    )
