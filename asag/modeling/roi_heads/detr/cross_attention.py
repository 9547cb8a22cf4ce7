"""Cross-attention of queries over the memory (DETR, supplement A.3).

B images, N queries, L positions of the memory, C channels, H heads, S stages.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...layers.attention import check_heads, merge_heads, split_heads
from ...layers.boxes import at_least_float32
from ...layers.exporting import is_exporting

StageMemory = tuple[Tensor, ...]
"""Projected keys and values of the memory for one stage, (B, L, C) each."""


def project_together(layers: Sequence[tuple[Tensor, Tensor]], x: Tensor) -> tuple[Tensor, ...]:
    """Applies linear layers of equal shape, (weight, bias) each, to the same (B, L, C) by one
    matrix product."""
    weights, biases = zip(*layers, strict=True)
    return F.linear(x, torch.cat(weights), torch.cat(biases)).chunk(len(layers), dim=-1)


class CrossAttention(nn.Module):
    """Multi-head cross-attention; subclasses implement the projections in `project`."""

    def __init__(self, *, dim: int, num_heads: int, dropout: float = 0.0) -> None:
        """
        Args:
            dim: channels C.
            num_heads: heads H, a divisor of `dim`.
            dropout: rate on the attention weights while training.
        """
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.dropout = dropout
        self.out_proj = nn.Linear(dim, dim)

    def project(
        self, query: Tensor, position: Tensor, spatial: Tensor | None, memory: StageMemory
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns queries (B, H, N, E), keys (B, H, L, E) and values (B, H, L, C / H)."""
        raise NotImplementedError

    def forward(
        self,
        query: Tensor,
        position: Tensor,
        spatial: Tensor | None,
        memory: StageMemory,
        mask: Tensor | None,
    ) -> Tensor:
        """Attends to the memory.

        Args:
            query: (B, N, C) content queries.
            position: (B or 1, N, C) object queries.
            spatial: (B or 1, N, C) spatial queries of conditional attention; None for others.
            memory: output of `project_memory` for this stage.
            mask: (B, 1, 1, L) bool, True on positions to attend; None for all positions.

        Returns:
            (B, N, C).
        """
        q, k, v = self.project(query, position, spatial, memory)
        dropout = self.dropout if self.training else 0.0
        mixed = attend(q, k, v, mask, dropout)
        return self.out_proj(merge_heads(mixed))

    def weights(
        self,
        query: Tensor,
        position: Tensor,
        spatial: Tensor | None,
        memory: StageMemory,
        mask: Tensor | None,
    ) -> Tensor:
        """Computes attention weights (B, H, N, L) for the arguments of `forward`, without a fused
        kernel: for figures, and as a reference."""
        q, k, _ = self.project(query, position, spatial, memory)
        return attention_weights(q, k, mask)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float = 0.0) -> Tensor:
    """Computes softmax(q k^T / sqrt(E)) v by a fused kernel; values may be narrower than keys.

    The fused kernel of the CPU requires equal widths; padding the values costs less than the
    weights (B, H, N, L) that torch would compute otherwise. Traces (for counting operations) and
    exports record the attention as on other devices.
    """
    width = v.shape[-1]
    recorded = torch.jit.is_tracing() or is_exporting()
    if q.device.type == "cpu" and width < q.shape[-1] and not recorded:
        v = F.pad(v, (0, q.shape[-1] - width))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)[..., :width]


def attention_weights(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """Computes softmax(q k^T / sqrt(E)) of (B, H, N, E) and (B, H, L, E), in at least float32."""
    scores = at_least_float32(q @ k.transpose(-2, -1)) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return scores.softmax(dim=-1)


class DETRCrossAttention(CrossAttention):
    """Cross-attention with added position: q = W (c_q + o_q), k = W (c_k + p_k), v = W c_k."""

    def __init__(self, *, dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__(dim=dim, num_heads=num_heads, dropout=dropout)
        self.in_proj = nn.Linear(dim, 3 * dim)  # of queries, keys and values
        nn.init.zeros_(self.in_proj.bias)
        nn.init.zeros_(self.out_proj.bias)

    def projections(self) -> list[tuple[Tensor, Tensor]]:
        """Returns weight and bias of the projections of queries, keys and values."""
        dim = self.out_proj.in_features
        return list(zip(self.in_proj.weight.split(dim), self.in_proj.bias.split(dim), strict=True))

    @staticmethod
    def project_memory(
        layers: Sequence[DETRCrossAttention], memory: Tensor, position: Tensor
    ) -> list[StageMemory]:
        """Projects keys and values of all S stages at once.

        Args:
            layers: the cross-attention of each stage.
            memory: (B, L, C) content keys c_k.
            position: (B or 1, L, C) spatial keys p_k.
        """
        _, key_layers, value_layers = zip(*(x.projections() for x in layers), strict=True)
        keys = project_together(key_layers, memory + position)
        return list(zip(keys, project_together(value_layers, memory), strict=True))

    def project(
        self, query: Tensor, position: Tensor, spatial: Tensor | None, memory: StageMemory
    ) -> tuple[Tensor, Tensor, Tensor]:
        key, value = memory
        query = F.linear(query + position, *self.projections()[0])
        return tuple(split_heads(x, self.num_heads) for x in (query, key, value))
