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
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.utils.file_io import PathManager
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ..data.ids import id_order
from ..files import atomic_writer

BACKENDS = ("auto", "faster-coco-eval", "pycocotools")
RESULTS_FILE = "coco_instances_results.json"
EVALUATOR_TYPES = ("coco", "pascal_voc")  # of data sets with a `json_file` that COCO's rules judge

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
            output_dir: folder for the detections as a COCO result list, with the image and category
                ids of the annotations; None writes nothing.
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
                json.dump(self._with_file_names(results), file)
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

    def _with_file_names(self, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Results with the user's own file names, for data in formats without image ids."""
        if not self._metadata.get("file_names_in_results"):
            return results
        names = {x["id"]: x["file_name"] for x in self._coco_api.dataset["images"]}
        return [x | {"file_name": names[x["image_id"]]} for x in results]


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
    image_ids: Sequence[int | str] | None = None,
) -> COCOeval:
    """COCO's evaluation of boxes.

    Ids may be of any kind (text, mixed, beyond 64 bits): both implementations see 1, 2, ... in
    their place. In data converted from Pascal VOC, annotations marked `difficult` are ignored as
    there: a detection that overlaps one is neither right nor wrong. pycocotools evaluates these.

    Args:
        ground_truth: annotations.
        results: at least one detection: `image_id`, `category_id`, `bbox` (XYWH, absolute pixels of
            the original image) and `score`.
        backend: one of `BACKENDS`.
        image_ids: evaluate on these images only.

    Returns:
        An evaluation object whose `stats` begin with COCO's twelve numbers (AP, AP50, AP75, APs,
        APm, APl, AR1, AR10, AR100, ARs, ARm, ARl; 0 to 1, -1 where undefined) and whose
        `eval["precision"]` is (IoU thresholds, recall thresholds, K, areas, limits). Its
        `params.catIds` are the given category ids in the order of K, `params.imgIds` the given
        image ids.

    Raises:
        ValueError: an unknown backend, or a detection of an image or category that the ground
            ground truth does not have.
    """
    image_numbers = _numbers(ground_truth.dataset["images"])
    category_numbers = _numbers(ground_truth.dataset["categories"])
    dataset = _renumbered(ground_truth.dataset, image_numbers, category_numbers)
    detections = [_renumbered_result(x, image_numbers, category_numbers) for x in results]
    difficult = any(x["difficult"] for x in dataset["annotations"])
    # Both implementations print their tables; callers report the numbers themselves.
    with contextlib.redirect_stdout(io.StringIO()):
        if choose_backend(backend) == "faster-coco-eval" and not difficult:
            import faster_coco_eval

            coco = faster_coco_eval.COCO(dataset)
            evaluation = faster_coco_eval.COCOeval_faster(
                coco, coco.loadRes(detections), iouType="bbox"
            )
        else:
            coco = COCO()
            coco.dataset = dataset
            coco.createIndex()
            kind = _DifficultCOCOeval if difficult else COCOeval
            evaluation = kind(coco, coco.loadRes(detections), "bbox")
        if image_ids is not None:
            evaluation.params.imgIds = [image_numbers[i] for i in image_ids]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    given_images, given_categories = list(image_numbers), list(category_numbers)
    evaluation.params.imgIds = [given_images[i - 1] for i in evaluation.params.imgIds]
    evaluation.params.catIds = [given_categories[i - 1] for i in evaluation.params.catIds]
    return evaluation


class _DifficultCOCOeval(COCOeval):
    """COCOeval for ground truth with difficult objects.

    A difficult object is ignored as often as it is found, like a crowd region, but found by its
    IoU, where a crowd region is found by the share of the detection that lies in it.
    """

    def computeIoU(self, imgId: int, catId: int) -> Any:
        """As the base class, with difficult objects by IoU."""
        objects = self._gts[imgId, catId]
        crowd = [x["iscrowd"] for x in objects]
        for x in objects:
            x["iscrowd"] = int(x["iscrowd"] and not x["difficult"])
        try:
            return super().computeIoU(imgId, catId)
        finally:
            for x, value in zip(objects, crowd, strict=True):
                x["iscrowd"] = value


def _numbers(entries: Sequence[dict[str, Any]]) -> dict[int | str, int]:
    """The ids of a section with their numbers 1, 2, ...: whole numbers rising, then text."""
    ids = sorted({x["id"] for x in entries}, key=id_order)
    return {given: number for number, given in enumerate(ids, start=1)}


def _renumbered(
    dataset: dict[str, Any],
    image_numbers: dict[int | str, int],
    category_numbers: dict[int | str, int],
) -> dict[str, Any]:
    """The parts of a COCO file that the evaluation of boxes reads, with numbers for ids.

    Annotations of images or categories that the file does not list are left out.
    """
    images = [x | {"id": image_numbers[x["id"]]} for x in dataset["images"]]
    info = dataset.get("info")
    is_voc = isinstance(info, dict) and info.get("evaluator_type") == "pascal_voc"
    listed = [
        x
        for x in dataset["annotations"]
        if x["image_id"] in image_numbers and x["category_id"] in category_numbers
    ]
    annotations = [
        {
            "id": number,
            "image_id": image_numbers[x["image_id"]],
            "category_id": category_numbers[x["category_id"]],
            "bbox": x["bbox"],
            "area": x["area"],
            "iscrowd": int(bool(x.get("iscrowd", 0) or (is_voc and x.get("difficult", 0)))),
            "difficult": is_voc and bool(x.get("difficult", 0)) and not x.get("iscrowd", 0),
        }
        for number, x in enumerate(listed, start=1)
    ]
    categories = [x | {"id": category_numbers[x["id"]]} for x in dataset["categories"]]
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories}


def _renumbered_result(
    result: dict[str, Any],
    image_numbers: dict[int | str, int],
    category_numbers: dict[int | str, int],
) -> dict[str, Any]:
    """A detection with numbers for ids."""
    try:
        image_id = image_numbers[result["image_id"]]
        category_id = category_numbers[result["category_id"]]
    except KeyError as error:
        raise ValueError(
            f"a detection has image_id {result['image_id']!r} and category_id "
            f"{result['category_id']!r}, but the annotations list no {error.args[0]!r}; evaluate "
            "detections with the annotations of the same data set"
        ) from error
    return {
        "image_id": image_id,
        "category_id": category_id,
        "bbox": result["bbox"],
        "score": result["score"],
    }


def ap50_by_class(evaluation: COCOeval) -> list[float]:
    """AP at IoU 0.5 of every class in percent, in the order of category ids; NaN where the images
    have none of it."""
    precision = evaluation.eval["precision"][0, :, :, 0, -1]  # (recall thresholds, K)
    return [
        100 * float(column[column > -1].mean()) if (column > -1).any() else math.nan
        for column in precision.T
    ]
