"""ROI heads: how queries are refined."""

from .dynamic_heads import DynamicConvHeads
from .stage import DynamicConvStage

__all__ = ["DynamicConvHeads", "DynamicConvStage"]
