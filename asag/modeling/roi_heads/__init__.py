"""ROI heads: refinement of the queries in stages."""

from .asag.adamixer import AdaMixerStage
from .asag.deformable import DeformableStage
from .asag.heads import ParallelHeads
from .detr.heads import ConditionalDETRHeads, DETRHeads
from .sparse_rcnn.channel_weighting import ChannelWeightedInteraction
from .sparse_rcnn.disentangled import DisentangledInteraction
from .sparse_rcnn.heads import DynamicConvHeads, RefinementHeads, RoIReader
from .sparse_rcnn.iou_esa import IoUEnhancedSelfAttention
from .sparse_rcnn.stage import DynamicConvStage

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
    "RefinementHeads",
    "RoIReader",
]
