"""Necks: modules between the backbone and the components that read features."""

from ..registry import NECK_REGISTRY, build_neck
from .deformable_encoder import DeformableEncoder
from .transformer_encoder import TransformerEncoder

__all__ = ["NECK_REGISTRY", "DeformableEncoder", "TransformerEncoder", "build_neck"]
