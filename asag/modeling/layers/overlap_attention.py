"""Self-attention with a bias by the overlap of boxes (AdaMixer, Section 3.3, Eq. 7).

B images, N queries, C channels, H heads, D = C / H channels of one head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import SelfAttention, attendable
from .boxes import at_least_float32, box_area, intersection_and_union
from .xyzr import encode_xyzr

EPS = 1e-7
MAX_TAU = 4.0


def overlap_with_query(boxes_xyxy: Tensor) -> Tensor:
    """Returns the share of box i (row) that box j (column) covers, (B, N, N), without gradient."""
    boxes = at_least_float32(boxes_xyxy.detach())
    intersection, _ = intersection_and_union(boxes[:, :, None], boxes[:, None])
    return intersection / box_area(boxes).clamp(min=1e-6)[..., None]


class OverlapSelfAttention(SelfAttention):
    """Multi-head self-attention with the bias tau_h * log(overlap), tau_h learned for each head."""

    def __init__(self, *, dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__(dim=dim, num_heads=num_heads, dropout=dropout)
        self.tau = nn.Parameter(torch.empty(num_heads).uniform_(0, MAX_TAU))

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, boxes_xyxy: Tensor, valid: Tensor | None
    ) -> Tensor:
        """Mixes values (B, H, N, D) by softmax(q k^T / sqrt(D) + bias)."""
        overlap = overlap_with_query(boxes_xyxy)[:, None]  # (B, 1, N, N)
        bias = self.tau[:, None, None] * (overlap + EPS).log()
        if valid is not None:
            bias = bias.masked_fill(~attendable(valid), -torch.inf)
        dropout = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=bias.to(q.dtype), dropout_p=dropout
        )


class PositionedSelfAttention(nn.Module):
    """Overlap self-attention with position embedding, residual connection and norm.

    The residual includes the position embedding, so that all following layers receive it.
    """

    def __init__(self, *, dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.attention = OverlapSelfAttention(dim=dim, num_heads=num_heads, dropout=dropout)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(dim)

    def forward(
        self, content: Tensor, xyzr: Tensor, boxes_xyxy: Tensor, valid: Tensor | None
    ) -> Tensor:
        """Attends to the queries of the same image.

        Args:
            content: (B, N, C).
            xyzr: (B, N, 4) the boxes in AdaMixer's coordinates.
            boxes_xyxy: (B, N, 4) the same boxes in pixels.
            valid: (B, N) or (B, N, N) bool; None if all queries are valid.

        Returns:
            (B, N, C).
        """
        query = content + encode_xyzr(xyzr, content.shape[-1]).to(content.dtype)
        return self.norm(query + self.dropout(self.attention(query, boxes_xyxy, valid)))
