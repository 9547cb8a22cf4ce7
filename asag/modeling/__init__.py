"""Models; importing this package registers all of them."""

from . import backbone, neck
from . import proposal_generator as proposals
from . import roi_heads as heads
from .meta_arch import (
    ASAG,
    DETR,
    ConditionalDETR,
    DynamicSparseRCNN,
    IoUEnhancedSparseRCNN,
    SparseDetector,
    SparseRCNN,
)

__all__ = [
    "ASAG",
    "DETR",
    "ConditionalDETR",
    "DynamicSparseRCNN",
    "IoUEnhancedSparseRCNN",
    "SparseDetector",
    "SparseRCNN",
    "backbone",
    "heads",
    "neck",
    "proposals",
]
