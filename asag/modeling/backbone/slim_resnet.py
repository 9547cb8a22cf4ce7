"""Residual network of configurable width, for detectors that are trained on a CPU.

Detectron2's R-18 has 64 channels, and norms that are usually frozen.
"""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import FPN, ResNet
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem


@BACKBONE_REGISTRY.register()
def build_slim_resnet(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """Builds a ResNet of basic blocks by `MODEL.SLIM_RESNET`, with outputs res2 to res5, or to an
    earlier stage if there are fewer than four."""
    slim = cfg.MODEL.SLIM_RESNET
    if slim.NORM == "GN" and slim.WIDTH % 32:
        raise ValueError(
            f"MODEL.SLIM_RESNET.WIDTH is {slim.WIDTH}; it must be a multiple of 32 with "
            "MODEL.SLIM_RESNET.NORM 'GN'"
        )
    stem = BasicStem(in_channels=input_shape.channels, out_channels=slim.WIDTH, norm=slim.NORM)
    stages, channels = [], slim.WIDTH
    for i, blocks in enumerate(slim.BLOCKS):
        out_channels = slim.WIDTH * 2**i
        stages.append(
            ResNet.make_stage(
                BasicBlock,
                blocks,
                stride_per_block=[1 if i == 0 else 2] + [1] * (blocks - 1),
                in_channels=channels,
                out_channels=out_channels,
                norm=slim.NORM,
            )
        )
        channels = out_channels
    return ResNet(stem, stages, out_features=[f"res{i + 2}" for i in range(len(stages))])


@BACKBONE_REGISTRY.register()
def build_slim_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Builds `build_slim_resnet` with Detectron2's feature pyramid, outputs p2 to p6."""
    blocks = cfg.MODEL.SLIM_RESNET.BLOCKS
    if len(blocks) != 4:
        raise ValueError(
            f"MODEL.SLIM_RESNET.BLOCKS is {blocks}; it must hold four numbers with "
            "MODEL.BACKBONE.NAME 'build_slim_resnet_fpn_backbone'"
        )
    return FPN(
        bottom_up=build_slim_resnet(cfg, input_shape),
        in_features=["res2", "res3", "res4", "res5"],
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=LastLevelMaxPool(),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
