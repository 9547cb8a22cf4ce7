"""Which attention and which interaction a stage uses, by configuration."""

from __future__ import annotations

from detectron2.config import CfgNode
from torch import nn

from ...layers.attention import SelfAttention
from ...registry import check_choice
from .channel_weighting import ChannelWeightedInteraction
from .disentangled import DisentangledInteraction
from .dynamic_conv import DynamicInteraction
from .iou_esa import IoUAttention, IoUEnhancedSelfAttention, NoAttention


def build_attention(cfg: CfgNode) -> nn.Module:
    """Self-attention named by `MODEL.DECODER.SELF_ATTENTION`."""
    decoder = cfg.MODEL.DECODER
    kind, dim, dropout = decoder.SELF_ATTENTION, decoder.HIDDEN_DIM, decoder.DROPOUT
    check_choice("MODEL.DECODER.SELF_ATTENTION", kind, ("msa", "iou_esa", "iou", "none"))
    if kind == "none":
        return NoAttention()
    if kind == "iou":
        return IoUAttention(dim=dim, row_normalize=decoder.IOU_ROW_NORMALIZE, dropout=dropout)
    attention = IoUEnhancedSelfAttention if kind == "iou_esa" else SelfAttention
    return attention(dim=dim, num_heads=decoder.NUM_HEADS, dropout=dropout)


def build_interaction(cfg: CfgNode) -> nn.Module:
    """Interaction of a query with the features of its box, by `MODEL.DECODER.DCW` and
    `MODEL.DECODER.DISENTANGLE`."""
    decoder = cfg.MODEL.DECODER
    check_choice("MODEL.DECODER.DISENTANGLE", decoder.DISENTANGLE, ("none", "half", "full"))
    disentangle = decoder.DISENTANGLE != "none"
    if decoder.DCW and disentangle:
        raise ValueError(
            "MODEL.DECODER.DCW and MODEL.DECODER.DISENTANGLE are two ways to separate the tasks: "
            f"DCW is on and DISENTANGLE is {decoder.DISENTANGLE!r}; set DCW to False or "
            "DISENTANGLE to 'none'"
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
