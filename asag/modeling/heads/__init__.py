"""ROI heads: how queries are refined."""

from .adamixer import AdaMixerStage
from .channel_weighting import ChannelWeightedInteraction
from .deformable import DeformableStage
from .disentangled import DisentangledInteraction
from .dynamic_heads import DynamicConvHeads
from .iou_esa import IoUEnhancedSelfAttention
from .parallel_heads import ParallelHeads
from .stage import DynamicConvStage
from .transformer_heads import ConditionalDETRHeads, DETRHeads

__all__ = [
    "AdaMixerStage",
    "ChannelWeightedInteraction",
    "ConditionalDETRHeads",
    "DETRHeads",
    "DeformableStage",
    "DisentangledInteraction",
    "DynamicConvHeads",
    "DynamicConvStage",
    "IoUEnhancedSelfAttention",
    "ParallelHeads",
]
