"""Models; importing this package registers all of them."""

from . import backbone, heads, proposals
from .meta_arch import SparseDetector, SparseRCNN

__all__ = ["SparseDetector", "SparseRCNN", "backbone", "heads", "proposals"]
