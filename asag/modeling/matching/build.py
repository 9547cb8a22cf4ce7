"""Registry of matchers: which query answers for which object."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.utils.registry import Registry
from torch import nn

from ..registry import build_component

MATCHER_REGISTRY = Registry("MATCHER")
MATCHER_REGISTRY.__doc__ = """
Modules `matcher(predictions: Predictions, targets: Targets) -> assignment`, (S, B, N) int64: the
index of the ground truth that each prediction answers for, -1 for background. Called without
gradient.
"""


def build_matcher(cfg: CfgNode) -> nn.Module:
    """Builds the matcher named by `MODEL.MATCHER.NAME`."""
    return build_component(MATCHER_REGISTRY, "MODEL.MATCHER.NAME", cfg.MODEL.MATCHER.NAME, cfg)
