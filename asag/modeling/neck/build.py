"""Registry of necks: what stands between the backbone and everything that reads features."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.utils.registry import Registry
from torch import nn

from ..registry import build_component

NECK_REGISTRY = Registry("NECK")
NECK_REGISTRY.__doc__ = """
Modules `neck(features: dict[str, Tensor], sizes: ImageSizes) -> dict[str, Tensor]`, built from the
configuration and the backbone's output shapes, with an `output_shape()` like a backbone's.
Detectron2's FPN is part of the backbone and needs none.
"""


def build_neck(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> nn.Module | None:
    """Builds the neck named by `MODEL.NECK.NAME`; None where the name is empty."""
    if not cfg.MODEL.NECK.NAME:
        return None
    return build_component(NECK_REGISTRY, "MODEL.NECK.NAME", cfg.MODEL.NECK.NAME, cfg, input_shape)
