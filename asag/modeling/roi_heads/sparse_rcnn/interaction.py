"""Dynamic instance interaction of Sparse R-CNN (Section 3.3, Fig. 4): one path for class and box.

B images, N queries, C channels, P pooled positions.
"""

from __future__ import annotations

from torch import Tensor, nn

from ...layers.feed_forward import FeedForward
from .dynamic_conv import DynamicConv, RoIProjection


class DynamicInteraction(nn.Module):
    """Query meets its box: dynamic convolution, residual, norm, feed-forward block."""

    def __init__(
        self,
        *,
        dim: int,
        dynamic_dim: int,
        ffn_dim: int,
        num_positions: int,
        activation: str = "relu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.task_dim = dim
        self.conv = DynamicConv(dim=dim, dynamic_dim=dynamic_dim)
        self.project = RoIProjection(dim=dim, num_positions=num_positions)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(dim)
        self.ffn = FeedForward(dim=dim, hidden_dim=ffn_dim, activation=activation, dropout=dropout)

    def forward(self, query: Tensor, roi_features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """
        Args:
            query: (B, N, C) after self-attention.
            roi_features: (B * N, P, C).

        Returns:
            What the class tower reads, what the box tower reads, and the next stage's query: here
            three times the same (B, N, C).
        """
        filtered = self.conv(query.flatten(0, 1), roi_features)
        query = self.norm(query + self.dropout(self.project(filtered)).view(query.shape))
        query = self.ffn(query)
        return query, query, query
