"""Reading image files of any common kind, with errors that name the file."""

import contextlib

import numpy as np
from detectron2.data.detection_utils import convert_PIL_to_numpy
from detectron2.utils.file_io import PathManager
from PIL import Image, ImageOps

SIXTEEN_BIT_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N")


class ImageReadError(OSError):
    """An image file that is absent, truncated or not an image."""


def open_image(path: str) -> Image.Image:
    """Decode a file into an upright picture of 8 bits a channel.

    EXIF orientation is applied. 16-bit gray values are scaled to 8 bits (65535 becomes 255), where
    Pillow alone would cut everything above 255 to white.

    Raises:
        ImageReadError: with the file and the reason; also for floating-point pixels.
    """
    try:
        with PathManager.open(path, "rb") as file:
            image = Image.open(file)
            image.load()
    except FileNotFoundError as error:
        raise ImageReadError(f"no image file {path}: check the image folder") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        raise ImageReadError(
            f"cannot read image {path}: {error}. Replace the file, or take it out of the data set"
        ) from error
    if image.mode == "F":  # whether 1 or 255 is white, the file does not say
        raise ImageReadError(
            f"image {path} has floating-point pixels: convert it to 8 bits a channel"
        )
    return upright(image)


def upright(image: Image.Image) -> Image.Image:
    """A decoded picture as `open_image` gives it: EXIF orientation applied, 16-bit gray scaled."""
    # A broken EXIF block says nothing about orientation; the pixels are fine.
    with contextlib.suppress(Exception):
        image = ImageOps.exif_transpose(image)
    if image.mode in SIXTEEN_BIT_MODES:
        gray = np.clip(np.asarray(image, dtype=np.int64), 0, 65535)
        image = Image.fromarray(((gray + 128) // 257).astype(np.uint8))
    return image


def read_image(path: str, image_format: str) -> np.ndarray:
    """Read an image as an array.

    Args:
        path: file, or any address Detectron2's PathManager knows.
        image_format: "RGB", "BGR", "L" or "YUV-BT.601" (Detectron2's INPUT.FORMAT). Transparency is
            dropped.

    Returns:
        (H, W, 3) or, for "L", (H, W, 1) uint8; float32 for "YUV-BT.601".

    Raises:
        ImageReadError: the file is absent, truncated or not an image.
    """
    return convert_PIL_to_numpy(open_image(path), image_format)
