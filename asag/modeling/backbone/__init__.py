"""Backbones that Detectron2 lacks."""

from .slim_resnet import build_slim_resnet, build_slim_resnet_fpn_backbone
from .swin import Swin, build_swin_fpn_backbone

__all__ = [
    "Swin",
    "build_slim_resnet",
    "build_slim_resnet_fpn_backbone",
    "build_swin_fpn_backbone",
]
