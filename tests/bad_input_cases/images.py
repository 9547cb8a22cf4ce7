"""Unusual images, which must be read correctly, and broken ones, which must be named."""

from __future__ import annotations

import functools
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.structures import BoxMode
from PIL import Image

from asag import load_config
from asag.data import SparseDetectionMapper, build_train_loader

from .common import ROOT, Case, expect

HEIGHT, WIDTH = 48, 64
EXTENSIONS = {
    "JPEG": "jpg",
    "PNG": "png",
    "GIF": "gif",
    "BMP": "bmp",
    "TIFF": "tif",
    "WEBP": "webp",
}
EXIF_ORIENTATION = 0x0112
# Transpositions for storage, so that a reader that applies the orientation gets an upright image.
STORED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
REPLACE = "Replace the file"


def cases(seed: int) -> list[Case]:
    """Returns all cases; the seed selects the positions of truncation and the random content."""
    rng = np.random.default_rng(seed)
    return [*_modes(), *_orientations(), *_names(), *_shapes(), *_truncated(rng), *_no_images(rng)]


def picture() -> Image.Image:
    """Makes a smooth image with distinct corners, which reveals a wrong orientation or color."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    channels = 40 + 3 * y, 30 + 3 * x, 220 - 2 * x - y
    return Image.fromarray(np.stack(channels, axis=-1).clip(0, 255).astype(np.uint8))


def load(path: Path, height: int = HEIGHT, width: int = WIDTH, max_size: int = 64) -> np.ndarray:
    """Loads a file as training does: (H, W, 3) uint8, RGB, not resized at 48 x 64."""
    box = {"bbox": [1, 1, width - 1, height - 1], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    record: dict[str, Any] = {"file_name": str(path), "image_id": 1, "annotations": [box]}
    loader = build_train_loader(
        [record | {"height": height, "width": width}],
        _mapper(max_size),
        total_batch_size=1,
        num_workers=0,
        seed=0,
    )
    return next(iter(loader))[0]["image"].numpy().transpose(1, 2, 0)


@functools.cache
def _mapper(max_size: int) -> SparseDetectionMapper:
    cfg = load_config(str(ROOT / "configs/SparseRCNN/sparse_rcnn_tiny.yaml"))
    cfg.INPUT.FORMAT, cfg.INPUT.RANDOM_FLIP = "RGB", "none"
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (HEIGHT,), max_size
    return SparseDetectionMapper(cfg, is_train=True)


def _looks(save: Callable[[Path], Path], tolerance: float, gray: str = "") -> Callable:
    """Saves the image, loads it and compares it with the original in the mode `gray`.

    The tolerance is the mean error in steps of 0 to 255.
    """

    def run(folder: Path) -> str:
        seen = load(save(folder)).astype(float)
        expected = picture().convert(gray).convert("RGB") if gray else picture()
        expect(seen.shape == (HEIGHT, WIDTH, 3), f"it has the shape {seen.shape}")
        error = np.abs(seen - np.asarray(expected, dtype=float)).mean()
        expect(error < tolerance, f"pixels are wrong by {error:.1f} on average")
        return ""

    return run


def _saver(name: str, image: Callable[[], Image.Image], **options: Any) -> Callable[[Path], Path]:
    def save(folder: Path) -> Path:
        image().save(folder / name, **options)
        return folder / name

    return save


def _modes() -> Iterator[Case]:
    def converted(mode: str) -> Callable[[], Image.Image]:
        return lambda: picture().convert(mode)

    def sixteen_bit() -> Image.Image:
        return Image.fromarray(np.asarray(picture().convert("L")).astype(np.uint16) * 257)

    def with_alpha() -> Image.Image:
        image = picture().convert("RGBA")
        image.putalpha(Image.linear_gradient("L").resize((WIDTH, HEIGHT)))
        return image

    def frames(name: str, **options: Any) -> Callable[[Path], Path]:
        others = [Image.new("RGB", (WIDTH, HEIGHT), color) for color in ("red", "blue")]
        return _saver(name, picture, save_all=True, append_images=others, **options)

    # title, extension, save function, tolerance, mode without colors, description
    rows: list[tuple[str, str, Callable[[Path], Path], float, str, str]] = [
        ("CMYK", "jpg", _saver("a.jpg", converted("CMYK"), quality=95), 8, "", "converted"),
        ("CMYK", "tif", _saver("a.tif", converted("CMYK")), 3, "", "converted"),
        ("YCbCr", "tif", _saver("a.tif", converted("YCbCr")), 3, "", "converted"),
        ("CIELAB", "tif", _saver("a.tif", converted("LAB")), 12, "", "converted"),
        ("palette", "png", _saver("a.png", converted("P")), 20, "", "converted"),
        ("palette", "bmp", _saver("a.bmp", converted("P")), 20, "", "converted"),
        ("gray", "png", _saver("a.png", converted("L")), 1, "L", "three equal channels"),
        ("gray", "jpg", _saver("a.jpg", converted("L")), 4, "L", "three equal channels"),
        ("gray with alpha", "png", _saver("a.png", converted("LA")), 1, "L", "alpha dropped"),
        ("transparent", "png", _saver("a.png", with_alpha), 1, "", "alpha dropped"),
        (
            "transparent",
            "webp",
            _saver("a.webp", with_alpha, lossless=True),
            60,
            "",
            "alpha dropped",
        ),
        ("black and white", "png", _saver("a.png", converted("1")), 1, "1", "converted"),
        ("16 bits a pixel", "png", _saver("a.png", sixteen_bit), 1, "L", "scaled to 8 bits"),
        ("16 bits a pixel", "tif", _saver("a.tif", sixteen_bit), 1, "L", "scaled to 8 bits"),
        ("progressive", "jpg", _saver("a.jpg", picture, progressive=True), 4, "", "read"),
        ("animated", "gif", frames("a.gif"), 20, "", "its first frame"),
        ("animated", "webp", frames("a.webp", lossless=True), 2, "", "its first frame"),
        ("several pages", "tif", frames("a.tif"), 1, "", "its first page"),
    ]
    for title, extension, save, tolerance, gray, happens in rows:
        run = _looks(save, tolerance, gray)
        yield Case("images", title, extension, happens, run)

    def floating(folder: Path) -> str:
        pixels = np.asarray(picture().convert("L"), dtype=np.float32) / 255
        Image.fromarray(pixels).save(folder / "a.tif")
        load(folder / "a.tif")
        return ""

    says = ("a.tif", "floating-point")
    happens = "names the file; convert it to 8 bits"
    yield Case("images", "floating-point pixels", "tif", happens, floating, says, "8 bits")


def _orientations() -> Iterator[Case]:
    for orientation, transpose in STORED.items():

        def save(folder: Path, o: int = orientation, t: Image.Transpose = transpose) -> Path:
            exif = Image.Exif()
            exif[EXIF_ORIENTATION] = o
            picture().transpose(t).save(folder / "a.jpg", exif=exif, quality=95)
            return folder / "a.jpg"

        name = f"orientation {orientation}"
        yield Case("images", "EXIF orientation", name, "turned upright", _looks(save, 4))

    def raw_size(folder: Path) -> str:
        exif = Image.Exif()
        exif[EXIF_ORIENTATION] = 6
        picture().save(folder / "a.jpg", exif=exif)
        load(folder / "a.jpg")  # the annotation states the size of the stored pixels
        return ""

    says = ("a.jpg", "48 x 64", "64 x 48", "EXIF")
    happens = "names both sizes and the EXIF orientation"
    title = "annotated before its EXIF orientation"
    yield Case("images", title, "orientation 6", happens, raw_size, says, "annotation")

    def broken_exif(folder: Path) -> Path:
        picture().save(folder / "a.jpg", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff", quality=95)
        return folder / "a.jpg"

    happens = "read as it is stored"
    yield Case("images", "broken EXIF block", "jpg", happens, _looks(broken_exif, 4))

    def other_size(folder: Path) -> str:
        picture().resize((50, 40)).save(folder / "a.png")
        load(folder / "a.png")
        return ""

    says = ("a.png", "64 x 48", "50 x 40")
    happens = "names the file and both sizes"
    yield Case("images", "another size than annotated", "png", happens, other_size, says, "annota")


def _names() -> Iterator[Case]:
    for written, extension in (("PNG", "jpg"), ("JPEG", "png"), ("WEBP", "jpg"), ("BMP", "jpeg")):

        def save(folder: Path, w: str = written, e: str = extension) -> Path:
            picture().save(folder / f"a.{e}", format=w)
            return folder / f"a.{e}"

        name = f"{written} called .{extension}"
        yield Case("images", "wrong extension", name, "read by its content", _looks(save, 6))
    for name in ("no extension", "späces and ümlauts .png", "100% [x] #1?.png", "x" * 200 + ".png"):

        def save(folder: Path, n: str = name) -> Path:
            picture().save(folder / n, format="PNG")
            return folder / n

        yield Case("images", "unusual file name", name[:30], "read", _looks(save, 1))


def _shapes() -> Iterator[Case]:
    for height, width in ((1, 1), (1, 3000), (3000, 1), (2, 1500)):

        def run(folder: Path, h: int = height, w: int = width) -> str:
            Image.new("RGB", (w, h), "red").save(folder / "a.png")
            seen = load(folder / "a.png", h, w)
            expect(min(seen.shape) >= 1 and max(seen.shape) <= 64, f"it became {seen.shape}")
            return ""

        happens = "resized to at least one pixel a side"
        yield Case("images", "extreme shape", f"{width} x {height}", happens, run)


def _truncated(rng: np.random.Generator) -> Iterator[Case]:
    for written, extension in EXTENSIONS.items():
        for i, share in enumerate(np.sort(rng.uniform(0.02, 0.7, size=3))):

            def run(folder: Path, w: str = written, e: str = extension, s: float = share) -> str:
                path = folder / f"a.{e}"
                noise = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
                Image.fromarray(noise).save(path, format=w)
                content = path.read_bytes()
                path.write_bytes(content[: int(len(content) * s)])
                load(path)
                return ""

            says = (f"a.{extension}",)
            name = f"{extension}, place {i}, after {share:.0%}"
            happens = "names the file; replace it or take it out"
            yield Case("images", "cut off", name, happens, run, says, REPLACE)


def _png_of_size(height: int, width: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b""))
    return b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b"")


def _no_images(rng: np.random.Generator) -> Iterator[Case]:
    contents = {
        "empty": ("a.jpg", b""),
        "empty PNG": ("a.png", b""),
        "web page": ("a.jpg", b"<!DOCTYPE html><html><body>404 Not Found</body></html>"),
        "text": ("a.jpg", b"version https://git-lfs.github.com/spec/v1\nsize 12345\n"),
        "JSON": ("a.png", b'{"images": []}'),
        "zip archive": ("a.jpg", b"PK\x03\x04" + rng.bytes(300)),
        "PDF": ("a.jpg", b"%PDF-1.7\n" + rng.bytes(300)),
        "SVG": ("a.png", b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'),
        "HEIC": ("a.jpg", b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic" + rng.bytes(300)),
        "garbage": ("a.jpg", rng.bytes(500)),
        "JPEG mark and garbage": ("a.jpg", b"\xff\xd8\xff\xe0" + rng.bytes(500)),
        "PNG mark and garbage": ("a.png", b"\x89PNG\r\n\x1a\n" + rng.bytes(500)),
        "GIF mark and garbage": ("a.gif", b"GIF89a" + rng.bytes(500)),
        "a PNG of 100000 x 100000 pixels": ("a.png", _png_of_size(100000, 100000)),
        "a PNG of no pixels": ("a.png", _png_of_size(HEIGHT, WIDTH)),
    }
    for name, (file_name, content) in contents.items():

        def run(folder: Path, f: str = file_name, c: bytes = content) -> str:
            (folder / f).write_bytes(c)
            load(folder / f)
            return ""

        happens = "names the file; replace it or take it out"
        yield Case("images", "not an image", name, happens, run, (file_name,), REPLACE)

    def folder_as_image(folder: Path) -> str:
        (folder / "a.jpg").mkdir()
        load(folder / "a.jpg")
        return ""

    happens = "names the file; replace it or take it out"
    yield Case("images", "not an image", "folder", happens, folder_as_image, ("a.jpg",), REPLACE)

    def absent(folder: Path) -> str:
        load(folder / "a.jpg")
        return ""

    def dangling(folder: Path) -> str:
        (folder / "a.jpg").symlink_to(folder / "gone.jpg")
        load(folder / "a.jpg")
        return ""

    happens = "names the file; check the folder"
    for name, run in (("no file", absent), ("link to nothing", dangling)):
        remedy = "check the image folder"
        yield Case("images", "not there", name, happens, run, ("a.jpg",), remedy)
