"""Models; importing this package registers all of them."""

from . import backbone, heads, proposals
from .meta_arch import IoUEnhancedSparseRCNN, SparseDetector, SparseRCNN

__all__ = [
    "IoUEnhancedSparseRCNN",
    "SparseDetector",
    "SparseRCNN",
    "backbone",
    "heads",
    "proposals",
]
