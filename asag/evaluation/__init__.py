"""Evaluators, and the choice of one by the type of a data set."""

from asag.evaluation.build import build_evaluator
from asag.evaluation.crowdhuman import CrowdHumanEvaluator
from asag.evaluation.crowdhuman_metrics import (
    CrowdImage,
    CrowdMetrics,
    crowdhuman_metrics,
    crowdhuman_metrics_from_coco,
)
from asag.evaluation.recall import ProposalRecallEvaluator
from asag.evaluation.voc import VocBoxEvaluator, voc_results

__all__ = [
    "CrowdHumanEvaluator",
    "CrowdImage",
    "CrowdMetrics",
    "ProposalRecallEvaluator",
    "VocBoxEvaluator",
    "build_evaluator",
    "crowdhuman_metrics",
    "crowdhuman_metrics_from_coco",
    "voc_results",
]
