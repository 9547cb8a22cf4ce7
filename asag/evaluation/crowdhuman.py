"""Evaluates a detector with the CrowdHuman metrics inside Detectron2's evaluation loop.

D detections of an image, G annotations of an image. Boxes are xyxy in absolute pixels of the
original image.
"""

from __future__ import annotations

import json
import logging
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import BoxMode
from detectron2.utils import comm
from detectron2.utils.logger import create_small_table

from asag.evaluation.crowdhuman_metrics import CrowdImage, crowdhuman_metrics
from asag.files import atomic_writer

DETECTIONS_FILE = "crowdhuman_detections.json"

logger = logging.getLogger(__name__)


class _GroundTruth(NamedTuple):
    boxes_xyxy: np.ndarray  # (G, 4) float64
    ignored: np.ndarray  # (G,) bool
    height: int
    width: int
    name: str


class CrowdHumanEvaluator(DatasetEvaluator):
    """AP, mMR and Recall of a one-class data set, in percent.

    Works for CrowdHuman and for any registered data set of Detectron2 dataset dicts with one class,
    where `iscrowd` marks ignored regions. All detections of an image count (CrowdHuman models are
    evaluated with 500), without a score threshold.

    See :mod:`asag.evaluation.crowdhuman_metrics` for the definitions.
    """

    def __init__(
        self,
        dataset_name: str,
        *,
        distributed: bool = True,
        output_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        """
        Args:
            dataset_name: a data set in Detectron2's catalog.
            distributed: gather the detections of all processes and evaluate in the first.
            output_dir: folder for :data:`DETECTIONS_FILE`, the detections as a COCO result list
                (bbox as x, y, width, height in pixels); None writes nothing.

        Raises:
            ValueError: the data set has several classes, no real box, an image without size, or
                boxes in a mode other than XYXY_ABS and XYWH_ABS.
        """
        self._distributed = distributed
        self._output_dir = Path(output_dir) if output_dir is not None else None
        metadata = MetadataCatalog.get(dataset_name)
        classes = metadata.get("thing_classes", ["object"])
        if len(classes) != 1:
            raise ValueError(
                "CrowdHuman metrics are defined for one class, "
                f"data set {dataset_name!r} has {len(classes)}; use the COCO evaluator"
            )
        dataset_ids = metadata.get("thing_dataset_id_to_contiguous_id", {0: 0})
        self._category_id = next(iter(dataset_ids))
        dataset = DatasetCatalog.get(dataset_name)
        self._image_ids = {entry["image_id"] for entry in dataset}
        # images without annotations are outside the benchmark
        self._ground_truth = {
            entry["image_id"]: _ground_truth(entry) for entry in dataset if entry.get("annotations")
        }
        if all(gt.ignored.all() for gt in self._ground_truth.values()):
            raise ValueError(
                f"data set {dataset_name!r} has no real (not ignored) box: nothing to evaluate"
            )
        self.reset()

    def reset(self) -> None:
        """Forgets all detections."""
        self._detections: dict[Any, tuple[np.ndarray, np.ndarray]] = {}

    def process(
        self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]
    ) -> None:
        """Keeps the detections of a batch.

        Args:
            inputs: Detectron2 model inputs, of which `image_id` is used.
            outputs: one `{"instances": Instances}` for each input, with `pred_boxes` (absolute
                pixels of the original image) and `scores`.

        Raises:
            ValueError: an image is not part of the data set, or a box or score is NaN or infinite.
        """
        for entry, output in zip(inputs, outputs, strict=True):
            image_id = entry["image_id"]
            if image_id not in self._image_ids:
                raise ValueError(
                    f"image_id {image_id!r} is not in the evaluated data set; "
                    "is the test loader built from the same data set?"
                )
            instances = output["instances"]
            boxes_xyxy = instances.pred_boxes.tensor.float().cpu().numpy()
            scores = instances.scores.float().cpu().numpy()
            if not (np.isfinite(boxes_xyxy).all() and np.isfinite(scores).all()):
                raise ValueError(
                    f"image_id {image_id!r}: a detected box or score is NaN or infinite; "
                    "the model's weights have probably diverged"
                )
            self._detections[image_id] = (boxes_xyxy, scores)

    def evaluate(self) -> OrderedDict[str, dict[str, float]] | dict[str, Any]:
        """Computes the metrics from all processed images.

        Images of the data set that were not processed count as images without detections.

        Returns:
            `{"bbox": {"AP", "mMR", "Recall"}}` in percent; in other processes than the first an
            empty dict.
        """
        detections = self._detections
        if self._distributed:
            comm.synchronize()
            gathered = comm.gather(detections, dst=0)
            if not comm.is_main_process():
                return {}
            detections = {key: value for part in gathered for key, value in part.items()}

        if self._output_dir is not None:
            self._write_detections(detections)
        missing = self._image_ids - detections.keys()
        if missing:
            logger.warning(
                "%d of %d images were not processed; they count as images without detections",
                len(missing),
                len(self._image_ids),
            )
        nothing = (np.zeros((0, 4), dtype=np.float32), np.zeros(0, dtype=np.float32))
        metrics = crowdhuman_metrics(
            [
                CrowdImage(
                    gt.boxes_xyxy,
                    gt.ignored,
                    *detections.get(image_id, nothing),
                    gt.height,
                    gt.width,
                    gt.name,
                )
                for image_id, gt in self._ground_truth.items()
            ]
        )
        percent = {
            "AP": 100 * metrics.ap,
            "mMR": 100 * metrics.mmr,
            "Recall": 100 * metrics.recall,
        }
        logger.info(
            "CrowdHuman metrics of %d detections on %d images (%d boxes, %d ignored regions):\n%s",
            metrics.num_detections,
            metrics.num_images,
            metrics.num_boxes,
            metrics.num_ignored,
            create_small_table(percent),
        )
        return OrderedDict(bbox=percent)

    def _write_detections(self, detections: Mapping[Any, tuple[np.ndarray, np.ndarray]]) -> None:
        """Writes the COCO result list image by image: the whole list need not be in memory."""
        path = self._output_dir / DETECTIONS_FILE
        separator = "["
        with atomic_writer(path) as file:
            for image_id, (boxes_xyxy, scores) in detections.items():
                boxes_xywh = boxes_xyxy.astype(np.float64)
                boxes_xywh[:, 2:] -= boxes_xywh[:, :2]
                head = f'{{"image_id": {json.dumps(image_id)}, "category_id": {self._category_id}'
                for box, score in zip(boxes_xywh.tolist(), scores.tolist(), strict=True):
                    file.write(f'{separator}\n{head}, "bbox": {box}, "score": {score}}}')
                    separator = ","
            file.write("\n]\n" if separator == "," else "[]\n")
        logger.info("Detections written to %s", path)


def _ground_truth(entry: Mapping[str, Any]) -> _GroundTruth:
    """Annotations of one Detectron2 dataset dict as arrays."""
    name = str(entry.get("file_name", entry["image_id"]))
    if "height" not in entry or "width" not in entry:
        raise ValueError(f"image {name} has no height and width; boxes are clipped to the image")
    annotations = entry["annotations"]
    modes = {annotation["bbox_mode"] for annotation in annotations}
    unknown = modes - {BoxMode.XYXY_ABS, BoxMode.XYWH_ABS}
    if unknown:
        raise ValueError(
            f"image {name}: boxes in mode {unknown.pop()}, expected XYXY_ABS or XYWH_ABS"
        )
    boxes = np.array([a["bbox"] for a in annotations], dtype=np.float64)
    is_xywh = np.array([a["bbox_mode"] == BoxMode.XYWH_ABS for a in annotations])
    boxes[is_xywh, 2:] += boxes[is_xywh, :2]
    ignored = np.array([a.get("iscrowd", 0) != 0 for a in annotations], dtype=bool)
    return _GroundTruth(boxes, ignored, entry["height"], entry["width"], name)
