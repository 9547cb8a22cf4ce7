"""Which attention and which interaction a stage uses, by configuration."""

from __future__ import annotations

from detectron2.config import CfgNode
from torch import nn

from ..layers.attention import SelfAttention
from ..registry import check_choice
from .interaction import DynamicInteraction


def build_attention(cfg: CfgNode) -> nn.Module:
    """Self-attention named by `MODEL.DECODER.SELF_ATTENTION`."""
    decoder = cfg.MODEL.DECODER
    check_choice("MODEL.DECODER.SELF_ATTENTION", decoder.SELF_ATTENTION, ("msa",))
    return SelfAttention(
        dim=decoder.HIDDEN_DIM, num_heads=decoder.NUM_HEADS, dropout=decoder.DROPOUT
    )


def build_interaction(cfg: CfgNode) -> nn.Module:
    """Interaction of a query with the features of its box."""
    decoder = cfg.MODEL.DECODER
    return DynamicInteraction(
        dim=decoder.HIDDEN_DIM,
        dynamic_dim=decoder.DYNAMIC_DIM,
        ffn_dim=decoder.FFN_DIM,
        num_positions=cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION**2,
        activation=decoder.ACTIVATION,
        dropout=decoder.DROPOUT,
    )
