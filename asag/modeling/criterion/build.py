"""Registry of criteria: how wrong the predictions are."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.utils.registry import Registry
from torch import nn

from ..registry import build_component

CRITERION_REGISTRY = Registry("CRITERION")
CRITERION_REGISTRY.__doc__ = """
Modules `criterion(predictions: Predictions, targets: Targets, assignment) -> dict of weighted
scalar losses`; `assignment` (S, B, N) is what a matcher returns.
"""


def build_criterion(cfg: CfgNode) -> nn.Module:
    """Builds the criterion named by `MODEL.CRITERION.NAME`."""
    return build_component(
        CRITERION_REGISTRY, "MODEL.CRITERION.NAME", cfg.MODEL.CRITERION.NAME, cfg
    )
