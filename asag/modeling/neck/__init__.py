"""Necks: what stands between the backbone and everything that reads features."""

from .build import NECK_REGISTRY, build_neck

__all__ = ["NECK_REGISTRY", "build_neck"]
