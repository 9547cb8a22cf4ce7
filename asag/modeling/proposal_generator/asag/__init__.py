"""Adaptive sparse anchors (ASAG): a variable number of anchors, predicted from the image."""

from .generator import AdaptiveSparseAnchors

__all__ = ["AdaptiveSparseAnchors"]
