"""Images of any kind as RGB arrays, and checks of what callers pass."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..data.image_io import read_image, upright

ImageLike: TypeAlias = "str | os.PathLike[str] | Image.Image | np.ndarray | Tensor"
"""A path, a Pillow image, an (H, W, 3) uint8 array or a (3, H, W) uint8 tensor."""

COLOR_ORDERS = ("RGB", "BGR")


def to_rgb(images: Sequence[ImageLike], color_order: str = "RGB") -> list[np.ndarray]:
    """Converts images of any kind to (H, W, 3) uint8 RGB arrays, upright by their EXIF orientation.

    Args:
        images: see `ImageLike`; sizes may differ.
        color_order: channels of arrays and tensors, "RGB" or "BGR"; files and Pillow images know
            theirs.

    Raises:
        ImageReadError: a file is missing or not an image.
        TypeError: an image of another kind; the message has its position.
        ValueError: wrong shape, dtype or color order; the message has the position of the image.
    """
    if color_order not in COLOR_ORDERS:
        raise ValueError(f"color_order is {color_order!r}; it must be 'RGB' or 'BGR'")
    arrays = []
    for position, image in enumerate(images):
        try:
            arrays.append(_to_rgb(image, color_order))
        except (TypeError, ValueError) as error:
            raise type(error)(f"image {position}: {error}") from error
    return arrays


def check_threshold(threshold: float) -> float:
    """Returns a score threshold; raises ValueError if it is not between 0 and 1."""
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold is {threshold}; it must be between 0 and 1, like the scores")
    return threshold


def check_rgb(array: np.ndarray) -> np.ndarray:
    """Returns an array; raises ValueError if it is not an (H, W, 3) uint8 image with pixels."""
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8:
        raise ValueError(
            "an array must be (H, W, 3) uint8 with values 0 to 255, got "
            f"{array.shape} {array.dtype}; several images go in a list"
        )
    if not array.size:
        raise ValueError(f"an image of no pixels: {array.shape[1]} x {array.shape[0]}")
    return array


def _to_rgb(image: ImageLike, color_order: str) -> np.ndarray:
    if isinstance(image, str | os.PathLike):
        return read_image(os.fspath(image), "RGB")
    if isinstance(image, Image.Image):
        if image.mode == "F":
            raise ValueError("a Pillow image with floating-point pixels: convert it to 8 bits")
        return np.array(upright(image).convert("RGB"))
    if isinstance(image, Tensor):
        if image.ndim != 3 or image.shape[0] != 3 or image.dtype != torch.uint8:
            raise ValueError(
                "a tensor must be (3, H, W) uint8 with values 0 to 255, got "
                f"{tuple(image.shape)} {image.dtype}; several images go in a list"
            )
        array = image.permute(1, 2, 0).cpu().numpy()
    elif isinstance(image, np.ndarray):
        array = image
    else:
        raise TypeError(
            f"an image is a path, a Pillow image, an array or a tensor, not {type(image).__name__}"
        )
    array = check_rgb(array)
    return np.ascontiguousarray(array[:, :, ::-1] if color_order == "BGR" else array)
