"""Sine embeddings of positions: cells of a feature map and reference points (DETR, supplement A.4).

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
# Divides by the extent of the valid cells; without it a row of padding would divide by zero.
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
    """Positions (B, H, W, 2), x and y in (0, 1], of the cells of feature maps (B, H, W).

    A cell counts how many valid cells end with it, down its column and along its row, and divides
    by their number, so that the last valid cell is at 1 whatever the padding. Padded cells get what
    the same formula gives; nothing attends to them.
    """
    x = valid.cumsum(2, dtype=dtype)
    y = valid.cumsum(1, dtype=dtype)
    return torch.stack((x / (x[:, :, -1:] + EPS), y / (y[:, -1:] + EPS)), dim=-1)


def valid_cells(
    sizes: ImageSizes, feature_hw: tuple[int, int], stride: int | None
) -> list[tuple[int, int]]:
    """Rows and columns of a batch's feature map that belong to each image.

    Args:
        sizes: of the images and of the padded batch.
        feature_hw: H, W.
        stride: pixels a cell: every cell that begins inside of the image is valid, which is the
            feature map that the image has by itself. None takes the pixel that a nearest-neighbor
            resize of the pixel mask would take, as the authors of DETR do; the two differ where the
            padded size is no multiple of the stride.
    """
    if not sizes.any_padding:
        return [tuple(feature_hw)] * len(sizes)
    if stride is not None:
        return [
            tuple(min(-(-side // stride), n) for side, n in zip(hw, feature_hw, strict=True))
            for hw in sizes.hw
        ]
    # In float32, like the resize: the quotient of two sides need not be exact.
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
    """(B, H, W) bool, True on the first rows and columns of each image."""
    count = torch.tensor(cells).to(device, non_blocking=True)
    rows, columns = (torch.arange(n, device=device) for n in feature_hw)
    return (rows < count[:, :1])[:, :, None] & (columns < count[:, 1:])[:, None]


class FeaturePositions:
    """Position embedding and validity of the cells of a feature map.

    Without padding the embedding depends on the map's shape alone and is kept for the next image of
    that shape; with padding it is kept for the next component that asks.
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
        """
        Args:
            features: (B, *, H, W), of which shape, dtype and device matter.
            sizes: of the B images.

        Returns:
            embedding (1, L, C) or (B, L, C); and (B, L) bool, True on cells of the image, or None
            where all are. At least one cell of every image is valid.
        """
        hw = (features.shape[-2], features.shape[-1])
        options = (self.dim, features.dtype, features.device)
        cells = tuple(valid_cells(sizes, hw, self.stride)) if sizes.any_padding else ()
        if all(cell == hw for cell in cells):
            if is_exporting():  # nothing to keep
                return embed_cells(cell_mask([hw], hw, features.device), *options[:2]), None
            return _unpadded(hw, *options), None
        return _padded(cells, hw, *options)


# Kept across calls, so they must not be inference tensors: training may follow a validation.


@lru_cache(maxsize=32)
def _unpadded(hw: tuple[int, int], dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(1, L, C)."""
    with torch.inference_mode(False), torch.no_grad():
        return embed_cells(cell_mask([hw], hw, device), dim, dtype)


@lru_cache(maxsize=1)  # encoder and decoder ask for the same
def _padded(
    cells: tuple[tuple[int, int], ...],
    hw: tuple[int, int],
    dim: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """(B, L, C) and (B, L) bool."""
    with torch.inference_mode(False), torch.no_grad():
        valid = cell_mask(cells, hw, device)
        return embed_cells(valid, dim, dtype), valid.flatten(1)


def embed_cells(valid: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """(B, H, W) bool -> (B, H * W, C) of `dtype`, computed in at least float32."""
    positions = cell_positions(valid, torch.promote_types(dtype, torch.float32))
    return sine_embedding(positions, dim).flatten(1, 2).to(dtype)


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Logits of shares; both x and 1 - x are kept above `eps`, so that the result stays within
    +-11.5."""
    x = at_least_float32(x).clamp(0, 1)
    return (x.clamp(min=eps) / (1 - x).clamp(min=eps)).log()
