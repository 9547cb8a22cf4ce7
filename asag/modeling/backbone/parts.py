"""Stages of a backbone, for code that handles them one by one."""

from __future__ import annotations

from collections.abc import Iterator

from detectron2.modeling.backbone import ResNet
from torch import nn

from .swin import Swin
from .timm_backbone import TimmBackbone


def backbone_stages(backbone: nn.Module) -> Iterator[nn.Module]:
    """Yields the stages of the residual network, Swin Transformer or timm network inside of a
    backbone; none for other networks."""
    for module in backbone.modules():
        if isinstance(module, ResNet):
            yield from module.stages
        elif isinstance(module, Swin):
            yield from module.features[1::2]
        elif isinstance(module, TimmBackbone):
            yield from module.stages
