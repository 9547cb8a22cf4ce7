"""Sine embeddings of the cells of a feature map and of reference points (DETR, supplement A.4).

B images, H x W cells of a feature map, L = H * W, C channels. A coordinate pair becomes C numbers:
C / 2 of y, then C / 2 of x, sine and cosine in turn, wavelengths in geometric progression.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ...structures import ImageSizes
from .boxes import at_least_float32
from .exporting import is_exporting

TEMPERATURE = 10000.0
# Added to the number of valid cells, which is zero in rows of padding.
EPS = 1e-6


def sine_embedding(xy: Tensor, dim: int) -> Tensor:
    """Embeds positions (..., 2), x and y in shares of the image size, as (..., dim).

    Args:
        xy: at least float32.
        dim: channels C, a multiple of 4.

    Raises:
        ValueError: `dim` is not a multiple of 4.
    """
    if dim % 4:
        raise ValueError(
            f"MODEL.DECODER.HIDDEN_DIM is {dim}; it must be a multiple of 4 for sine embeddings of "
            "positions"
        )
    pairs = torch.arange(dim // 4, device=xy.device, dtype=xy.dtype)
    wavelength = TEMPERATURE ** (4 * pairs / dim)
    angle = (2 * math.pi * xy.flip(-1))[..., None] / wavelength  # (..., 2: y x, C / 4)
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(-3)


def cell_positions(valid: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Computes positions (B, H, W, 2), x and y in (0, 1], of the cells of feature maps (B, H, W).

    The position of a cell is the number of valid cells up to it in its row and column, divided by
    their total, so that the last valid cell is at 1 for any padding. Padded cells get positions by
    the same formula; nothing attends to them.
    """
    x = valid.cumsum(2, dtype=dtype)
    y = valid.cumsum(1, dtype=dtype)
    return torch.stack((x / (x[:, :, -1:] + EPS), y / (y[:, -1:] + EPS)), dim=-1)


def valid_cells(
    sizes: ImageSizes, feature_hw: tuple[int, int], stride: int | None
) -> list[tuple[int, int]]:
    """Returns the rows and columns of a feature map that belong to each image.

    Args:
        sizes: of the images and of the padded batch.
        feature_hw: H, W.
        stride: pixels a cell. All cells that begin inside of the image are valid, as in the feature
            map of the image alone. None resizes the pixel mask by nearest neighbor, as the authors
            of DETR do; the two differ if the padded size is not a multiple of the stride.
    """
    if not sizes.any_padding:
        return [tuple(feature_hw)] * len(sizes)
    if stride is not None:
        return [
            tuple(min(-(-side // stride), n) for side, n in zip(hw, feature_hw, strict=True))
            for hw in sizes.hw
        ]
    # In float32 like the resize, whose quotient of two sides may be inexact.
    pixels = [
        (torch.arange(n) * (torch.tensor(float(padded)) / n)).floor()
        for n, padded in zip(feature_hw, sizes.padded_hw, strict=True)
    ]
    return [
        tuple(int((p < side).sum()) for p, side in zip(pixels, hw, strict=True)) for hw in sizes.hw
    ]


def cell_mask(
    cells: Sequence[tuple[int, int]],
    feature_hw: tuple[int, int],
    device: torch.device | str = "cpu",
) -> Tensor:
    """Returns a mask (B, H, W), True on the first rows and columns of each image."""
    count = torch.tensor(cells).to(device, non_blocking=True)
    rows, columns = (torch.arange(n, device=device) for n in feature_hw)
    return (rows < count[:, :1])[:, :, None] & (columns < count[:, 1:])[:, None]


class FeaturePositions:
    """Position embedding and mask of the cells of a feature map.

    Results are cached: without padding for all maps of the same shape, with padding for the next
    component that reads the same batch.
    """

    def __init__(self, *, dim: int, stride: int | None = None) -> None:
        """
        Args:
            dim: channels C, a multiple of 4.
            stride: see `valid_cells`.
        """
        self.dim = dim
        self.stride = stride

    def __call__(self, features: Tensor, sizes: ImageSizes) -> tuple[Tensor, Tensor | None]:
        """Computes position embedding and mask.

        Args:
            features: (B, *, H, W); only shape, dtype and device matter.
            sizes: of the B images.

        Returns:
            Embedding (1, L, C) or (B, L, C), and mask (B, L), True on cells of the image, or None
            if all cells are valid. At least one cell of every image is valid.
        """
        hw = (features.shape[-2], features.shape[-1])
        options = (self.dim, features.dtype, features.device)
        cells = tuple(valid_cells(sizes, hw, self.stride)) if sizes.any_padding else ()
        if all(cell == hw for cell in cells):
            if is_exporting():  # no caching
                return embed_cells(cell_mask([hw], hw, features.device), *options[:2]), None
            return _unpadded(hw, *options), None
        return _padded(cells, hw, *options)


# Cached results must not be inference tensors, because training may use them after a validation.


@lru_cache(maxsize=32)
def _unpadded(hw: tuple[int, int], dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns the embedding (1, L, C) of a map without padding."""
    with torch.inference_mode(False), torch.no_grad():
        return embed_cells(cell_mask([hw], hw, device), dim, dtype)


@lru_cache(maxsize=1)  # encoder and decoder read the same batch
def _padded(
    cells: tuple[tuple[int, int], ...],
    hw: tuple[int, int],
    dim: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Returns embedding (B, L, C) and mask (B, L)."""
    with torch.inference_mode(False), torch.no_grad():
        valid = cell_mask(cells, hw, device)
        return embed_cells(valid, dim, dtype), valid.flatten(1)


def embed_cells(valid: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Embeds the cells of a mask (B, H, W) as (B, H * W, C), computed in at least float32."""
    positions = cell_positions(valid, torch.promote_types(dtype, torch.float32))
    return sine_embedding(positions, dim).flatten(1, 2).to(dtype)


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Computes logits; x and 1 - x are clamped to at least `eps`, which bounds the result to
    +-11.5."""
    x = at_least_float32(x).clamp(0, 1)
    return (x.clamp(min=eps) / (1 - x).clamp(min=eps)).log()
