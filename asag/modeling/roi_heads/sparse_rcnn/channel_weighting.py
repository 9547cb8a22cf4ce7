"""Dynamic channel weighting: separate channel masks of the box features for the two tasks.

Zhao et al., "IoU-Enhanced Attention for End-to-End Task Specific Object Detection", Section 3.3.
B images, N queries, R = B * N, C channels, P pooled positions.
"""

from __future__ import annotations

from torch import Tensor, nn

from ...layers.feed_forward import FeedForward
from .dynamic_conv import DynamicConv, RoIProjection

# C divided by the width of the mask's bottleneck.
REDUCTION = 8


class ChannelMask(nn.Module):
    """Channel mask sigma(g_m(q)) of Eq. 4, (..., C) -> (..., C) in (0, 1).

    g_m is a bottleneck of two linear layers without activation between them.
    """

    def __init__(self, *, dim: int) -> None:
        super().__init__()
        self.reduce = nn.Linear(dim, max(dim // REDUCTION, 1))
        self.expand = nn.Linear(self.reduce.out_features, dim)

    def forward(self, query: Tensor) -> Tensor:
        return self.expand(self.reduce(query)).sigmoid()


class TaskPath(nn.Module):
    """Branch of one task between the shared dynamic convolution and its tower.

    The paper shows the mask and the projection of the box feature; norm and activation behind the
    mask, and the projection of the query, are details of the authors' code.
    """

    def __init__(
        self,
        *,
        dim: int,
        ffn_dim: int,
        num_positions: int,
        activation: str = "relu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.mask = ChannelMask(dim=dim)
        self.mask_norm = nn.LayerNorm(dim)
        self.mask_activation = nn.ReLU()
        self.project = RoIProjection(dim=dim, num_positions=num_positions)
        self.query_proj = nn.Linear(dim, dim)
        self.query_norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(dim)
        self.ffn = FeedForward(dim=dim, hidden_dim=ffn_dim, activation=activation, dropout=dropout)

    def object_feature(self, query: Tensor, filtered: Tensor) -> Tensor:
        """Computes Eq. 4 and the projection behind it, (B, N, C) and (R, P, C) -> (B, N, C).

        The norm is over channels, so a mask changes their relative weights, not their scale.
        """
        mask = self.mask(query).flatten(0, 1)[:, None]  # (R, 1, C)
        weighted = self.mask_activation(self.mask_norm(filtered * mask))
        return self.project(weighted).view(query.shape)

    def forward(self, query: Tensor, filtered: Tensor) -> Tensor:
        """Computes the input of the task's tower.

        Args:
            query: (B, N, C) after self-attention.
            filtered: (R, P, C) box features after the dynamic convolution.

        Returns:
            (B, N, C).
        """
        feature = self.object_feature(query, filtered)
        return self.ffn(self.norm(self.query_norm(self.query_proj(query)) + self.dropout(feature)))


class ChannelWeightedInteraction(nn.Module):
    """Interaction of a query with its box features: a dynamic convolution, then a branch for each
    task."""

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
        sizes = {"dim": dim, "ffn_dim": ffn_dim, "num_positions": num_positions}
        self.cls_path = TaskPath(**sizes, activation=activation, dropout=dropout)
        self.reg_path = TaskPath(**sizes, activation=activation, dropout=dropout)

    def forward(self, query: Tensor, roi_features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Computes the inputs of the towers and the next query.

        Args:
            query: (B, N, C) after self-attention.
            roi_features: (R, P, C).

        Returns:
            Inputs of class tower and box tower, and the query of the next stage, which is their sum
            (Section 3.3), (B, N, C) each.
        """
        filtered = self.conv(query.flatten(0, 1), roi_features)
        cls_query = self.cls_path(query, filtered)
        reg_query = self.reg_path(query, filtered)
        return cls_query, reg_query, cls_query + reg_query
