"""Models; importing this package registers all of them."""

from . import backbone, heads, neck, proposals
from .meta_arch import (
    DETR,
    ConditionalDETR,
    DynamicSparseRCNN,
    IoUEnhancedSparseRCNN,
    SparseDetector,
    SparseRCNN,
)

__all__ = [
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
