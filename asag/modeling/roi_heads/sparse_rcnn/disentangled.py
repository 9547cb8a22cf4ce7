"""Disentangled dynamic convolution: each task gets half of the channels (an ablation).

Zhao et al., "IoU-Enhanced Attention for End-to-End Task Specific Object Detection", Section 3.1,
Fig. 3 and Table 2. B images, N queries, R = B * N, C channels, D dynamic channels, P pooled
positions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...layers.feed_forward import FeedForward
from .dynamic_conv import DynamicConv, RoIProjection

TASKS = 2


class SplitDynamicConv(DynamicConv):
    """Dynamic convolution of each task on its half of the channels: (P, C/2) -> (P, D) -> (P, C/2).

    Has the parameters of one `DynamicConv` of width C: a query generates two pairs of kernels of
    half the width.
    """

    def forward(self, query: Tensor, roi_features: Tensor) -> Tensor:
        """Filters the box features.

        Args:
            query: (R, C).
            roi_features: (R, P, C), the first half of the channels for classification.

        Returns:
            (R, 2, P, C/2) filtered features of the two tasks.
        """
        rows, positions, _ = roi_features.shape
        half = self.dim // TASKS
        first, second = self.dynamic_layer(query).chunk(2, dim=-1)
        first = first.reshape(rows * TASKS, half, self.dynamic_dim)
        second = second.reshape(rows * TASKS, self.dynamic_dim, half)
        split = roi_features.view(rows, positions, TASKS, half).transpose(1, 2)
        x = split.reshape(rows * TASKS, positions, half).to(first.dtype)
        x = self.activation(self.norm1(torch.bmm(x, first)))
        x = torch.bmm(x.to(second.dtype), second).view(rows, TASKS, positions, half)
        scale = self.norm2.weight.view(TASKS, 1, half)
        shift = self.norm2.bias.view(TASKS, 1, half)
        return self.activation(F.layer_norm(x, (half,), eps=self.norm2.eps) * scale + shift)


class DisentangledInteraction(nn.Module):
    """Interaction of a query with its box features by one half of the channels for each task.

    The figure does not show the layers behind the two projections. This version, in which the
    halves are concatenated for residual, norm and feed-forward block, has the 97.0 M parameters of
    Table 2.
    """

    def __init__(
        self,
        *,
        dim: int,
        dynamic_dim: int,
        ffn_dim: int,
        num_positions: int,
        recover_dim: bool,
        activation: str = "relu",
        dropout: float = 0.0,
    ) -> None:
        """
        Args:
            dim: channels C, an even number.
            dynamic_dim: D.
            ffn_dim: inner width of the feed-forward block.
            num_positions: P.
            recover_dim: project each half back to C before its tower (Fig. 3c) or not (Fig. 3b).
            activation, dropout: of the feed-forward block and the residual.

        Raises:
            ValueError: `dim` is odd.
        """
        super().__init__()
        if dim % TASKS:
            raise ValueError(
                f"MODEL.DECODER.HIDDEN_DIM is {dim}; it must be even with MODEL.DECODER.DISENTANGLE"
            )
        half = dim // TASKS
        self.task_dim = dim if recover_dim else half
        self.conv = SplitDynamicConv(dim=dim, dynamic_dim=dynamic_dim)
        self.project = nn.ModuleList(
            RoIProjection(dim=half, num_positions=num_positions) for _ in range(TASKS)
        )
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(dim)
        self.ffn = FeedForward(dim=dim, hidden_dim=ffn_dim, activation=activation, dropout=dropout)
        self.recover = nn.ModuleList(
            nn.Linear(half, dim) if recover_dim else nn.Identity() for _ in range(TASKS)
        )

    def forward(self, query: Tensor, roi_features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Computes the inputs of the towers and the next query.

        Args:
            query: (B, N, C) after self-attention.
            roi_features: (R, P, C).

        Returns:
            Inputs of class tower and box tower, (B, N, `task_dim`) each, and the query of the next
            stage (B, N, C).
        """
        filtered = self.conv(query.flatten(0, 1), roi_features).unbind(dim=1)
        features = [project(x) for project, x in zip(self.project, filtered, strict=True)]
        query = self.norm(query + self.dropout(torch.cat(features, dim=-1)).view(query.shape))
        query = self.ffn(query)
        cls_query, reg_query = (
            recover(x) for recover, x in zip(self.recover, query.chunk(TASKS, dim=-1), strict=True)
        )
        return cls_query, reg_query, query
