"""Evaluators by the type of a data set."""

from __future__ import annotations

from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator

from .coco import CocoBoxEvaluator
from .crowdhuman import CrowdHumanEvaluator


def build_evaluator(dataset_name: str, output_dir: str) -> DatasetEvaluator:
    """Builds the evaluator that the `evaluator_type` of the data set asks for.

    Args:
        dataset_name: a registered data set.
        output_dir: where the evaluator writes the detections.

    Raises:
        ValueError: no or an unknown `evaluator_type`.
    """
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if kind == "coco":
        return CocoBoxEvaluator(dataset_name, output_dir=output_dir)
    if kind == "crowdhuman":
        return CrowdHumanEvaluator(dataset_name, output_dir=output_dir)
    raise ValueError(
        f"data set {dataset_name!r} has evaluator_type {kind!r} in its metadata; 'coco' and "
        "'crowdhuman' can be evaluated. Set it with "
        f"MetadataCatalog.get({dataset_name!r}).evaluator_type = 'coco'"
    )
