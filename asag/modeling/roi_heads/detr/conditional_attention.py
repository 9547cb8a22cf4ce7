"""Conditional cross-attention (Meng et al., "Conditional DETR for Fast Training Convergence",
Section 3.3).

B images, N queries, L positions of the memory, C channels, H heads, D = C / H channels of one head.
Symbols of the paper: c_q content query (output of self-attention), p_q spatial query, c_k content
key (the memory), p_k spatial key (its position embedding), f embedding of the previous stage, s
reference point.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...layers.attention import SelfAttention, split_heads
from ...layers.feed_forward import make_mlp
from ...layers.init import xavier_init_matrices
from ..sparse_rcnn.iou_esa import IoUEnhancedSelfAttention
from .cross_attention import CrossAttention, StageMemory, project_together


class SpatialQuery(nn.Module):
    """Spatial query p_q of reference point s and embedding f (Eq. 4): the embedded reference point
    p_s, transformed by T(f). Shared by all stages.

    The first stage has no f and uses T = 1, as in the authors' code.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int,
        kind: str = "csq",
        projection: str = "diagonal",
        num_stages: int = 6,
    ) -> None:
        """
        Args:
            dim: channels C.
            num_heads: heads H, the number of blocks of a "block" projection.
            kind: Table 3. "csq" T(f) p_s; "csq_i" T(c_q) p_s; "csq_t" T(f); "csq_p" p_s; "csq_c" f.
            projection: Fig. 5, form of T. "diagonal" C numbers (Eq. 6), "single" one, "block" a
                D x D matrix a head, "full" C x C, "identity" no parameters.
            num_stages: stages that share it. A single one has no f, and T no parameters.

        Raises:
            ValueError: kind "csq_t" with another projection than "diagonal".
        """
        super().__init__()
        if kind == "csq_t" and projection != "diagonal":
            raise ValueError(
                f"MODEL.DECODER.SPATIAL_PROJECTION is {projection!r}; it must be 'diagonal' with "
                "MODEL.DECODER.SPATIAL_QUERY 'csq_t', which takes T itself as the query"
            )
        self.kind = kind
        self.projection = projection
        self.num_heads = num_heads
        outputs = {
            "diagonal": dim,
            "single": 1,
            "block": dim * dim // num_heads,
            "full": dim * dim,
        }
        learned = kind not in ("csq_p", "csq_c") and projection != "identity" and num_stages > 1
        # T = FFN(f): linear, ReLU, linear.
        self.transformation = make_mlp(dim, outputs[projection], 2) if learned else None
        xavier_init_matrices(self)

    def forward(self, f: Tensor | None, content_query: Tensor, p_s: Tensor) -> Tensor:
        """Computes the spatial queries.

        Args:
            f: (B, N, C) embedding of the previous stage, before the final norm; None in the first.
            content_query: (B, N, C) c_q.
            p_s: (B or 1, N, C) embedded reference points.

        Returns:
            p_q, (B or 1, N, C).
        """
        if self.kind == "csq_c":
            return torch.zeros_like(p_s) if f is None else f
        if f is None and self.kind == "csq_t":
            return torch.ones_like(p_s)
        if f is None or self.transformation is None:
            return p_s
        t = self.transformation(content_query if self.kind == "csq_i" else f)
        return t if self.kind == "csq_t" else self.transform(t, p_s)

    def transform(self, t: Tensor, p_s: Tensor) -> Tensor:
        """Computes T p_s for T (B, N, *) in any of its forms."""
        if self.projection in ("diagonal", "single"):
            return t * p_s  # Eq. 6
        blocks = self.num_heads if self.projection == "block" else 1
        slices = p_s.unflatten(-1, (blocks, -1, 1))  # (B, N, blocks, C / blocks, 1)
        side = slices.shape[-2]
        return (t.unflatten(-1, (blocks, side, side)) @ slices).flatten(-3)


class ConditionalCrossAttention(CrossAttention):
    """Cross-attention with concatenated content and position: the scores are c_q^T c_k + p_q^T p_k
    (Eq. 3).

    The four inputs have separate projections and are concatenated within every head. In the first
    stage, where the content queries are zero, object query and spatial key are also added to the
    content part.
    """

    def __init__(
        self, *, dim: int, num_heads: int, dropout: float = 0.0, first: bool = False
    ) -> None:
        """
        Args:
            dim: channels C.
            num_heads: heads H, a divisor of `dim`.
            dropout: rate on the attention weights while training.
            first: True for the first stage.
        """
        super().__init__(dim=dim, num_heads=num_heads, dropout=dropout)
        self.content_query = nn.Linear(dim, dim)
        self.spatial_query = nn.Linear(dim, dim)
        self.content_key = nn.Linear(dim, dim)
        self.spatial_key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.object_query = nn.Linear(dim, dim) if first else None

    def init_weights(self) -> None:
        """Initializes matrices by Xavier uniform and the output bias by zero."""
        xavier_init_matrices(self)
        nn.init.zeros_(self.out_proj.bias)

    @staticmethod
    def project_memory(
        layers: Sequence[ConditionalCrossAttention], memory: Tensor, position: Tensor
    ) -> list[StageMemory]:
        """Projects content keys, spatial keys and values of all stages at once.

        Args:
            layers: the cross-attention of each stage.
            memory: (B, L, C) c_k.
            position: (B or 1, L, C) p_k.
        """
        content = [layer for x in layers for layer in (x.content_key, x.value)]
        keys_and_values = project_together([(x.weight, x.bias) for x in content], memory)
        spatial = [x.spatial_key for x in layers]
        spatial_keys = project_together([(x.weight, x.bias) for x in spatial], position)
        return list(zip(keys_and_values[::2], spatial_keys, keys_and_values[1::2], strict=True))

    def project(
        self, query: Tensor, position: Tensor, spatial: Tensor | None, memory: StageMemory
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns queries (B, H, N, 2D), keys (B, H, L, 2D) and values (B, H, L, D)."""
        c_q, p_q, c_k, p_k, value = self.parts(query, position, spatial, memory)
        return torch.cat((c_q, p_q), dim=-1), torch.cat((c_k, p_k), dim=-1), value

    def parts(
        self, query: Tensor, position: Tensor, spatial: Tensor, memory: StageMemory
    ) -> tuple[Tensor, ...]:
        """Returns the projected c_q, p_q (B, H, N, D), c_k, p_k and values (B, H, L, D)."""
        c_k, p_k, value = memory
        c_q, p_q = self.content_query(query), self.spatial_query(spatial)
        if self.object_query is not None:
            c_q = c_q + self.object_query(position)
            c_k = c_k + p_k
        batch = query.shape[0]
        return tuple(
            split_heads(x.expand(batch, -1, -1), self.num_heads)
            for x in (c_q, p_q, c_k, p_k, value)
        )


class ConditionalSelfAttention(SelfAttention):
    """Self-attention with separate projections of content and object queries, as in the authors'
    code."""

    def __init__(self, *, dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__(dim=dim, num_heads=num_heads, dropout=dropout)
        self.position_proj = nn.Linear(dim, 2 * dim)  # of queries and keys

    def init_weights(self) -> None:
        """Initializes each projection by Xavier uniform, with default biases."""
        dim = self.out_proj.out_features
        self.in_proj.reset_parameters()
        for packed in (self.in_proj, self.position_proj, self.out_proj):
            for matrix in packed.weight.split(dim):
                nn.init.xavier_uniform_(matrix)
        nn.init.zeros_(self.out_proj.bias)

    def project(
        self, query: Tensor, position: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Projects (B, N, C) to queries, keys and values of all heads, (B, H, N, D) each."""
        q, k, v = self.in_proj(query).chunk(3, dim=-1)
        position_q, position_k = self.position_proj(position).chunk(2, dim=-1)
        parts = (q + position_q, k + position_k, v)
        return tuple(split_heads(x, self.num_heads) for x in parts)


class IoUEnhancedConditionalSelfAttention(ConditionalSelfAttention, IoUEnhancedSelfAttention):
    """IoU-enhanced self-attention with the projections of Conditional DETR."""
