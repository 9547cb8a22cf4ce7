"""Criteria: losses of matched predictions."""

from ..registry import CRITERION_REGISTRY, build_criterion
from .query_weighting import QueryWeightingCriterion
from .set_criterion import SetCriterion

__all__ = ["CRITERION_REGISTRY", "QueryWeightingCriterion", "SetCriterion", "build_criterion"]
