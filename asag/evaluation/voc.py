"""Evaluates a detector with Pascal VOC's average precision, beside COCO's metrics.

Boxes in pixels with x + width as the right edge have the IoU that the development kit computes of
1-based inclusive corners.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from detectron2.utils.logger import create_small_table

from .coco import CocoBoxEvaluator
from .voc_metrics import (
    VocDetections,
    VocObjects,
    average_precision,
    eleven_point_precision,
    precision_recall,
)

logger = logging.getLogger(__name__)


class VocBoxEvaluator(CocoBoxEvaluator):
    """COCO's metrics as `bbox`, and Pascal VOC's as `voc`, all in percent.

    `voc` has AP50 (area under the curve, VOC2010 and later), AP50_11_points (VOC2007) and AP50 by
    class; classes without objects that are not difficult do not count. Difficult objects are
    ignored by all of them.
    """

    def _eval_predictions(
        self, predictions: Sequence[dict[str, Any]], img_ids: Sequence[int | str] | None = None
    ) -> None:
        super()._eval_predictions(predictions, img_ids)
        if not self._do_evaluation:
            return
        results = [x for prediction in predictions for x in prediction["instances"]]
        names = list(self._metadata.thing_classes)
        labels = self._metadata.get("thing_dataset_id_to_contiguous_id")
        ids = sorted(labels, key=labels.__getitem__) if labels else list(range(len(names)))
        annotations = self._coco_api.dataset["annotations"]
        if img_ids is not None:
            annotations = [x for x in annotations if x["image_id"] in set(img_ids)]
        self._results["voc"] = voc_results(results, annotations, dict(zip(ids, names, strict=True)))
        short = {k: v for k, v in self._results["voc"].items() if "-" not in k}
        logger.info("Pascal VOC's metrics:\n" + create_small_table(short))


def voc_results(
    results: Sequence[Mapping[str, Any]],
    annotations: Sequence[Mapping[str, Any]],
    class_names: Mapping[int | str, str],
) -> dict[str, float]:
    """Pascal VOC's metrics in percent, from COCO entries.

    Args:
        results: `image_id`, `category_id`, `bbox` (XYWH, pixels) and `score` of each detection.
        annotations: `image_id`, `category_id`, `bbox` and `difficult` (or `iscrowd`) of each
            object.
        class_names: category id -> name.

    Returns:
        AP50, AP50_11_points, and AP50-<name> of every class; NaN without objects.
    """
    detections_of, objects_of = defaultdict(list), defaultdict(list)
    for x in results:
        detections_of[x["category_id"]].append(x)
    for x in annotations:
        objects_of[x["category_id"]].append(x)
    area, points = {}, {}
    for category_id, name in class_names.items():
        curve = precision_recall(
            _detections(detections_of[category_id]), _objects(objects_of[category_id])
        )
        undefined = not any(not _ignored(x) for x in objects_of[category_id])
        area[name] = np.nan if undefined else 100 * average_precision(*curve)
        points[name] = np.nan if undefined else 100 * eleven_point_precision(*curve)
    return {
        "AP50": _mean(area.values()),
        "AP50_11_points": _mean(points.values()),
        **{f"AP50-{name}": float(value) for name, value in area.items()},
    }


def _detections(entries: Sequence[Mapping[str, Any]]) -> VocDetections:
    return VocDetections(
        [x["image_id"] for x in entries],
        _xyxy([x["bbox"] for x in entries]),
        np.array([x["score"] for x in entries], dtype=np.float64),
    )


def _objects(entries: Sequence[Mapping[str, Any]]) -> dict[Any, VocObjects]:
    of_image = defaultdict(list)
    for x in entries:
        of_image[x["image_id"]].append(x)
    return {
        image_id: VocObjects(
            _xyxy([x["bbox"] for x in found]), np.array([_ignored(x) for x in found], dtype=bool)
        )
        for image_id, found in of_image.items()
    }


def _ignored(annotation: Mapping[str, Any]) -> bool:
    return bool(annotation.get("difficult", 0) or annotation.get("iscrowd", 0))


def _xyxy(boxes_xywh: Sequence[Sequence[float]]) -> np.ndarray:
    boxes = np.array(boxes_xywh, dtype=np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return boxes


def _mean(values: Any) -> float:
    known = [x for x in values if not np.isnan(x)]
    return float(np.mean(known)) if known else float("nan")
