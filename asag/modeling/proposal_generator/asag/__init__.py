"""Adaptive sparse anchors (ASAG): as many anchors as the image needs, from its content alone."""

from .generator import AdaptiveSparseAnchors

__all__ = ["AdaptiveSparseAnchors"]
