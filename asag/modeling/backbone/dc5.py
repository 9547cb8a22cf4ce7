"""ResNet with a dilated last stage (DC5; DETR, Section 4)."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import ResNet
from detectron2.modeling.backbone.resnet import build_resnet_backbone


@BACKBONE_REGISTRY.register()
def build_dc5_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """Builds Detectron2's ResNet with torchvision's dilation.

    With `MODEL.RESNETS.RES5_DILATION` 2 the last stage has stride 16 ("DC5"), and its 3x3
    convolutions are dilated except in the first block. Detectron2 also dilates the first block:
    published weights would load, but give different features.
    """
    resnet = build_resnet_backbone(cfg, input_shape)
    if cfg.MODEL.RESNETS.RES5_DILATION > 1:
        conv = resnet.res5[0].conv2
        conv.dilation = conv.padding = (1, 1)
    return resnet
