"""Reading image files of any common kind, with errors that name the file."""

import contextlib
import functools
import re
import warnings
from collections.abc import Iterator

import numpy as np
from detectron2.data.detection_utils import convert_PIL_to_numpy
from detectron2.utils.file_io import PathManager
from PIL import Image, ImageOps

MAX_PIXELS = 178_956_970  # default of INPUT.MAX_PIXELS; Pillow's own limit, half a GiB as RGB
SIXTEEN_BIT_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N")

TOO_LARGE_REMEDY = (
    "Replace the file if it is damaged; else cut it into tiles, scale it down, or raise the key"
)

_EXIF_ORIENTATION = 0x0112
_TRANSPOSED = (5, 6, 7, 8)  # EXIF orientations that exchange width and height


class ImageReadError(OSError):
    """An image file that is absent, truncated, too large or not an image.

    Attributes:
        reason: what is wrong, without the name of the file.
    """

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason or message


def open_image(path: str, *, max_pixels: int | None = None) -> Image.Image:
    """Decode a file into an upright image of 8 bits a channel.

    EXIF orientation is applied. 16-bit gray values are scaled to 8 bits (65535 becomes 255), where
    Pillow alone would cut everything above 255 to white.

    Args:
        path: file, or any address Detectron2's PathManager knows.
        max_pixels: larger images are an error (INPUT.MAX_PIXELS). None is `MAX_PIXELS`, or Pillow's
            `Image.MAX_IMAGE_PIXELS` if that has been set higher.

    Raises:
        ImageReadError: with the file and the reason; also for floating-point pixels.
    """
    with _opened(path, max_pixels) as image:
        image.load()
    if image.mode == "F":  # whether 1 or 255 is white, the file does not say
        reason = "has floating-point pixels: convert it to 8 bits a channel"
        raise ImageReadError(f"image {path} {reason}", reason)
    return upright(image)


def read_size(path: str, *, max_pixels: int | None = None) -> tuple[int, int]:
    """Height and width of the upright image, from the header where it tells.

    Raises:
        ImageReadError: the file is absent, too large or not an image.
    """
    with _opened(path, max_pixels) as image:
        # A PNG may tell its orientation behind the pixels, which getexif would decode.
        turned = False
        if image.format != "PNG" or "exif" in image.info:
            with contextlib.suppress(Exception):  # a broken EXIF block tells no orientation
                turned = image.getexif().get(_EXIF_ORIENTATION) in _TRANSPOSED
        if turned and image.format == "TIFF":  # Pillow turns these itself while it decodes
            image.load()
            turned = False
        width, height = image.size[::-1] if turned else image.size
    return height, width


def excess(width: int, height: int, max_pixels: int | None) -> str:
    """Says that an image has too many pixels; "" if it has not."""
    if max_pixels is None:
        max_pixels = max(MAX_PIXELS, Image.MAX_IMAGE_PIXELS or width * height)
    if width * height <= max_pixels:
        return ""
    return (
        f"{width} x {height} = {width * height / 1e6:.0f} million pixels are more than "
        f"INPUT.MAX_PIXELS = {max_pixels}"
    )


@contextlib.contextmanager
def _opened(path: str, max_pixels: int | None) -> Iterator[Image.Image]:
    """Opens a file with Pillow; whatever goes wrong in the block becomes an ImageReadError."""
    _silence_pillow()
    # Pillow warns above its own limit and refuses twice as many pixels.
    if Image.MAX_IMAGE_PIXELS is not None:
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, max_pixels or MAX_PIXELS)
    too_large = ""
    try:
        with PathManager.open(path, "rb") as file:
            image = Image.open(file)
            too_large = excess(*image.size, max_pixels)
            if not too_large:
                yield image
    except FileNotFoundError as error:
        raise ImageReadError(
            f"no image file {path}: check the image folder", "no such file"
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        pixels = re.search(r"\d+", str(error))
        too_large = f"{pixels[0] if pixels else ''} pixels are more than INPUT.MAX_PIXELS"
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        raise ImageReadError(
            f"cannot read image {path}: {error}. Replace the file, or take it out of the data set",
            f"cannot read image: {error}",
        ) from error
    if too_large:
        raise ImageReadError(f"image {path}: {too_large}. {TOO_LARGE_REMEDY}", too_large)


@functools.cache
def _silence_pillow() -> None:
    """Leaves it to our own message, which names the key, that an image is too large."""
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def upright(image: Image.Image) -> Image.Image:
    """A decoded image as `open_image` gives it: EXIF orientation applied, 16-bit gray scaled."""
    # A broken EXIF block says nothing about orientation; the pixels are fine.
    with contextlib.suppress(Exception):
        image = ImageOps.exif_transpose(image)
    if image.mode in SIXTEEN_BIT_MODES:
        gray = np.clip(np.asarray(image, dtype=np.int64), 0, 65535)
        image = Image.fromarray(((gray + 128) // 257).astype(np.uint8))
    return image


def read_image(path: str, image_format: str, *, max_pixels: int | None = None) -> np.ndarray:
    """Read an image as an array.

    Args:
        path: file, or any address Detectron2's PathManager knows.
        image_format: "RGB", "BGR", "L" or "YUV-BT.601" (Detectron2's INPUT.FORMAT). Transparency is
            dropped.
        max_pixels: see `open_image`.

    Returns:
        (H, W, 3) or, for "L", (H, W, 1) uint8; float32 for "YUV-BT.601".

    Raises:
        ImageReadError: the file is absent, truncated, too large or not an image.
    """
    return convert_PIL_to_numpy(open_image(path, max_pixels=max_pixels), image_format)
