"""Transformer encoder over one feature map (DETR, Section 3.2 and supplement A.3).

B images, H x W cells, L = H * W, C channels.
"""

from __future__ import annotations

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from ...structures import ImageSizes
from ..layers.attention import SelfAttention
from ..layers.feed_forward import FeedForward, Residual
from ..layers.init import xavier_init_matrices
from ..layers.position_encoding import FeaturePositions
from ..registry import NECK_REGISTRY

OUTPUT = "memory"


class EncoderLayer(nn.Module):
    """Self-attention over all cells of an image and feed-forward block."""

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int,
        ffn_dim: int,
        activation: str = "relu",
        dropout: float = 0.0,
        pre_norm: bool = False,
    ) -> None:
        super().__init__()
        self.self_attention = CellAttention(dim=dim, num_heads=num_heads, dropout=dropout)
        self.self_residual = Residual(dim=dim, dropout=dropout, pre_norm=pre_norm)
        self.ffn = FeedForward(
            dim=dim,
            hidden_dim=ffn_dim,
            activation=activation,
            dropout=dropout,
            pre_norm=pre_norm,
        )

    def forward(self, x: Tensor, position: Tensor, valid: Tensor | None) -> Tensor:
        """Encodes the cells.

        Args:
            x: (B, L, C).
            position: (B or 1, L, C) embedding, added to queries and keys.
            valid: (B, L) bool, False on padding; None without padding.

        Returns:
            (B, L, C).
        """
        x = self.self_residual(x, lambda y: self.self_attention(y, None, valid, position))
        return self.ffn(x)


class CellAttention(SelfAttention):
    """Self-attention over cells. Every image has at least one valid cell."""

    def mask(self, valid: Tensor) -> Tensor:
        """Returns a mask (B, 1, 1, L), smaller than L x L: no row can be empty."""
        return valid[:, None, None]


@NECK_REGISTRY.register()
class TransformerEncoder(nn.Module):
    """Projects one feature map to C channels and refines it by self-attention.

    The output is one feature map, "memory".
    """

    @configurable
    def __init__(
        self,
        *,
        in_feature: str,
        in_shape: ShapeSpec,
        dim: int,
        num_layers: int,
        num_heads: int,
        ffn_dim: int,
        positions: FeaturePositions,
        activation: str = "relu",
        dropout: float = 0.0,
        pre_norm: bool = False,
    ) -> None:
        """
        Args:
            in_feature: name of the backbone's feature map.
            in_shape: its channels and stride.
            dim: channels C.
            num_layers: depth, 0 or more.
            num_heads: attention heads, a divisor of `dim`.
            ffn_dim: inner width of the feed-forward blocks.
            positions: position embedding of the cells.
            activation: of the feed-forward blocks.
            dropout: rate in attention, residual branches and feed-forward blocks.
            pre_norm: norms in front of the sublayers, and another one at the end.
        """
        super().__init__()
        self.in_feature = in_feature
        self.shape = ShapeSpec(channels=dim, stride=in_shape.stride)
        self.positions = positions
        self.input_proj = nn.Conv2d(in_shape.channels, dim, kernel_size=1)
        self.layers = nn.ModuleList(
            EncoderLayer(
                dim=dim,
                num_heads=num_heads,
                ffn_dim=ffn_dim,
                activation=activation,
                dropout=dropout,
                pre_norm=pre_norm,
            )
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(dim) if pre_norm else nn.Identity()
        xavier_init_matrices(self.layers)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        encoder, decoder = cfg.MODEL.ENCODER, cfg.MODEL.DECODER
        if encoder.IN_FEATURE not in input_shape:
            raise ValueError(
                f"MODEL.ENCODER.IN_FEATURE is {encoder.IN_FEATURE!r}; it must be one of the "
                f"backbone's features: {sorted(input_shape)} (MODEL.RESNETS.OUT_FEATURES)"
            )
        shape = input_shape[encoder.IN_FEATURE]
        return {
            "in_feature": encoder.IN_FEATURE,
            "in_shape": shape,
            "dim": decoder.HIDDEN_DIM,
            "num_layers": encoder.NUM_LAYERS,
            "num_heads": decoder.NUM_HEADS,
            "ffn_dim": decoder.FFN_DIM,
            "positions": FeaturePositions(
                dim=decoder.HIDDEN_DIM, stride=shape.stride if cfg.MODEL.EXACT_PADDING else None
            ),
            "activation": decoder.ACTIVATION,
            "dropout": decoder.DROPOUT,
            "pre_norm": decoder.PRE_NORM,
        }

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Returns channels and stride of the output."""
        return {OUTPUT: self.shape}

    def forward(self, features: dict[str, Tensor], sizes: ImageSizes) -> dict[str, Tensor]:
        """Encodes the feature map.

        Args:
            features: name -> (B, *, H, W).
            sizes: of the B images; padding is never attended.

        Returns:
            "memory" -> (B, C, H, W). Padded cells hold finite but meaningless values.
        """
        projected = self.input_proj(features[self.in_feature])
        position, valid = self.positions(projected, sizes)
        x = projected.flatten(2).transpose(1, 2)  # (B, L, C)
        for layer in self.layers:
            x = layer(x, position, valid)
        memory = self.norm(x).transpose(1, 2)
        return {OUTPUT: memory.unflatten(2, projected.shape[-2:])}
