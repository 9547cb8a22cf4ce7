"""ResNets whose norms have fixed ImageNet statistics and learned scale and shift, as in the code of
ASAG's authors."""

from __future__ import annotations

import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import Backbone, build_resnet_backbone
from detectron2.modeling.backbone.fpn import build_resnet_fpn_backbone
from torch import Tensor, nn


class FixedStatisticsNorm2d(nn.Module):
    """Batch norm with fixed statistics and learned scale and shift; parameter names and shapes are
    those of `FrozenBatchNorm2d`."""

    def __init__(self, frozen: FrozenBatchNorm2d, trainable: bool) -> None:
        """
        Args:
            frozen: its statistics, scale and shift are copied.
            trainable: False also fixes scale and shift.
        """
        super().__init__()
        self.eps = frozen.eps
        self.weight = nn.Parameter(frozen.weight.clone(), requires_grad=trainable)
        self.bias = nn.Parameter(frozen.bias.clone(), requires_grad=trainable)
        self.register_buffer("running_mean", frozen.running_mean.clone())
        self.register_buffer("running_var", frozen.running_var.clone())

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            training=False,
            eps=self.eps,
        )


def learn_affine(module: nn.Module) -> nn.Module:
    """Replaces all frozen norms below `module` in place.

    Scale and shift stay fixed if the weights beside the norm are frozen.
    """
    trainable = any(p.requires_grad for p in module.parameters(recurse=False))
    for name, child in module.named_children():
        if isinstance(child, FrozenBatchNorm2d):
            setattr(module, name, FixedStatisticsNorm2d(child, trainable))
        else:
            learn_affine(child)
    return module


def _check_norm(cfg: CfgNode) -> None:
    if cfg.MODEL.RESNETS.NORM != "FrozenBN":
        raise ValueError(
            f"MODEL.RESNETS.NORM is {cfg.MODEL.RESNETS.NORM!r}; it must be 'FrozenBN' with "
            f"MODEL.BACKBONE.NAME {cfg.MODEL.BACKBONE.NAME!r}"
        )


@BACKBONE_REGISTRY.register()
def build_resnet_affine_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Builds Detectron2's ResNet with learned scale and shift."""
    _check_norm(cfg)
    return learn_affine(build_resnet_backbone(cfg, input_shape))


@BACKBONE_REGISTRY.register()
def build_resnet_affine_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Builds Detectron2's ResNet-FPN with learned scale and shift."""
    _check_norm(cfg)
    return learn_affine(build_resnet_fpn_backbone(cfg, input_shape))
