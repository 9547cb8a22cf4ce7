"""Refinement stage of the Sparse R-CNN family (Sparse R-CNN, Section 3.3).

B images, N queries, C channels, K classes, P pooled positions.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from ...layers.boxes import MAX_SCALE, at_least_float32, decode_deltas
from ...layers.feed_forward import make_tower
from ...layers.init import prior_bias, xavier_init_matrices


class DynamicConvStage(nn.Module):
    """Self-attention of the queries, interaction with their box features, class and box prediction.

    The papers differ in `attention` and `interaction`.
    """

    SETTINGS: ClassVar[dict[str, str]] = {
        "MODEL.DECODER.MIN_BOX_SCALE": "min_box_scale",
        "MODEL.DECODER.MAX_BOX_SCALE": "max_box_scale",
    }

    def __init__(
        self,
        *,
        attention: nn.Module,
        interaction: nn.Module,
        dim: int,
        num_logits: int,
        num_cls_layers: int = 1,
        num_reg_layers: int = 3,
        activation: str = "relu",
        dropout: float = 0.0,
        prior_prob: float | None = 0.01,
        min_box_scale: float = 0.0,
        max_box_scale: float = MAX_SCALE,
    ) -> None:
        """
        Args:
            attention: `(query, boxes_xyxy, valid) -> (B, N, C)`.
            interaction: `(query, roi_features) -> (class query, box query, next query)`, with the
                width `task_dim` of the first two as attribute.
            dim: channels C.
            num_logits: K, or K + 1 with a background column.
            num_cls_layers, num_reg_layers: depth of the towers.
            activation: of the towers.
            dropout: rate behind the attention.
            prior_prob: initial class probability; None for softmax classifiers.
            min_box_scale, max_box_scale: bounds of the factor by which the stage may change a side
                of a box; 0 leaves shrinking free.
        """
        super().__init__()
        self.min_box_scale = min_box_scale
        self.max_box_scale = max_box_scale
        self.attention = attention
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(dim)
        self.interaction = interaction
        task_dim: int = interaction.task_dim
        self.cls_tower = make_tower(task_dim, num_cls_layers, activation)
        self.reg_tower = make_tower(task_dim, num_reg_layers, activation)
        self.class_logits = nn.Linear(task_dim, num_logits)
        self.box_deltas = nn.Linear(task_dim, 4)
        xavier_init_matrices(self)
        if prior_prob is not None:
            nn.init.constant_(self.class_logits.bias, prior_bias(prior_prob))

    def forward(
        self, query: Tensor, boxes_xyxy: Tensor, roi_features: Tensor, valid: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Refines the boxes.

        Args:
            query: (B, N, C).
            boxes_xyxy: (B, N, 4) pixels.
            roi_features: (B * N, P, C) pooled features of these boxes.
            valid: (B, N) or (B, N, N) bool; None if all queries are valid.

        Returns:
            Logits (B, N, K), refined boxes (B, N, 4) in at least float32, and the next query
            (B, N, C).
        """
        query = self.norm(query + self.dropout(self.attention(query, boxes_xyxy, valid)))
        cls_query, reg_query, query = self.interaction(query, roi_features)
        logits = self.class_logits(self.cls_tower(cls_query))
        deltas = self.box_deltas(self.reg_tower(reg_query))
        boxes_xyxy = decode_deltas(
            deltas, boxes_xyxy, min_scale=self.min_box_scale, max_scale=self.max_box_scale
        )
        return at_least_float32(logits), boxes_xyxy, query
