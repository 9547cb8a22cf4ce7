"""Proposal block: RoI features of each anchor, self-attention, and first predictions (ASAG, Section
3.3).

B images, N queries, C channels, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from ...layers.feed_forward import FeedForward
from ...layers.init import xavier_init_matrices
from ...layers.overlap_attention import PositionedSelfAttention
from ...layers.roi_align import PyramidRoIAlign, build_pooler
from ...layers.xyzr import XYZRPredictor, boxes_to_xyzr


class ProposalBlock(nn.Module):
    """Computes content, class logits and refined boxes of anchors."""

    def __init__(
        self,
        *,
        pooler: PyramidRoIAlign,
        dim: int,
        num_logits: int,
        num_heads: int = 8,
        ffn_dim: int = 2048,
        num_cls_layers: int = 1,
        num_reg_layers: int = 3,
        activation: str = "gelu",
        dropout: float = 0.0,
        prior_prob: float | None = 0.01,
    ) -> None:
        """
        Args:
            pooler: pools the features of an anchor.
            dim: channels C.
            num_logits: K, or K + 1 with a background column.
            num_heads: attention heads.
            ffn_dim: inner width of the feed-forward block.
            num_cls_layers, num_reg_layers: depth of the towers.
            activation: of feed-forward block and towers.
            dropout: rate in attention and feed-forward block.
            prior_prob: initial class probability; None for softmax classifiers.
        """
        super().__init__()
        self.pooler = pooler
        self.project = nn.Linear(dim * pooler.output_size**2, dim)
        self.project_norm = nn.LayerNorm(dim)
        self.attention = PositionedSelfAttention(dim=dim, num_heads=num_heads, dropout=dropout)
        self.ffn = FeedForward(dim=dim, hidden_dim=ffn_dim, activation=activation, dropout=dropout)
        self.predictor = XYZRPredictor(
            dim=dim,
            num_logits=num_logits,
            num_cls_layers=num_cls_layers,
            num_reg_layers=num_reg_layers,
            activation=activation,
            prior_prob=prior_prob,
        )
        for module in (self.project, self.attention, self.ffn):
            xavier_init_matrices(module)

    def forward(
        self, maps: Sequence[Tensor], anchors_xyxy: Tensor, valid: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Computes queries for the anchors.

        Args:
            maps: (B, C, H, W) a level.
            anchors_xyxy: (B, N, 4) pixels, without gradient.
            valid: (B, N) or (B, N, N) attention mask; None if all anchors are valid.

        Returns:
            Content (B, N, C), logits (B, N, K) and proposals (B, N, 4) xyxy in pixels, initially
            equal to the anchors.
        """
        pooled = self.pooler(maps, anchors_xyxy).flatten(1)  # (B * N, C * P * P)
        content = self.project_norm(self.project(pooled)).view(*anchors_xyxy.shape[:2], -1)
        xyzr = boxes_to_xyzr(anchors_xyxy)
        content = self.ffn(self.attention(content, xyzr, anchors_xyxy, valid))
        logits, proposals_xyxy = self.predictor(content, xyzr)
        return content, logits, proposals_xyxy


def build_proposal_block(cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> ProposalBlock:
    """Builds the block on the maps of `MODEL.ROI_HEADS.IN_FEATURES` by `MODEL.DECODER` and
    `MODEL.ASAG`."""
    decoder, heads = cfg.MODEL.DECODER, cfg.MODEL.ROI_HEADS
    focal = cfg.MODEL.CRITERION.CLASS_LOSS == "focal"
    return ProposalBlock(
        pooler=build_pooler(cfg, input_shape),
        dim=decoder.HIDDEN_DIM,
        num_logits=heads.NUM_CLASSES + (not focal),
        num_heads=decoder.NUM_HEADS,
        ffn_dim=cfg.MODEL.ASAG.FFN_DIM,
        num_cls_layers=cfg.MODEL.ASAG.NUM_CLS_LAYERS,
        num_reg_layers=cfg.MODEL.ASAG.NUM_REG_LAYERS,
        activation="gelu",
        dropout=decoder.DROPOUT,
        prior_prob=decoder.PRIOR_PROB if focal else None,
    )
