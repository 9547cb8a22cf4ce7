"""Test images for an exported detector: (H, W, 3) uint8 RGB, all of one size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from ..data.image_io import read_image
from ..data.shapes import STANDARD
from ..data.shapes_drawing import draw_scene
from ..inference.media import find_media


def generated_pictures(
    size: tuple[int, int], *, noise: int = 2, scenes: int = 4, seed: int = 0
) -> dict[str, np.ndarray]:
    """Returns noise, and scenes of the generated data set in this size, by name."""
    rng = np.random.default_rng(seed)
    pictures = {
        f"random pixels {i}": rng.integers(0, 256, (*size, 3), dtype=np.uint8) for i in range(noise)
    }
    for i in range(scenes):
        scene = draw_scene(
            rng,
            height=size[0],
            width=size[1],
            class_names=STANDARD.class_names,
            objects=STANDARD.objects,
            sizes=STANDARD.sizes,
            min_visible=STANDARD.min_visible,
            heaps=STANDARD.heaps,
            ignore_region=False,
        )
        pictures[f"generated scene {i}"] = scene.pixels
    return pictures


def read_pictures(folder: Path, size: tuple[int, int], limit: int = 16) -> dict[str, np.ndarray]:
    """Reads the first images of a folder, resized to the size, by name.

    Raises:
        FileNotFoundError: the folder has no images.
        ImageReadError: an image cannot be read.
    """
    files = [x for x in find_media([str(folder)])[0] if not x.is_video][:limit]
    if not files:
        raise FileNotFoundError(f"no images in {folder}")
    height, width = size
    return {
        str(x.relative): np.array(
            Image.fromarray(read_image(str(x.path), "RGB")).resize((width, height), Image.BILINEAR)
        )
        for x in files
    }
