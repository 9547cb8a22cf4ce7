"""Multi-scale deformable attention from plain tensor operators (Zhu et al., "Deformable DETR", ICLR
2021, Section 4.1, Eq. 3).

B images, N queries, L levels, T cells of all levels, H heads, P points of a head and level, C
channels, D = C / H.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...structures import ImageSizes
from .attention import check_heads
from .position_encoding import cell_mask, valid_cells


@dataclass
class MultiScaleMemory:
    """Feature maps as one sequence, level by level, row by row.

    Attributes:
        values: (B, T, C).
        shapes_hw: rows and columns of each level.
        valid: (B, T) bool, False on padding; None without padding.
        valid_ratios: (B, L, 2) shares of columns and rows that belong to the image.
        whwh: (B, 4) sizes of the unpadded images.
    """

    values: Tensor
    shapes_hw: tuple[tuple[int, int], ...]
    valid: Tensor | None
    valid_ratios: Tensor
    whwh: Tensor

    @cached_property
    def extents(self) -> Tensor:
        """Columns and rows of each level, (L, 2), copied to the device once."""
        extents = torch.tensor([(w, h) for h, w in self.shapes_hw], dtype=self.whwh.dtype)
        return extents.to(self.whwh.device, non_blocking=True)


def flatten_maps(maps: Sequence[Tensor], sizes: ImageSizes) -> MultiScaleMemory:
    """Flattens the maps (B, C, H_l, W_l) of all levels into one sequence."""
    shapes = tuple((x.shape[-2], x.shape[-1]) for x in maps)
    device = maps[0].device
    masks, ratios = [], []
    for hw in shapes:
        cells = valid_cells(sizes, hw, None)
        masks.append(cell_mask(cells, hw, device).flatten(1))
        ratios.append([(w / hw[1], h / hw[0]) for h, w in cells])
    return MultiScaleMemory(
        values=torch.cat([x.flatten(2).transpose(1, 2) for x in maps], dim=1),
        shapes_hw=shapes,
        valid=torch.cat(masks, dim=1) if sizes.any_padding else None,
        valid_ratios=torch.tensor(ratios).transpose(0, 1).to(device, non_blocking=True),
        whwh=sizes.whwh,
    )


class DeformableAttention(nn.Module):
    """Attention of each query to P points a head and level around its reference."""

    def __init__(
        self, *, dim: int, num_heads: int = 8, num_levels: int = 4, num_points: int = 4
    ) -> None:
        """
        Args:
            dim: channels C.
            num_heads: H, a divisor of `dim`.
            num_levels: L.
            num_points: P.

        Raises:
            ValueError: `num_heads` does not divide `dim`.
        """
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads, self.num_levels, self.num_points = num_heads, num_levels, num_points
        samples = num_heads * num_levels * num_points
        self.offsets = nn.Linear(dim, samples * 2)
        self.weights = nn.Linear(dim, samples)
        self.value_proj = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initializes the offsets: each head in another direction, points at increasing distances,
        all with equal weights."""
        angle = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        direction = torch.stack((angle.cos(), angle.sin()), dim=-1)
        direction = direction / direction.abs().amax(dim=-1, keepdim=True)  # on a square
        distance = torch.arange(1, self.num_points + 1)
        bias = direction[:, None, None] * distance[:, None]  # (H, 1, P, 2)
        bias = bias.expand(-1, self.num_levels, -1, -1)
        nn.init.zeros_(self.offsets.weight)
        self.offsets.bias.data.copy_(bias.reshape(-1))
        for layer in (self.weights, self.value_proj, self.out_proj):
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.weights.weight)
        nn.init.xavier_uniform_(self.value_proj.weight)
        nn.init.xavier_uniform_(self.out_proj.weight)

    def forward(self, query: Tensor, reference: Tensor, memory: MultiScaleMemory) -> Tensor:
        """Samples the memory around the reference of each query.

        Args:
            query: (B, N, C).
            reference: (B, N, L, 2) points or (B, N, L, 4) boxes cxcywh, in shares of the *padded*
                map of each level.
            memory: all levels.

        Returns:
            (B, N, C).
        """
        value = self.value_proj(memory.values)
        if memory.valid is not None:
            value = value.masked_fill(~memory.valid[..., None], 0)
        points = self._points(query, reference, memory.extents)
        weights = self.weights(query).view(*query.shape[:2], self.num_heads, -1).softmax(dim=-1)
        weights = weights.unflatten(-1, (self.num_levels, self.num_points))
        return self.out_proj(sample_levels(value, memory.shapes_hw, points, weights))

    def _points(self, query: Tensor, reference: Tensor, extents: Tensor) -> Tensor:
        """Returns sampling points (B, N, H, L, P, 2) in shares of the padded maps."""
        offsets = self.offsets(query).view(
            *query.shape[:2], self.num_heads, self.num_levels, self.num_points, 2
        )
        offsets = offsets.to(reference.dtype)
        reference = reference[:, :, None, :, None]
        if reference.shape[-1] == 2:
            return reference + offsets / extents[:, None]
        # An offset of P units is half a box side.
        return reference[..., :2] + offsets / self.num_points * reference[..., 2:] / 2


def sample_levels(
    value: Tensor, shapes_hw: Sequence[tuple[int, int]], points: Tensor, weights: Tensor
) -> Tensor:
    """Sums weighted bilinear samples of all levels; samples outside of the maps are zero.

    Args:
        value: (B, T, C).
        shapes_hw: of the levels.
        points: (B, N, H, L, P, 2) x, y in shares of the maps.
        weights: (B, N, H, L, P).

    Returns:
        (B, N, C).
    """
    batch, count, heads = points.shape[:3]
    grid = (points * 2 - 1).transpose(1, 2).flatten(0, 1)  # (B H, N, L, P, 2)
    weights = weights.transpose(1, 2).flatten(0, 1)[:, None]  # (B H, 1, N, L, P)
    per_head = value.unflatten(-1, (heads, -1)).permute(0, 2, 3, 1).flatten(0, 1)  # (B H, D, T)
    sampled = None
    levels = per_head.split([h * w for h, w in shapes_hw], dim=-1)
    for i, (level, hw) in enumerate(zip(levels, shapes_hw, strict=True)):
        samples = F.grid_sample(
            level.unflatten(-1, hw), grid[:, :, i].to(level.dtype), align_corners=False
        )  # (B H, D, N, P)
        part = (samples * weights[:, :, :, i].to(samples.dtype)).sum(dim=-1)
        sampled = part if sampled is None else sampled + part
    return sampled.view(batch, -1, count).transpose(1, 2)
