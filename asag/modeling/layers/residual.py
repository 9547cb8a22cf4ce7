"""A sublayer of a transformer and its norm, in either order."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class Residual(nn.Module):
    """LN(x + f(x)) (Vaswani et al., 2017), or x + f(LN(x)) with `pre_norm`."""

    def __init__(self, *, dim: int, dropout: float = 0.0, pre_norm: bool = False) -> None:
        """
        Args:
            dim: channels of x, (..., dim).
            dropout: rate on f's output while training.
            pre_norm: norm in front of f instead of behind the sum.
        """
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        self.pre_norm = pre_norm

    def forward(self, x: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        """Adds `sublayer`, a function of x that keeps its shape."""
        if self.pre_norm:
            return x + self.dropout(sublayer(self.norm(x)))
        return self.norm(x + self.dropout(sublayer(x)))
