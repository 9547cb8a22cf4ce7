"""ROI heads: how queries are refined."""

from .channel_weighting import ChannelWeightedInteraction
from .disentangled import DisentangledInteraction
from .dynamic_heads import DynamicConvHeads
from .iou_esa import IoUEnhancedSelfAttention
from .stage import DynamicConvStage
from .transformer_heads import ConditionalDETRHeads, DETRHeads

__all__ = [
    "ChannelWeightedInteraction",
    "ConditionalDETRHeads",
    "DETRHeads",
    "DisentangledInteraction",
    "DynamicConvHeads",
    "DynamicConvStage",
    "IoUEnhancedSelfAttention",
]
