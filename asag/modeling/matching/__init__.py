"""Matchers: which query answers for which object."""

from .build import MATCHER_REGISTRY, build_matcher
from .cost import MatchingCost
from .hungarian import HungarianMatcher, NonFiniteCostError

__all__ = [
    "MATCHER_REGISTRY",
    "HungarianMatcher",
    "MatchingCost",
    "NonFiniteCostError",
    "build_matcher",
]
