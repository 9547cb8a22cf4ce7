"""AdaMixer stage: adaptive 3D sampling, then adaptive mixing of channels and of points.

Gao et al., "AdaMixer", CVPR 2022, Sections 3.1-3.3. B images, N queries, C channels, G groups, P
sampled points, O mixed points, L levels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...layers.boxes import at_least_float32
from ...layers.feed_forward import FeedForward
from ...layers.init import xavier_init_matrices
from ...layers.overlap_attention import PositionedSelfAttention
from ...layers.xyzr import XYZRPredictor, boxes_to_xyzr, scale_of


def sample_3d(
    maps: Sequence[Tensor], strides: Sequence[int], points_xy: Tensor, points_z: Tensor
) -> Tensor:
    """Samples a feature pyramid at points in image plane and scale (Section 3.1, Eqs. 2 and 3).

    Args:
        maps: (B, C, H, W) a level, finest first.
        strides: pixels a cell of each level.
        points_xy: (B, N, G, P, 2) pixels.
        points_z: (B, N, G, P) scale; level l of the list has scale l.

    Returns:
        (B, N, G, P, C / G): group g samples the g-th block of channels; zeros outside of the maps.
    """
    batch, count, groups, points = points_z.shape
    level = torch.arange(len(maps), device=points_z.device, dtype=points_z.dtype)
    weights = (-(points_z[..., None] - level).square() / 2).softmax(dim=-1)
    weights = weights.permute(4, 0, 2, 1, 3).flatten(1, 2)[:, :, None]  # (L, B G, 1, N, P)
    xy = points_xy.transpose(1, 2).flatten(0, 1)  # (B G, N, P, 2)
    sampled = None
    for features, stride, weight in zip(maps, strides, weights, strict=True):
        height, width = features.shape[-2:]
        x, y = xy.unbind(dim=-1)
        grid = torch.stack((x / (width * stride), y / (height * stride)), dim=-1) * 2 - 1
        grouped = features.reshape(batch * groups, -1, height, width)
        part = weight * F.grid_sample(grouped, grid.to(grouped.dtype), align_corners=False)
        sampled = part if sampled is None else sampled + part
    return sampled.view(batch, groups, -1, count, points).permute(0, 3, 1, 4, 2)


class AdaptiveSampling(nn.Module):
    """Samples P points a group around the box of each query, with predicted offsets."""

    def __init__(self, *, dim: int, groups: int, points: int) -> None:
        super().__init__()
        self.groups = groups
        self.offsets = nn.Linear(dim, groups * points * 3)

    def reset_parameters(self) -> None:
        """Initializes the points: spread over the box, one level below its scale, equal for all
        queries."""
        nn.init.zeros_(self.offsets.weight)
        bias = self.offsets.bias.data.view(-1, 3)
        bias[:, :2].uniform_(-0.5, 0.5)
        bias[:, 2] = -1.0

    def forward(
        self, query: Tensor, xyzr: Tensor, maps: Sequence[Tensor], strides: Sequence[int]
    ) -> Tensor:
        """Samples for queries (B, N, C) with boxes (B, N, 4) -> (B, N, G, P, C / G)."""
        offset = at_least_float32(self.offsets(query))
        offset = offset.view(*query.shape[:2], self.groups, -1, 3)
        center, size = (x[:, :, None, None] for x in scale_of(xyzr))
        points_xy = center + offset[..., :2] * size
        points_z = xyzr[:, :, None, None, 2] + offset[..., 2]
        return sample_3d(maps, strides, points_xy, points_z)


class AdaptiveMixing(nn.Module):
    """Mixes channels and points by two matrices a group that the query generates (Section 3.2)."""

    def __init__(self, *, dim: int, groups: int, in_points: int, out_points: int) -> None:
        super().__init__()
        self.width = dim // groups
        self.in_points, self.out_points, self.groups = in_points, out_points, groups
        self.generator = nn.Linear(dim, groups * (self.width**2 + in_points * out_points))
        self.out_proj = nn.Linear(groups * out_points * self.width, dim)

    def reset_parameters(self) -> None:
        """Initializes the parameters; all queries generate the same matrices at first."""
        xavier_init_matrices(self.out_proj)
        nn.init.zeros_(self.generator.weight)

    def forward(self, query: Tensor, sampled: Tensor) -> Tensor:
        """Mixes samples (B, N, G, P, C / G) for queries (B, N, C) -> (B, N, C)."""
        batch, count = query.shape[:2]
        parameters = self.generator(query).view(batch * count * self.groups, -1)
        channel, point = parameters.split((self.width**2, self.in_points * self.out_points), dim=-1)
        x = sampled.reshape(-1, self.in_points, self.width).to(parameters.dtype)
        x = torch.bmm(x, channel.view(-1, self.width, self.width))
        x = F.gelu(F.layer_norm(x, x.shape[-2:])).to(parameters.dtype)
        x = torch.bmm(point.view(-1, self.out_points, self.in_points), x)
        x = F.gelu(F.layer_norm(x, x.shape[-2:]))
        return self.out_proj(x.view(batch, count, -1))


class AdaMixerStage(nn.Module):
    """Self-attention of the queries, adaptive sampling and mixing, class and box prediction."""

    def __init__(
        self,
        *,
        dim: int,
        num_logits: int,
        strides: Sequence[int],
        num_heads: int = 8,
        ffn_dim: int = 2048,
        groups: int = 4,
        in_points: int = 32,
        out_points: int = 128,
        num_cls_layers: int = 1,
        num_reg_layers: int = 3,
        activation: str = "gelu",
        dropout: float = 0.0,
        prior_prob: float | None = 0.01,
    ) -> None:
        """
        Args:
            dim: channels C.
            num_logits: classes K, or K + 1 with a background column.
            strides: pixels a cell of the maps, finest first.
            num_heads: attention heads.
            ffn_dim: inner width of the feed-forward block.
            groups: G, a divisor of `dim`.
            in_points: P, sampled points of each group.
            out_points: O.
            num_cls_layers, num_reg_layers: depth of the towers.
            activation: of feed-forward block and towers.
            dropout: rate in attention and feed-forward block.
            prior_prob: initial class probability; None for softmax classifiers.

        Raises:
            ValueError: `groups` does not divide `dim`.
        """
        super().__init__()
        if dim % groups:
            raise ValueError(
                f"MODEL.DECODER.MIXER_GROUPS is {groups}; it must divide MODEL.DECODER.HIDDEN_DIM "
                f"({dim})"
            )
        self.strides = tuple(strides)
        self.attention = PositionedSelfAttention(dim=dim, num_heads=num_heads, dropout=dropout)
        self.sampling = AdaptiveSampling(dim=dim, groups=groups, points=in_points)
        self.mixing = AdaptiveMixing(
            dim=dim, groups=groups, in_points=in_points, out_points=out_points
        )
        self.norm = nn.LayerNorm(dim)
        self.ffn = FeedForward(dim=dim, hidden_dim=ffn_dim, activation=activation, dropout=dropout)
        self.predictor = XYZRPredictor(
            dim=dim,
            num_logits=num_logits,
            num_cls_layers=num_cls_layers,
            num_reg_layers=num_reg_layers,
            activation=activation,
            prior_prob=prior_prob,
        )
        for module in (self.attention, self.ffn):
            xavier_init_matrices(module)
        self.sampling.reset_parameters()
        self.mixing.reset_parameters()

    def forward(
        self, content: Tensor, boxes_xyxy: Tensor, maps: Sequence[Tensor], valid: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Refines the boxes.

        Args:
            content: (B, N, C).
            boxes_xyxy: (B, N, 4) pixels, without gradient.
            maps: (B, C, H, W) a level.
            valid: (B, N) or (B, N, N) bool; None if all queries are valid.

        Returns:
            Logits (B, N, K), boxes (B, N, 4) xyxy in pixels, next content (B, N, C).
        """
        xyzr = boxes_to_xyzr(boxes_xyxy)
        query = self.attention(content, xyzr, boxes_xyxy, valid)
        sampled = self.sampling(query, xyzr, maps, self.strides)
        query = self.ffn(self.norm(query + self.mixing(query, sampled)))
        logits, boxes = self.predictor(query, xyzr)
        return logits, boxes, query
