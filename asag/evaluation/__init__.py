"""Evaluators for what COCO's evaluator does not measure."""

from asag.evaluation.crowdhuman import CrowdHumanEvaluator
from asag.evaluation.crowdhuman_metrics import (
    CrowdImage,
    CrowdMetrics,
    crowdhuman_metrics,
    crowdhuman_metrics_from_coco,
)
from asag.evaluation.recall import ProposalRecallEvaluator

__all__ = [
    "CrowdHumanEvaluator",
    "CrowdImage",
    "CrowdMetrics",
    "ProposalRecallEvaluator",
    "crowdhuman_metrics",
    "crowdhuman_metrics_from_coco",
]
