"""Matchers: assignment of queries to ground truth."""

from ..registry import MATCHER_REGISTRY, build_matcher
from .cost import MatchingCost
from .hungarian import HungarianMatcher, NonFiniteCostError
from .optimal_transport import OptimalTransportMatcher

__all__ = [
    "MATCHER_REGISTRY",
    "HungarianMatcher",
    "MatchingCost",
    "NonFiniteCostError",
    "OptimalTransportMatcher",
    "build_matcher",
]
