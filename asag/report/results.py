"""Detections of a run on a test set, compared with the annotations."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog

from ..evaluation.coco import EVALUATOR_TYPES
from .accuracy import CocoAccuracy, coco_accuracy, read_detections
from .annotations import DatasetSummary, GroundTruth
from .image_errors import ImageDetections, ImageErrors, count_errors


class NoDataError(ValueError):
    """A data set cannot be read; the message says why and what to do."""


@dataclass(frozen=True)
class Result:
    """Detections on a test set, compared with its annotations.

    Attributes:
        name: of the data set.
        entries: Detectron2's dataset dicts.
        class_names: K names.
        summary: statistics of the data set.
        found: detections of each image; empty without an evaluation.
        accuracy: None without detections, or where COCO's figures do not apply.
        counts: errors of each image at `threshold`; empty without detections.
        threshold: score with the highest F1 at an IoU of 0.5, and that F1, 0 to 1.
        f1: see above.
        remarks: reasons for missing parts.
    """

    name: str
    entries: Sequence[dict[str, Any]]
    class_names: Sequence[str]
    summary: DatasetSummary
    found: Sequence[ImageDetections] = ()
    accuracy: CocoAccuracy | None = None
    counts: Sequence[ImageErrors] = ()
    threshold: float = 1.0
    f1: float = 0.0
    remarks: list[str] = field(default_factory=list)


def load_entries(name: str) -> list[dict[str, Any]]:
    """Loads the dataset dicts of a registered data set.

    Raises:
        NoDataError: it is not registered, or its files cannot be read.
    """
    if name not in DatasetCatalog.list():
        raise NoDataError(
            f"Data set {name} is not known here. Pass its folder with --data DIR to "
            "tools/report.py to see it in the report."
        )
    try:
        return DatasetCatalog.get(name)
    except (OSError, ValueError) as error:
        raise NoDataError(f"Data set {name} cannot be read: {error}") from error


def class_names(name: str, entries: Sequence[dict[str, Any]]) -> list[str]:
    """Returns the class names; numbered if the data set has none."""
    labels = [a["category_id"] for x in entries for a in x.get("annotations", [])]
    count = max(labels, default=-1) + 1
    known = list(MetadataCatalog.get(name).get("thing_classes", []))
    return known + [f"class {k}" for k in range(len(known), count)]


def compare_with_data(name: str, detections_file: Path | None) -> Result:
    """Compares detections with a data set.

    Args:
        name: of the data set.
        detections_file: COCO result list; None without an evaluation.

    Raises:
        NoDataError: the data set cannot be read.
        ValueError: the file is no result list, or of another data set.
    """
    entries = load_entries(name)
    names = class_names(name, entries)
    gts = [GroundTruth.of(x) for x in entries]
    summary = DatasetSummary.of(gts, len(names))
    if detections_file is None or not entries:
        text = f"No detections on {name} have been written: no curves and no images."
        return Result(name, entries, names, summary, remarks=[text])
    metadata = MetadataCatalog.get(name)
    labels = metadata.get("thing_dataset_id_to_contiguous_id") or {
        k: k for k in range(len(names))
    }  # fmt: skip
    detections = read_detections(detections_file)
    found = by_image(detections, entries, labels, detections_file)
    counts, threshold, f1 = count_errors(found, gts)
    accuracy, remarks = None, []
    if metadata.get("evaluator_type") not in EVALUATOR_TYPES or not metadata.get("json_file"):
        remarks.append(
            f"{name} is not evaluated by COCO's rules, so there are no figures by class and size "
            "and no precision-recall curves."
        )
    elif not summary.objects.sum():
        remarks.append(f"{name} has no objects to find.")
    else:
        accuracy = coco_accuracy(
            Path(metadata.json_file), detections, class_names=names, labels=labels
        )
        if accuracy is None:
            remarks.append(f"The detector found nothing at all on {name}.")
    return Result(name, entries, names, summary, found, accuracy, counts, threshold, f1, remarks)


def by_image(
    detections: Sequence[dict[str, Any]],
    entries: Sequence[dict[str, Any]],
    labels: dict[int, int],
    source: Path,
) -> list[ImageDetections]:
    """Groups detections by image, in the order of the images.

    Args:
        detections: COCO result list.
        entries: dataset dicts.
        labels: category id -> index of the class.
        source: the file, for error messages.

    Raises:
        ValueError: an image or a class is not of this data set.
    """
    rows: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for x in detections:
        rows[x["image_id"]].append(x)
    strangers = rows.keys() - {x["image_id"] for x in entries}
    classes = {x["category_id"] for x in detections} - labels.keys()
    if strangers or classes:
        what = (
            f"image_id {next(iter(strangers))!r}" if strangers else f"category_id {classes.pop()}"
        )
        raise ValueError(f"{source} has {what}, which the data set does not have; evaluate again")
    return [_found(rows[x["image_id"]], labels) for x in entries]


def _found(rows: Sequence[dict[str, Any]], labels: dict[int, int]) -> ImageDetections:
    boxes = np.array([x["bbox"] for x in rows], dtype=np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    scores = np.array([x["score"] for x in rows], dtype=np.float64)
    classes = np.array([labels[x["category_id"]] for x in rows], dtype=np.int64)
    order = np.argsort(-scores, kind="stable")
    return ImageDetections(boxes[order], classes[order], scores[order])
