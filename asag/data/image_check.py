"""Checking before the first iteration that all images can be opened.

Headers are always read, which also gives the sizes. All pixels are decoded when asked for, or when
the images are small enough together. The results are cached by path, file size and time of change.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from asag.data.coco_table import CocoTable
from asag.data.errors import DataIssue, DatasetError
from asag.data.image_io import (
    TOO_LARGE_REMEDY,
    ImageReadError,
    excess,
    open_image,
    read_size,
)
from asag.files import atomic_writer

SMALL_SET = 400_000_000  # pixels of all images together up to which they are decoded unasked
_THREADS = 8  # they wait for the disk, and decoders release the interpreter
_CHUNK = 32  # images that a thread takes at a time
_MIN_CACHED = 200  # new results from which on they are written to the cache
_HEAD = 1 << 16  # bytes of a file that are compared
_REPLACE = "replace the image, or take it out of the data set"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageFacts:
    """Facts about an image file.

    Attributes:
        height: pixels of the upright image; 0 if it cannot be opened.
        width: likewise.
        decoded: all pixels have been decoded.
        error: why it cannot be read; "" if it can.
    """

    height: int
    width: int
    decoded: bool = False
    error: str = ""

    def issue(self, path: str) -> DataIssue:
        """Says why the image of this path cannot be used."""
        remedy = TOO_LARGE_REMEDY if "INPUT.MAX_PIXELS" in self.error else _REPLACE
        return DataIssue(path, self.error, remedy)


_Stamp = tuple[int, int]  # bytes, time of change in ns
_known: dict[str, tuple[_Stamp, ImageFacts]] = {}
_loaded: set[Path] = set()


def inspect_images(
    paths: Sequence[str], *, decode: bool | None = False, max_pixels: int | None = None
) -> list[ImageFacts]:
    """Opens image files.

    Args:
        paths: the files.
        decode: also decode all pixels; None does so if the images together have at most
            `SMALL_SET` pixels.
        max_pixels: larger images are an error, see `open_image`.

    Returns:
        What is known about each.
    """
    cache = _cache_file(paths)
    _load(cache)
    stamps = [_stamp(path) for path in paths]
    facts = [_recall(path, stamp) for path, stamp in zip(paths, stamps, strict=True)]
    todo = [row for row, fact in enumerate(facts) if fact is None]
    new = len(todo)
    headers = _in_threads(lambda row: _read_header(paths[row], max_pixels), todo)
    for row, fact in zip(todo, headers, strict=True):
        facts[row] = fact
    facts = [replace(x, error=x.error or excess(x.width, x.height, max_pixels)) for x in facts]
    if decode is None:
        decode = sum(fact.height * fact.width for fact in facts) <= SMALL_SET
    todo = [row for row, x in enumerate(facts) if decode and not (x.decoded or x.error)]
    decoded = _in_threads(lambda row: _decode(paths[row], facts[row], max_pixels), todo)
    for row, fact in zip(todo, decoded, strict=True):
        facts[row] = fact
    for path, stamp, fact in zip(paths, stamps, facts, strict=True):
        if stamp is not None and not fact.error:
            _known[path] = stamp, fact
    if new + len(todo) >= _MIN_CACHED:
        _save(cache, paths)
    return facts


def _in_threads(function: Callable[[int], ImageFacts], rows: Sequence[int]) -> list[ImageFacts]:
    chunks = [rows[i : i + _CHUNK] for i in range(0, len(rows), _CHUNK)]
    with ThreadPoolExecutor(_THREADS) as pool:
        return [
            x for part in pool.map(lambda c: [function(row) for row in c], chunks) for x in part
        ]


def with_checked_images(
    table: CocoTable, *, decode: bool | None = None, max_pixels: int | None = None
) -> CocoTable:
    """The table with the sizes of all images that have a file.

    Args:
        table: its `image_hw` may lack sizes.
        decode: see `inspect_images`.
        max_pixels: larger images are an error, see `open_image`.

    Raises:
        DatasetError: an image cannot be opened, is too large, or has another size than its entry
            says.
    """
    rows = [row for row, path in enumerate(table.image_files) if path]
    paths = [table.image_files[row] for row in rows]
    facts = inspect_images(paths, decode=decode, max_pixels=max_pixels)
    sizes = table.image_hw.copy()
    issues = []
    for row, path, fact in zip(rows, paths, facts, strict=True):
        if fact.error:
            issues.append(fact.issue(path))
        elif not sizes[row].all():
            sizes[row] = fact.height, fact.width
        elif tuple(sizes[row]) != (fact.height, fact.width):
            issues.append(_other_size(path, fact, *sizes[row].tolist()))
    if issues:
        raise DatasetError(issues)
    return replace(table, image_hw=sizes)


def shared_images(paths: Sequence[str], others: Sequence[str]) -> int:
    """Number of files that have the same contents as one of the others.

    Files are told apart by their size, then by their first bytes.
    """
    by_size, others_by_size = _by_size(paths), _by_size(others)
    count = 0
    for size in by_size.keys() & others_by_size.keys():
        known = {_head(other) for other in others_by_size[size]}
        count += sum(_head(path) in known for path in by_size[size])
    return count


def _by_size(paths: Sequence[str]) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for path in filter(None, paths):
        stamp = _stamp(path)
        if stamp is not None:
            found.setdefault(stamp[0], []).append(path)
    return found


def _head(path: str) -> bytes:
    """Digest of the first bytes of a file, which compressed images share only if they are equal."""
    try:
        with open(path, "rb") as file:
            return hashlib.sha256(file.read(_HEAD)).digest()
    except OSError:
        return path.encode("utf-8", "surrogateescape")


def _other_size(path: str, fact: ImageFacts, height: int, width: int) -> DataIssue:
    turned = ""
    if (fact.height, fact.width) == (width, height):
        turned = " (width and height are exchanged, or it is turned by its EXIF orientation)"
    problem = (
        f"has {fact.width} x {fact.height} pixels{turned}, but its annotation says {width} x "
        f"{height}"
    )
    remedy = (
        "correct the annotation (size and boxes are those of the upright image), or leave width "
        "and height out if the boxes fit the image"
    )
    return DataIssue(path, problem, remedy)


def _read_header(path: str, max_pixels: int | None) -> ImageFacts:
    try:
        return ImageFacts(*read_size(path, max_pixels=max_pixels))
    except ImageReadError as error:
        return ImageFacts(0, 0, error=error.reason)


def _decode(path: str, fact: ImageFacts, max_pixels: int | None) -> ImageFacts:
    try:
        width, height = open_image(path, max_pixels=max_pixels).size
    except ImageReadError as error:
        return replace(fact, error=error.reason)
    return ImageFacts(height, width, decoded=True)


# The cache: one file for each folder of images.


def _cache_file(paths: Sequence[str]) -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folders = sorted({os.path.dirname(os.path.abspath(path)) for path in paths})
    name = hashlib.sha256("\n".join(folders).encode("utf-8", "surrogateescape")).hexdigest()[:24]
    return Path(base) / "asag" / "images" / f"{name}.json"


def _stamp(path: str) -> _Stamp | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def _recall(path: str, stamp: _Stamp | None) -> ImageFacts | None:
    known = _known.get(path)
    return known[1] if known is not None and stamp is not None and known[0] == stamp else None


def _load(cache: Path) -> None:
    """Reads a cache file once; a missing or damaged one is an empty one."""
    if cache in _loaded:
        return
    _loaded.add(cache)
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
        for path, (size, time, height, width, decoded) in json.loads(cache.read_bytes()).items():
            fact = ImageFacts(int(height), int(width), bool(decoded))
            _known.setdefault(path, ((size, time), fact))


def _save(cache: Path, paths: Sequence[str]) -> None:
    entries = {
        path: [*_known[path][0], _known[path][1].height, _known[path][1].width, decoded]
        for path in paths
        if path in _known
        for decoded in [int(_known[path][1].decoded)]
    }
    try:
        with atomic_writer(cache) as file:
            json.dump(entries, file)
    except (OSError, UnicodeError) as error:
        logger.debug("the results of the image check cannot be cached in %s (%s)", cache, error)
