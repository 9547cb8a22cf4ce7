"""Models; importing this package registers all of them."""

from . import backbone, heads, neck, proposals
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
