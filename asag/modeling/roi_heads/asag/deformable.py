"""Decoder stage of Deformable DETR with boxes as references (Zhu et al., ICLR 2021, Section 4.2 and
A.4).

B images, N queries, L levels, C channels, K classes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ...layers.attention import SelfAttention
from ...layers.boxes import at_least_float32, cxcywh_to_xyxy, xyxy_to_cxcywh
from ...layers.deformable_attention import DeformableAttention, MultiScaleMemory
from ...layers.feed_forward import FeedForward, Residual, make_mlp
from ...layers.init import prior_bias, xavier_init_matrices
from ...layers.position_encoding import TEMPERATURE, inverse_sigmoid


def embed_boxes(boxes_cxcywh: Tensor, dim: int) -> Tensor:
    """Embeds boxes (..., 4) in shares of the image as (..., 4 * dim), sine and cosine
    interleaved."""
    pairs = torch.arange(dim // 2, device=boxes_cxcywh.device, dtype=boxes_cxcywh.dtype)
    wavelength = TEMPERATURE ** (2 * pairs / dim)
    angle = (2 * math.pi * boxes_cxcywh)[..., None] / wavelength
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(-3)


class DeformableDecoderLayer(nn.Module):
    """Self-attention of the queries, deformable cross-attention, feed-forward block."""

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int = 8,
        num_levels: int = 4,
        num_points: int = 4,
        ffn_dim: int = 1024,
        activation: str = "relu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.self_attention = SelfAttention(dim=dim, num_heads=num_heads, dropout=dropout)
        self.self_residual = Residual(dim=dim, dropout=dropout)
        self.cross_attention = DeformableAttention(
            dim=dim, num_heads=num_heads, num_levels=num_levels, num_points=num_points
        )
        self.cross_residual = Residual(dim=dim, dropout=dropout)
        self.ffn = FeedForward(dim=dim, hidden_dim=ffn_dim, activation=activation, dropout=dropout)
        xavier_init_matrices(self.self_attention)
        xavier_init_matrices(self.ffn)

    def forward(
        self,
        query: Tensor,
        position: Tensor,
        boxes_cxcywh: Tensor,
        memory: MultiScaleMemory,
        mask: Tensor | None,
    ) -> Tensor:
        """Updates the queries.

        Args:
            query: (B, N, C).
            position: (B, N, C) position embedding, added to the inputs of attention except values.
            boxes_cxcywh: (B, N, 4) in shares of the unpadded image.
            memory: all levels.
            mask: (B, N) or (B, N, N) bool; None if all queries are valid.

        Returns:
            (B, N, C).
        """
        query = self.self_residual(query, lambda x: self.self_attention(x, None, mask, position))
        ratios = memory.valid_ratios.repeat(1, 1, 2)[:, None].to(boxes_cxcywh.dtype)
        reference = boxes_cxcywh[:, :, None] * ratios  # (B, N, L, 4)
        query = self.cross_residual(
            query, lambda x: self.cross_attention(x + position, reference, memory)
        )
        return self.ffn(query)


class DeformableStage(nn.Module):
    """Deformable decoder layer with its own class and box predictor.

    The authors of ASAG report results of this stage but have not released it; this is Deformable
    DETR's layer with boxes as references.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_logits: int,
        num_heads: int = 8,
        num_levels: int = 4,
        num_points: int = 4,
        ffn_dim: int = 1024,
        num_reg_layers: int = 3,
        activation: str = "relu",
        dropout: float = 0.0,
        prior_prob: float | None = 0.01,
    ) -> None:
        """
        Args:
            dim: channels C, an even number.
            num_logits: classes K, or K + 1 with a background column.
            num_heads, num_levels, num_points: of the deformable attention.
            ffn_dim: inner width of the feed-forward block.
            num_reg_layers: layers of the box predictor.
            activation, dropout: of the layer.
            prior_prob: initial class probability; None for softmax classifiers.
        """
        super().__init__()
        self.box_dim = dim // 2
        self.position = nn.Sequential(nn.Linear(4 * self.box_dim, dim), nn.LayerNorm(dim))
        self.layer = DeformableDecoderLayer(
            dim=dim,
            num_heads=num_heads,
            num_levels=num_levels,
            num_points=num_points,
            ffn_dim=ffn_dim,
            activation=activation,
            dropout=dropout,
        )
        self.class_logits = nn.Linear(dim, num_logits)
        self.box_deltas = make_mlp(dim, 4, num_reg_layers)
        nn.init.zeros_(self.box_deltas[-1].weight)
        nn.init.zeros_(self.box_deltas[-1].bias)
        if prior_prob is not None:
            nn.init.constant_(self.class_logits.bias, prior_bias(prior_prob))

    def forward(
        self,
        content: Tensor,
        boxes_xyxy: Tensor,
        memory: MultiScaleMemory,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Refines the boxes.

        Args:
            content: (B, N, C).
            boxes_xyxy: (B, N, 4) pixels, without gradient.
            memory: all levels.
            mask: (B, N) or (B, N, N) bool; None if all queries are valid.

        Returns:
            Logits (B, N, K), boxes (B, N, 4) xyxy in pixels, next content (B, N, C).
        """
        scale = memory.whwh[:, None]
        boxes = xyxy_to_cxcywh(at_least_float32(boxes_xyxy) / scale)
        position = self.position(embed_boxes(boxes, self.box_dim).to(content.dtype))
        query = self.layer(content, position, boxes, memory, mask)
        logits, refined = self.refine_boxes(query, boxes)
        return logits, cxcywh_to_xyxy(refined) * scale, query

    def refine_boxes(self, query: Tensor, boxes_cxcywh: Tensor) -> tuple[Tensor, Tensor]:
        """Returns logits (B, N, K) and boxes (B, N, 4) cxcywh in shares of the image."""
        moved = inverse_sigmoid(boxes_cxcywh) + at_least_float32(self.box_deltas(query))
        return at_least_float32(self.class_logits(query)), moved.sigmoid()
