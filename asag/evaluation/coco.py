"""COCO's box metrics, by the C++ implementation when it is installed.

`faster-coco-eval` computes the same numbers as `pycocotools` several times faster. As in COCO's
definition, AP counts the 100 best detections of each image *and class*. A detector that gives 300
detections an image (TEST.DETECTIONS_PER_IMAGE) profits as far as they spread over the classes.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import itertools
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.utils.file_io import PathManager
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ..files import atomic_writer

BACKENDS = ("auto", "faster-coco-eval", "pycocotools")
RESULTS_FILE = "coco_instances_results.json"

logger = logging.getLogger(__name__)


class CocoBoxEvaluator(COCOEvaluator):
    """Detectron2's evaluator for boxes; results are AP, AP50, AP75, APs, APm, APl and AP per class,
    all in percent."""

    def __init__(
        self,
        dataset_name: str,
        *,
        distributed: bool = True,
        output_dir: str | None = None,
        backend: str = "auto",
    ) -> None:
        """
        Args:
            dataset_name: a registered data set with `json_file` in its metadata.
            distributed: gather the detections of all processes and evaluate in the first.
            output_dir: folder for the detections as a COCO result list; None writes nothing.
            backend: one of `BACKENDS`; "auto" takes the faster one that is installed.

        Raises:
            ValueError: an unknown backend, or one that is not installed.
        """
        json_file = MetadataCatalog.get(dataset_name).get("json_file")
        if json_file and not PathManager.exists(json_file):
            DatasetCatalog.get(dataset_name)  # generated data sets are made when first loaded
        super().__init__(
            dataset_name,
            tasks=("bbox",),
            distributed=distributed,
            output_dir=None,
            use_fast_impl=False,
        )
        self._folder = Path(output_dir) if output_dir else None
        self._backend = choose_backend(backend)

    def _eval_predictions(
        self, predictions: Sequence[dict[str, Any]], img_ids: Sequence[int] | None = None
    ) -> None:
        results = list(itertools.chain(*(x["instances"] for x in predictions)))
        mapping = self._metadata.get("thing_dataset_id_to_contiguous_id")
        if mapping:
            dataset_ids = {label: dataset_id for dataset_id, label in mapping.items()}
            for result in results:
                result["category_id"] = dataset_ids[result["category_id"]]
        if self._folder is not None:
            with atomic_writer(self._folder / RESULTS_FILE) as file:
                json.dump(results, file)
        if not self._do_evaluation:
            logger.info("the annotation file has no annotations: nothing to compare with")
            return
        evaluation = None
        if results:  # COCO's code cannot read an empty list
            evaluation = evaluate_boxes(
                self._coco_api, results, backend=self._backend, image_ids=img_ids
            )
        self._results["bbox"] = self._derive_coco_results(
            evaluation, "bbox", class_names=self._metadata.get("thing_classes")
        )


def choose_backend(backend: str = "auto") -> str:
    """Name of the implementation to use.

    Raises:
        ValueError: unknown, or not installed.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; choose one of: {', '.join(BACKENDS)}")
    installed = importlib.util.find_spec("faster_coco_eval") is not None
    if backend == "auto":
        return "faster-coco-eval" if installed else "pycocotools"
    if backend == "faster-coco-eval" and not installed:
        raise ValueError("backend 'faster-coco-eval' is not installed: pip install asag[fast]")
    return backend


def evaluate_boxes(
    ground_truth: COCO,
    results: Sequence[dict[str, Any]],
    *,
    backend: str = "auto",
    image_ids: Sequence[int] | None = None,
) -> COCOeval:
    """COCO's evaluation of boxes.

    Args:
        ground_truth: annotations.
        results: at least one detection: `image_id`, `category_id`, `bbox` (XYWH, absolute pixels of
            the original image) and `score`.
        backend: one of `BACKENDS`.
        image_ids: evaluate on these images only.

    Returns:
        An evaluation object whose `stats` begin with COCO's twelve numbers (AP, AP50, AP75, APs,
        APm, APl, AR1, AR10, AR100, ARs, ARm, ARl; 0 to 1, -1 where undefined) and whose
        `eval["precision"]` is (IoU thresholds, recall thresholds, K, areas, limits).
    """
    # Both implementations print their tables; callers report the numbers themselves.
    with contextlib.redirect_stdout(io.StringIO()):
        if choose_backend(backend) == "faster-coco-eval":
            import faster_coco_eval

            # Its own class, built from the dict that is already in memory.
            gt = faster_coco_eval.COCO(ground_truth.dataset)
            evaluation = faster_coco_eval.COCOeval_faster(
                gt, gt.loadRes(list(results)), iouType="bbox"
            )
        else:
            evaluation = COCOeval(ground_truth, ground_truth.loadRes(list(results)), "bbox")
        if image_ids is not None:
            evaluation.params.imgIds = list(image_ids)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation
