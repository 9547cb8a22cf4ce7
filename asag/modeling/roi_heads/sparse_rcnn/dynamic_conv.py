"""Dynamic convolution: each query filters the features of its own box (Sparse R-CNN, Section 3.3).

R = B * N queries, C channels, D dynamic channels, P = pooled positions of one box.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...layers.feed_forward import FeedForward


class DynamicConv(nn.Module):
    """Two consecutive 1x1 convolutions whose kernels a query generates: (P, C) -> (P, D) -> (P,
    C)."""

    def __init__(self, *, dim: int, dynamic_dim: int, query_dim: int | None = None) -> None:
        """
        Args:
            dim: channels C of the box features.
            dynamic_dim: inner width D.
            query_dim: channels of the query; default `dim`.
        """
        super().__init__()
        self.dim = dim
        self.dynamic_dim = dynamic_dim
        self.dynamic_layer = nn.Linear(query_dim or dim, 2 * dim * dynamic_dim)
        self.norm1 = nn.LayerNorm(dynamic_dim)
        self.norm2 = nn.LayerNorm(dim)
        self.activation = nn.ReLU()

    def forward(self, query: Tensor, roi_features: Tensor) -> Tensor:
        """
        Args:
            query: (R, query_dim).
            roi_features: (R, P, C).

        Returns:
            (R, P, C) filtered features, after the second norm and activation.
        """
        first, second = self.dynamic_layer(query).chunk(2, dim=-1)
        first = first.view(-1, self.dim, self.dynamic_dim)
        second = second.view(-1, self.dynamic_dim, self.dim)
        x = self.activation(self.norm1(torch.bmm(roi_features.to(first.dtype), first)))
        return self.activation(self.norm2(torch.bmm(x.to(second.dtype), second)))


class RoIProjection(nn.Module):
    """Flattens filtered box features, position-major, into one vector a query: (R, P, C) -> (R,
    C')."""

    def __init__(self, *, dim: int, num_positions: int, out_dim: int | None = None) -> None:
        super().__init__()
        out_dim = out_dim or dim
        self.linear = nn.Linear(num_positions * dim, out_dim)
        self.norm = nn.LayerNorm(out_dim)
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        # The activation stands before the residual sum that follows: the interaction only adds.
        return self.activation(self.norm(self.linear(x.flatten(1))))


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
