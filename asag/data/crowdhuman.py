"""CrowdHuman from its original files: `annotation_{train,val}.odgt` and a folder of images.

An odgt file has one JSON object a line:

    {"ID": "...", "gtboxes": [{"tag": "person", "fbox": [x, y, w, h], "extra": {"ignore": 0}, ...}]}

`fbox` is the full body, hidden parts included, in absolute pixels; it may leave the image. Boxes
that are not persons (`tag` "mask") and boxes with `extra.ignore` become ignored regions, `iscrowd`
= 1: training drops them, the evaluation lets them swallow detections. The files do not know the
image sizes; these are read from the image headers once and cached.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from PIL import Image

from asag.data.errors import DataIssue, DatasetError
from asag.files import atomic_writer

PERSON = "person"
SPLITS = ("train", "val")

_EXIF_ORIENTATION = 0x0112
_TRANSPOSED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
_MAX_COORDINATE = 1e9  # pixels; nor is NaN below it
_READERS = 8  # threads that read image headers; the wait is for the disk
_DOWNLOAD = "download it from crowdhuman.org"

logger = logging.getLogger(__name__)


def register_crowdhuman(
    name: str,
    annotation_file: str | os.PathLike[str],
    image_root: str | os.PathLike[str],
    *,
    cache_dir: str | os.PathLike[str] | None = None,
) -> None:
    """Registers a data set in odgt layout; no file is touched before the data set is used.

    Args:
        name: name in Detectron2's catalogs.
        annotation_file: the odgt file.
        image_root: folder of the images, `<ID>.jpg`.
        cache_dir: see :func:`load_crowdhuman`.
    """
    DatasetCatalog.register(
        name,
        functools.partial(load_crowdhuman, annotation_file, image_root, cache_dir=cache_dir),
    )
    _set_metadata(name)


def register_default_crowdhuman() -> None:
    """Registers `crowdhuman_train` and `crowdhuman_val`.

    Expects `annotation_train.odgt`, `annotation_val.odgt` and `Images/` in
    `$DETECTRON2_DATASETS/crowdhuman` (`datasets/crowdhuman` when the variable is not set; it is
    read when the data set is used). Names that are taken keep their meaning.
    """
    for split in SPLITS:
        name = f"crowdhuman_{split}"
        if name not in DatasetCatalog.list():
            DatasetCatalog.register(name, functools.partial(_load_default, split))
            _set_metadata(name)


def _load_default(split: str) -> list[dict[str, Any]]:
    root = Path(os.getenv("DETECTRON2_DATASETS", "datasets")) / "crowdhuman"
    return load_crowdhuman(root / f"annotation_{split}.odgt", root / "Images")


def _set_metadata(name: str) -> None:
    MetadataCatalog.get(name).set(
        thing_classes=[PERSON],
        thing_dataset_id_to_contiguous_id={1: 0},
        evaluator_type="crowdhuman",
    )


def load_crowdhuman(
    annotation_file: str | os.PathLike[str],
    image_root: str | os.PathLike[str],
    *,
    cache_dir: str | os.PathLike[str] | None = None,
) -> list[dict[str, Any]]:
    """Reads a data set in odgt layout.

    Args:
        annotation_file: the odgt file.
        image_root: folder of the images, `<ID>.jpg`.
        cache_dir: folder for the cached image sizes; by default `cache` beside the annotation file.
            Without write access there the sizes are read again every time.

    Returns:
        Detectron2 dataset dicts in the order of the file: `file_name`, `image_id` (1, 2, ... as in
        the usual conversion to COCO), `height`, `width` and `annotations` with `bbox` (full body;
        x, y, width, height in absolute pixels, as annotated, so possibly outside the image),
        `bbox_mode`, `category_id` 0, `iscrowd`.

    Raises:
        DatasetError: the file or an image is missing or broken; lists file, line and remedy of
            each.
    """
    annotation_file, image_root = Path(annotation_file), Path(image_root)
    records = _read_odgt(annotation_file)
    cache = Path(cache_dir) if cache_dir is not None else annotation_file.parent / "cache"
    paths = [image_root / f"{image_id}.jpg" for image_id, _ in records]
    sizes = _image_sizes(paths, image_root, cache / f"{annotation_file.stem}_image_sizes.json")
    return [
        {
            "file_name": str(path),
            "image_id": number,
            "height": height,
            "width": width,
            "annotations": annotations,
        }
        for number, ((_, annotations), path, (width, height)) in enumerate(
            zip(records, paths, sizes, strict=True), start=1
        )
    ]


def _read_odgt(path: Path) -> list[tuple[str, list[dict[str, Any]]]]:
    """ID and annotations of every line; reports all broken lines at once."""
    records: list[tuple[str, list[dict[str, Any]]]] = []
    first_line: dict[str, int] = {}
    issues: list[DataIssue] = []
    for number, line in _numbered_lines(path):
        try:
            image_id, annotations = _parse_line(line)
            if image_id in first_line:
                raise ValueError(f"ID {image_id!r} is already on line {first_line[image_id]}")
        except ValueError as error:
            remedy = f"fix or remove the line, or replace the file: {_DOWNLOAD}"
            issues.append(DataIssue(f"{path}:{number}", str(error), remedy))
            continue
        first_line[image_id] = number
        records.append((image_id, annotations))
    if not records and not issues:
        issues.append(DataIssue(str(path), "the file is empty", _DOWNLOAD))
    if issues:
        raise DatasetError(issues)
    degenerate = sum(min(a["bbox"][2:]) <= 0 for _, found in records for a in found)
    if degenerate:
        logger.warning(
            "%s: %d boxes without width or height; training drops them, the evaluation keeps them "
            "as the benchmark does",
            path,
            degenerate,
        )
    return records


def _numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, counted from 1."""
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
    except OSError as error:
        remedy = f"{_DOWNLOAD}, or set DETECTRON2_DATASETS to the folder that holds `crowdhuman`"
        issue = DataIssue(str(path), f"cannot be read ({error.strerror})", remedy)
        raise DatasetError([issue]) from error


def _parse_line(line: bytes) -> tuple[str, list[dict[str, Any]]]:
    """ID and Detectron2 annotations of one line; ValueError says what is wrong with it."""
    try:
        record = json.loads(line)
    except UnicodeDecodeError as error:
        raise ValueError("not text; is this an odgt file?") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from error
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, deep nesting
        raise ValueError(f"not JSON that makes sense ({error})") from error
    if not isinstance(record, dict):
        raise ValueError(f"a JSON {type(record).__name__}, expected an object with ID and gtboxes")
    image_id, boxes = record.get("ID"), record.get("gtboxes")
    if not isinstance(image_id, str) or not image_id:
        raise ValueError(f"`ID` is {image_id!r}, expected the name of an image")
    if not isinstance(boxes, list):
        raise ValueError(f"`gtboxes` of image {image_id} is {boxes!r}, expected a list")
    try:
        return image_id, [_parse_box(box) for box in boxes]
    except ValueError as error:
        raise ValueError(f"image {image_id}: {error}") from error


def _parse_box(box: Any) -> dict[str, Any]:
    """One Detectron2 annotation."""
    if not isinstance(box, dict):
        raise ValueError(f"entry {box!r} of `gtboxes`, expected an object")
    extra = box.get("extra", {})
    if not isinstance(extra, dict):
        raise ValueError(f"`extra` is {extra!r}, expected an object")
    bbox = box.get("fbox")
    is_box = isinstance(bbox, list) and len(bbox) == 4
    if not is_box or not all(isinstance(v, int | float) and abs(v) < _MAX_COORDINATE for v in bbox):
        raise ValueError(f"`fbox` is {bbox!r}, expected [x, y, width, height] in pixels")
    # the published conversion looks at `ignore` alone; in the published files every box that is
    # not a person carries it, so both rules give the same regions there
    ignored = box.get("tag") != PERSON or extra.get("ignore", 0) != 0
    return {
        "bbox": bbox,
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": 0,
        "iscrowd": int(ignored),
    }


def _image_sizes(
    paths: Sequence[Path], image_root: Path, cache_file: Path
) -> list[tuple[int, int]]:
    """(width, height) of every image, from the cache where the image file is still the same."""
    cached = _read_cache(cache_file)
    with ThreadPoolExecutor(_READERS) as pool:
        found = list(pool.map(lambda path: _image_entry(path, cached.get(path.name)), paths))
    issues = [entry for entry in found if isinstance(entry, DataIssue)]
    if issues:
        if len(issues) == len(paths):  # one cause, one issue
            problem = f"none of the {len(paths)} images can be read, first: {issues[0].problem}"
            remedy = f"unpack the archives of images into this folder; {_DOWNLOAD}"
            issues = [DataIssue(str(image_root), problem, remedy)]
        raise DatasetError(issues)
    entries = {path.name: entry for path, entry in zip(paths, found, strict=True)}
    if entries != cached:
        _write_cache(cache_file, entries)
    return [(width, height) for width, height, *_ in found]


def _image_entry(path: Path, cached: list[int] | None) -> list[int] | DataIssue:
    """[width, height, bytes, modification time in ns] of an image file, or what is wrong with it.

    Width and height are those of the image as it is loaded, turned upright by its EXIF orientation.
    """
    try:
        stat = path.stat()
        stamp = [stat.st_size, stat.st_mtime_ns]
        if cached is not None and cached[2:] == stamp:
            return cached
        with Image.open(path) as image:
            width, height = image.size
            # a broken EXIF block says nothing about orientation; the pixels are fine
            with contextlib.suppress(Exception):
                if image.getexif().get(_EXIF_ORIENTATION) in _TRANSPOSED:
                    width, height = height, width
    except FileNotFoundError:
        remedy = f"unpack all archives of images into {path.parent}; {_DOWNLOAD}"
        return DataIssue(str(path), "no such image, but the annotation file lists it", remedy)
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error
        return DataIssue(str(path), f"not a readable image ({error})", f"replace it: {_DOWNLOAD}")
    return [width, height, *stamp]


def _read_cache(path: Path) -> dict[str, list[int]]:
    """The cached entries; a missing or damaged cache is an empty one."""
    try:
        entries = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    if not isinstance(entries, dict):
        return {}
    return {k: v for k, v in entries.items() if isinstance(v, list) and len(v) == 4}


def _write_cache(path: Path, entries: dict[str, list[int]]) -> None:
    try:
        with atomic_writer(path) as file:
            json.dump(entries, file)
    except OSError as error:
        logger.warning("image sizes cannot be cached in %s (%s); go on without", path, error)


register_default_crowdhuman()
