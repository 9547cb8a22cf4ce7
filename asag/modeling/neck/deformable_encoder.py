"""Encoder of Deformable DETR: deformable self-attention over four levels (Zhu et al., ICLR 2021,
Section 4.2).

B images, L levels, T cells of all levels, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from ...structures import ImageSizes
from ..layers.deformable_attention import DeformableAttention, MultiScaleMemory, flatten_maps
from ..layers.feed_forward import FeedForward, Residual
from ..layers.init import xavier_init_matrices
from ..layers.position_encoding import FeaturePositions
from ..registry import NECK_REGISTRY

NORM_GROUPS = 32


class DeformableEncoderLayer(nn.Module):
    """Deformable self-attention of all cells and feed-forward block, (B, T, C) -> (B, T, C)."""

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int,
        num_levels: int,
        num_points: int,
        ffn_dim: int,
        activation: str = "relu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.attention = DeformableAttention(
            dim=dim, num_heads=num_heads, num_levels=num_levels, num_points=num_points
        )
        self.residual = Residual(dim=dim, dropout=dropout)
        self.ffn = FeedForward(dim=dim, hidden_dim=ffn_dim, activation=activation, dropout=dropout)
        xavier_init_matrices(self.ffn)

    def forward(self, memory: MultiScaleMemory, position: Tensor, reference: Tensor) -> Tensor:
        return self.ffn(
            self.residual(memory.values, lambda x: self.attention(x + position, reference, memory))
        )


@NECK_REGISTRY.register()
class DeformableEncoder(nn.Module):
    """Projects three feature maps, adds a coarser one, and encodes all four together."""

    @configurable
    def __init__(
        self,
        *,
        in_features: Sequence[str],
        in_channels: Sequence[int],
        strides: Sequence[int],
        dim: int,
        num_layers: int = 6,
        num_heads: int = 8,
        num_points: int = 4,
        ffn_dim: int = 1024,
        activation: str = "relu",
        dropout: float = 0.0,
    ) -> None:
        """
        Args:
            in_features: names of the backbone's feature maps, finest first.
            in_channels, strides: of these maps; strides are powers of two.
            dim: channels C of the outputs.
            num_layers: encoder layers.
            num_heads, num_points: of the deformable attention.
            ffn_dim: inner width of the feed-forward blocks.
            activation, dropout: of the layers.
        """
        super().__init__()
        self.in_features = tuple(in_features)
        self.strides = (*strides, strides[-1] * 2)
        self.out_features = tuple(f"p{stride.bit_length() - 1}" for stride in self.strides)
        self.dim = dim
        self.project = nn.ModuleList(nn.Conv2d(c, dim, 1) for c in in_channels)
        self.project.append(nn.Conv2d(in_channels[-1], dim, 3, stride=2, padding=1))
        groups = NORM_GROUPS if dim % NORM_GROUPS == 0 else 1
        self.norms = nn.ModuleList(nn.GroupNorm(groups, dim) for _ in self.strides)
        self.level_embedding = nn.Parameter(torch.randn(len(self.strides), dim))
        self.positions = [FeaturePositions(dim=dim) for _ in self.strides]
        self.layers = nn.ModuleList(
            DeformableEncoderLayer(
                dim=dim,
                num_heads=num_heads,
                num_levels=len(self.strides),
                num_points=num_points,
                ffn_dim=ffn_dim,
                activation=activation,
                dropout=dropout,
            )
            for _ in range(num_layers)
        )
        for conv in self.project:
            nn.init.xavier_uniform_(conv.weight)
            nn.init.zeros_(conv.bias)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        encoder, decoder = cfg.MODEL.DEFORMABLE_ENCODER, cfg.MODEL.DECODER
        missing = [name for name in encoder.IN_FEATURES if name not in input_shape]
        if missing:
            raise ValueError(
                f"MODEL.DEFORMABLE_ENCODER.IN_FEATURES is {list(encoder.IN_FEATURES)}; it must "
                f"name features of the backbone: {sorted(input_shape)} (MODEL.RESNETS.OUT_FEATURES)"
            )
        return {
            "in_features": encoder.IN_FEATURES,
            "in_channels": [input_shape[f].channels for f in encoder.IN_FEATURES],
            "strides": [input_shape[f].stride for f in encoder.IN_FEATURES],
            "dim": decoder.HIDDEN_DIM,
            "num_layers": encoder.NUM_LAYERS,
            "num_heads": decoder.NUM_HEADS,
            "num_points": decoder.DEFORMABLE_POINTS,
            "ffn_dim": decoder.FFN_DIM,
            "dropout": decoder.DROPOUT,
        }

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Returns channels and strides of the outputs, like a backbone."""
        return {
            name: ShapeSpec(channels=self.dim, stride=stride)
            for name, stride in zip(self.out_features, self.strides, strict=True)
        }

    def forward(self, features: dict[str, Tensor], sizes: ImageSizes) -> dict[str, Tensor]:
        """Encodes the feature maps.

        Args:
            features: of the backbone, name -> (B, *, H, W).
            sizes: of the B images.

        Returns:
            name -> (B, C, H, W), "p3" to "p6" for inputs of strides 8 to 32.
        """
        maps = [features[name] for name in self.in_features]
        maps = [
            norm(conv(x))
            for conv, norm, x in zip(self.project, self.norms, [*maps, maps[-1]], strict=True)
        ]
        positions = [
            self.positions[i](x, sizes)[0].expand(x.shape[0], -1, -1) + self.level_embedding[i]
            for i, x in enumerate(maps)
        ]
        position = torch.cat(positions, dim=1)
        memory = flatten_maps(maps, sizes)
        reference = cell_references(memory)
        for layer in self.layers:
            memory.values = layer(memory, position, reference)
        parts = memory.values.split([h * w for h, w in memory.shapes_hw], dim=1)
        return {
            name: part.transpose(1, 2).unflatten(-1, hw)
            for name, part, hw in zip(self.out_features, parts, memory.shapes_hw, strict=True)
        }


def cell_references(memory: MultiScaleMemory) -> Tensor:
    """Returns the position of each cell in the padded maps of all levels, (B, T, L, 2)."""
    centers = []
    device = memory.values.device
    for i, (height, width) in enumerate(memory.shapes_hw):
        x = (torch.arange(width, device=device) + 0.5) / width
        y = (torch.arange(height, device=device) + 0.5) / height
        xy = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).flatten(0, 1)
        centers.append(xy / memory.valid_ratios[:, i, None])  # shares of the unpadded image
    return torch.cat(centers, dim=1)[:, :, None] * memory.valid_ratios[:, None]
