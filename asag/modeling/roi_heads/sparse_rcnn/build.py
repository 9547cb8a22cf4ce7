"""Stages of the Sparse R-CNN family, with the attention and interaction that are configured."""

from __future__ import annotations

from detectron2.config import CfgNode
from torch import nn

from ...layers.attention import SelfAttention
from .channel_weighting import ChannelWeightedInteraction
from .disentangled import DisentangledInteraction
from .dynamic_conv import DynamicInteraction
from .iou_esa import IoUAttention, IoUEnhancedSelfAttention, NoAttention
from .stage import DynamicConvStage


def build_dynamic_conv_stage(cfg: CfgNode) -> DynamicConvStage:
    """Builds one refinement stage by `MODEL.DECODER`."""
    decoder = cfg.MODEL.DECODER
    focal = cfg.MODEL.CRITERION.CLASS_LOSS == "focal"
    return DynamicConvStage(
        attention=build_attention(cfg),
        interaction=build_interaction(cfg),
        dim=decoder.HIDDEN_DIM,
        num_logits=cfg.MODEL.ROI_HEADS.NUM_CLASSES + (not focal),
        num_cls_layers=decoder.NUM_CLS_LAYERS,
        num_reg_layers=decoder.NUM_REG_LAYERS,
        activation=decoder.ACTIVATION,
        dropout=decoder.DROPOUT,
        prior_prob=decoder.PRIOR_PROB if focal else None,
        min_box_scale=decoder.MIN_BOX_SCALE,
        max_box_scale=decoder.MAX_BOX_SCALE,
    )


def build_attention(cfg: CfgNode) -> nn.Module:
    """Builds the self-attention named by `MODEL.DECODER.SELF_ATTENTION`."""
    decoder = cfg.MODEL.DECODER
    kind, dim, dropout = decoder.SELF_ATTENTION, decoder.HIDDEN_DIM, decoder.DROPOUT
    if kind == "none":
        return NoAttention()
    if kind == "iou":
        return IoUAttention(dim=dim, row_normalize=decoder.IOU_ROW_NORMALIZE, dropout=dropout)
    attention = IoUEnhancedSelfAttention if kind == "iou_esa" else SelfAttention
    return attention(dim=dim, num_heads=decoder.NUM_HEADS, dropout=dropout)


def build_interaction(cfg: CfgNode) -> nn.Module:
    """Builds the interaction of queries with their box features, by `MODEL.DECODER.DCW` and
    `MODEL.DECODER.DISENTANGLE`."""
    decoder = cfg.MODEL.DECODER
    disentangle = decoder.DISENTANGLE != "none"
    if decoder.DCW and disentangle:
        raise ValueError(
            f"MODEL.DECODER.DCW is True and MODEL.DECODER.DISENTANGLE is {decoder.DISENTANGLE!r}; "
            "they are alternatives: set DCW to False or DISENTANGLE to 'none'"
        )
    sizes = {
        "dim": decoder.HIDDEN_DIM,
        "dynamic_dim": decoder.DYNAMIC_DIM,
        "ffn_dim": decoder.FFN_DIM,
        "num_positions": cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION**2,
        "activation": decoder.ACTIVATION,
        "dropout": decoder.DROPOUT,
    }
    if disentangle:
        return DisentangledInteraction(**sizes, recover_dim=decoder.DISENTANGLE == "full")
    return ChannelWeightedInteraction(**sizes) if decoder.DCW else DynamicInteraction(**sizes)
