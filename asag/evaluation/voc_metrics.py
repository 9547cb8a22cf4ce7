"""Average precision as Pascal VOC defines it, for one class.

D detections and G objects of the class in all images. Sources: M. Everingham et al., The Pascal
Visual Object Classes (VOC) challenge, IJCV 2010, section 4.2 (11 points), and the development kit
of VOC2010 and later (area under the curve).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

_POINTS = 11
_ROUNDING = 1e-9  # 3 of 10 objects are a recall of 0.3, whatever binary fractions make of it


@dataclass(frozen=True)
class VocObjects:
    """Objects of one class in one image.

    Attributes:
        boxes_xyxy: (G, 4) float, pixels.
        difficult: (G,) bool: finding them is neither right nor wrong.
    """

    boxes_xyxy: np.ndarray
    difficult: np.ndarray


@dataclass(frozen=True)
class VocDetections:
    """Detections of one class in all images.

    Attributes:
        image_ids: D ids.
        boxes_xyxy: (D, 4) float, pixels.
        scores: (D,) float.
    """

    image_ids: Sequence[Hashable]
    boxes_xyxy: np.ndarray
    scores: np.ndarray


def precision_recall(
    detections: VocDetections, objects: Mapping[Hashable, VocObjects], *, iou: float = 0.5
) -> tuple[np.ndarray, np.ndarray]:
    """Precision and recall after each detection, best score first.

    A detection is right if it overlaps the object that it overlaps most by more than `iou`, and no
    better one has found that object before. If that object is difficult, the detection does not
    count.

    Args:
        detections: of the class.
        objects: of the class, by image.
        iou: threshold, to be exceeded.

    Returns:
        Precision and recall, each (D,); recall is NaN without objects that are not difficult.
    """
    order = np.argsort(-detections.scores, kind="stable")
    best, overlap = _best_objects(detections, objects)
    found: set[tuple[Hashable, int]] = set()
    right, wrong = np.zeros(len(order)), np.zeros(len(order))
    for position, row in enumerate(order.tolist()):
        image_id, index = detections.image_ids[row], int(best[row])
        if overlap[row] <= iou:
            wrong[position] = 1
        elif not objects[image_id].difficult[index]:
            repeated = (image_id, index) in found
            (wrong if repeated else right)[position] = 1
            found.add((image_id, index))
    right, wrong = right.cumsum(), wrong.cumsum()
    total = sum(np.count_nonzero(~x.difficult) for x in objects.values())
    recall = right / total if total else np.full(len(order), np.nan)
    return right / np.maximum(right + wrong, np.finfo(np.float64).eps), recall


def average_precision(precision: np.ndarray, recall: np.ndarray) -> float:
    """Area under the curve of precision, made monotonous, over recall (VOC2010 and later)."""
    precision = np.concatenate([precision, [0.0]])
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    steps = np.diff(np.concatenate([[0.0], recall, recall[-1:] if len(recall) else [0.0]]))
    return float((steps * envelope).sum())


def eleven_point_precision(precision: np.ndarray, recall: np.ndarray) -> float:
    """Mean of the best precision at recalls of at least 0, 0.1, ..., 1 (VOC2007)."""
    levels = np.arange(_POINTS) / (_POINTS - 1)
    reached = recall[None] >= levels[:, None] - _ROUNDING  # (11, D)
    return float(np.where(reached, precision[None], 0.0).max(axis=1, initial=0.0).mean())


def _best_objects(
    detections: VocDetections, objects: Mapping[Hashable, VocObjects]
) -> tuple[np.ndarray, np.ndarray]:
    """(D,) index of the object of the same image that a detection overlaps most, and the IoU."""
    best = np.zeros(len(detections.scores), dtype=np.int64)
    overlap = np.full(len(detections.scores), -np.inf)
    rows_of: dict[Hashable, list[int]] = {}
    for row, image_id in enumerate(detections.image_ids):
        rows_of.setdefault(image_id, []).append(row)
    for image_id, rows in rows_of.items():
        there = objects.get(image_id)
        if there is None or not len(there.boxes_xyxy):
            continue
        ious = pairwise_iou(detections.boxes_xyxy[rows], there.boxes_xyxy)
        best[rows], overlap[rows] = ious.argmax(axis=1), ious.max(axis=1)
    return best, overlap


def pairwise_iou(a_xyxy: np.ndarray, b_xyxy: np.ndarray) -> np.ndarray:
    """(A, B) intersection over union; 0 where both boxes are empty."""
    a_xyxy, b_xyxy = (np.asarray(x, dtype=np.float64) for x in (a_xyxy, b_xyxy))
    low = np.maximum(a_xyxy[:, None, :2], b_xyxy[None, :, :2])
    high = np.minimum(a_xyxy[:, None, 2:], b_xyxy[None, :, 2:])
    inter = (high - low).clip(min=0).prod(axis=2)
    areas = [(x[:, 2:] - x[:, :2]).prod(axis=1) for x in (a_xyxy, b_xyxy)]
    union = areas[0][:, None] + areas[1][None] - inter
    return np.divide(inter, union, out=np.zeros_like(inter), where=union > 0)
