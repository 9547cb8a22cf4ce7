"""Models. Importing this package registers all components."""

from . import backbone, criterion, matching, neck, proposal_generator, roi_heads
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
    "criterion",
    "matching",
    "neck",
    "proposal_generator",
    "roi_heads",
]
