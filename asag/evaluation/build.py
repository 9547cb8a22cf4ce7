"""Evaluators by the type of a data set."""

from __future__ import annotations

from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, PascalVOCDetectionEvaluator

from .coco import CocoBoxEvaluator
from .crowdhuman import CrowdHumanEvaluator
from .voc import VocBoxEvaluator


def build_evaluator(dataset_name: str, output_dir: str) -> DatasetEvaluator:
    """Builds the evaluator that the `evaluator_type` of the data set asks for.

    Args:
        dataset_name: a registered data set.
        output_dir: where the evaluator writes the detections.

    Raises:
        ValueError: no or an unknown `evaluator_type`.
    """
    metadata = MetadataCatalog.get(dataset_name)
    kind = metadata.get("evaluator_type")
    if kind == "coco":
        return CocoBoxEvaluator(dataset_name, output_dir=output_dir)
    if kind == "pascal_voc" and metadata.get("json_file"):
        return VocBoxEvaluator(dataset_name, output_dir=output_dir)
    if kind == "pascal_voc":  # Detectron2's own voc_2007_* and voc_2012_*
        return PascalVOCDetectionEvaluator(dataset_name)
    if kind == "crowdhuman":
        return CrowdHumanEvaluator(dataset_name, output_dir=output_dir)
    raise ValueError(
        f"data set {dataset_name!r} has evaluator_type {kind!r} in its metadata; 'coco', "
        "'pascal_voc' and 'crowdhuman' can be evaluated. Set it with "
        f"MetadataCatalog.get({dataset_name!r}).evaluator_type = 'coco'"
    )
