"""Self-attention among the queries of one image.

B images, N queries, C channels, H heads, D = C / H channels of one head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SelfAttention(nn.Module):
    """Multi-head self-attention with one packed projection (Vaswani et al., 2017).

    Subclasses override `mix`, the mixing of the values.
    """

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
        self.in_proj = nn.Linear(dim, 3 * dim)
        self.out_proj = nn.Linear(dim, dim)
        nn.init.zeros_(self.in_proj.bias)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        query: Tensor,
        boxes_xyxy: Tensor | None,
        valid: Tensor | None,
        position: Tensor | None = None,
    ) -> Tensor:
        """Attends to the queries of the same image.

        Args:
            query: (B, N, C).
            boxes_xyxy: (B, N, 4) input boxes of the stage; not used by plain attention.
            valid: (B, N) or (B, N, N) bool, see `attendable`; None if all queries are valid. Padded
                queries are never attended.
            position: (B or 1, N, C) embedding added to queries and keys but not to values; None
                adds nothing.

        Returns:
            (B, N, C); rows of padded queries hold finite but meaningless values.
        """
        q, k, v = self.project(query, position)
        mixed = self.mix(q, k, v, boxes_xyxy, valid)
        return self.out_proj(mixed.transpose(1, 2).reshape(query.shape))

    def project(
        self, query: Tensor, position: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Projects (B, N, C) to queries, keys and values of all heads, (B, H, N, D) each."""
        if position is None:
            packed = self.in_proj(query).view(*query.shape[:2], 3, self.num_heads, -1)
            q, k, v = packed.permute(2, 0, 3, 1, 4)
            return q, k, v
        dim = query.shape[-1]
        weight, bias = self.in_proj.weight, self.in_proj.bias
        q, k = F.linear(query + position, weight[: 2 * dim], bias[: 2 * dim]).chunk(2, dim=-1)
        v = F.linear(query, weight[2 * dim :], bias[2 * dim :])
        return tuple(split_heads(x, self.num_heads) for x in (q, k, v))

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, boxes_xyxy: Tensor | None, valid: Tensor | None
    ) -> Tensor:
        """Mixes values (B, H, N, D) by softmax(q k^T / sqrt(D))."""
        mask = None if valid is None else self.mask(valid)
        dropout = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)

    def mask(self, valid: Tensor) -> Tensor:
        """Returns the attention mask, which broadcasts to (B, H, N, N)."""
        return attendable(valid)


def check_heads(dim: int, num_heads: int) -> None:
    """Raises ValueError if `num_heads` heads cannot share `dim` channels equally."""
    if dim % num_heads:
        raise ValueError(
            f"MODEL.DECODER.NUM_HEADS is {num_heads}; it must divide MODEL.DECODER.HIDDEN_DIM "
            f"({dim})"
        )


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """Splits the channels into heads, (B, N, H * D) -> (B, H, N, D), without a copy."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """Joins the heads, (B, H, N, D) -> (B, N, H * D)."""
    return x.transpose(1, 2).flatten(2)


def attendable(valid: Tensor) -> Tensor:
    """Returns an attention mask (B, 1, N, N) of the valid keys and the diagonal, so that every row
    has a key.

    Args:
        valid: (B, N) bool mask of valid keys, or (B, N, N) bool mask of the keys (columns) that
            each query (row) may attend to.
    """
    diagonal = torch.eye(valid.shape[1], dtype=torch.bool, device=valid.device)
    keys = valid if valid.dim() == 3 else valid[:, None]
    return (keys | diagonal)[:, None]
