"""Building blocks of encoder layers and decoder stages: residual connection, feed-forward block,
and the towers in front of the predictors."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU}


def make_activation(name: str) -> nn.Module:
    """Builds an activation by its name, "relu" or "gelu"."""
    return ACTIVATIONS[name]()


class Residual(nn.Module):
    """Residual connection with norm: LN(x + f(x)) (Vaswani et al., 2017), or x + f(LN(x)) with
    `pre_norm`."""

    def __init__(self, *, dim: int, dropout: float = 0.0, pre_norm: bool = False) -> None:
        """
        Args:
            dim: channels of x, (..., dim).
            dropout: rate on the output of f.
            pre_norm: norm in front of f instead of behind the sum.
        """
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        self.pre_norm = pre_norm

    def forward(self, x: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        """Adds `sublayer(x)`, which has the shape of x."""
        if self.pre_norm:
            return x + self.dropout(sublayer(self.norm(x)))
        return self.norm(x + self.dropout(sublayer(x)))


class FeedForward(nn.Module):
    """Two-layer network with residual connection, (..., C) -> (..., C): LN(x + W2 act(W1 x)), or
    x + W2 act(W1 LN(x)) with `pre_norm`."""

    def __init__(
        self,
        *,
        dim: int,
        hidden_dim: int,
        activation: str = "relu",
        dropout: float = 0.0,
        pre_norm: bool = False,
    ) -> None:
        super().__init__()
        self.linear1 = nn.Linear(dim, hidden_dim)
        self.activation = make_activation(activation)
        self.inner_dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(hidden_dim, dim)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(dim)
        self.pre_norm = pre_norm

    def forward(self, x: Tensor) -> Tensor:
        if self.pre_norm:
            return x + self._inner(self.norm(x))
        return self.norm(x + self._inner(x))

    def _inner(self, x: Tensor) -> Tensor:
        hidden = self.inner_dropout(self.activation(self.linear1(x)))
        return self.dropout(self.linear2(hidden))


def make_mlp(dim: int, out_dim: int, depth: int) -> nn.Sequential:
    """Builds `depth` linear layers with ReLU between them and inner width `dim`."""
    layers: list[nn.Module] = []
    for _ in range(depth - 1):
        layers += [nn.Linear(dim, dim), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(dim, out_dim))


def make_tower(dim: int, depth: int, activation: str = "relu") -> nn.Sequential:
    """Builds `depth` times [linear without bias, LayerNorm, activation] of width `dim`."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(dim, dim, bias=False), nn.LayerNorm(dim), make_activation(activation)]
    return nn.Sequential(*layers)
