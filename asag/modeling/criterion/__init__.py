"""Criteria: how wrong the predictions are."""

from .build import CRITERION_REGISTRY, build_criterion
from .set_criterion import SetCriterion

__all__ = ["CRITERION_REGISTRY", "SetCriterion", "build_criterion"]
