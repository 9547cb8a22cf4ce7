"""Backbones beyond those of Detectron2."""

from .dc5 import build_dc5_resnet_backbone
from .slim_resnet import build_slim_resnet, build_slim_resnet_fpn_backbone
from .swin import Swin, build_swin_fpn_backbone
from .timm_backbone import TimmBackbone, build_timm_backbone, build_timm_fpn_backbone
from .trained_norm import build_resnet_affine_backbone, build_resnet_affine_fpn_backbone
from .zero_padding import ZeroPadding

__all__ = [
    "Swin",
    "TimmBackbone",
    "ZeroPadding",
    "build_dc5_resnet_backbone",
    "build_resnet_affine_backbone",
    "build_resnet_affine_fpn_backbone",
    "build_slim_resnet",
    "build_slim_resnet_fpn_backbone",
    "build_swin_fpn_backbone",
    "build_timm_backbone",
    "build_timm_fpn_backbone",
]
