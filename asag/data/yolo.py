"""YOLO text: one text file an image, a line an object.

A line is `class x y width height`, the center and size of a box as fractions of the image, or
`class x1 y1 x2 y2 x3 y3 ...`, a polygon of which the enclosing box is taken. Images without a text
file, or with an empty one, have no objects.

Layouts: `images/<split>/` beside `labels/<split>/` or `<split>/images/` beside `<split>/labels/`
with a `data.yaml` (Ultralytics, Roboflow), text files beside the images, and Darknet's `obj.data`.
Category ids are the class numbers; the image id is the file name without suffix.
"""

from __future__ import annotations

import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from asag.data.coco_table import CocoTable
from asag.data.errors import MAX_LISTED, DataIssue, DatasetError
from asag.data.image_check import inspect_images
from asag.data.image_names import image_suffixes, present_files, printable, walk

REPAIR = "converted from YOLO text"
_TOLERANCE = 0.01  # beyond 0 and 1 where a fraction is rounded; more is another unit
_BOX_NUMBERS = 4


@dataclass(frozen=True)
class YoloSplit:
    """The files of one split.

    Attributes:
        source: the file or folder that names the classes.
        images: folders of images, or text files that list images.
        class_names: class number -> name.
        keypoints: lines have keypoints behind the box, which are left out.
        notes: sentences for the report.
    """

    source: Path
    images: tuple[Path, ...]
    class_names: Mapping[int, str]
    keypoints: bool = False
    notes: tuple[str, ...] = ()

    def read(self) -> CocoTable:
        """The split as a table.

        Raises:
            DatasetError: no images, no text files, lines that cannot be used (with file and line),
                or images that cannot be opened.
        """
        found = (x for place in self.images for x in _images_of(place))
        files = list(dict.fromkeys(Path(os.path.abspath(x)) for x in found))
        if not files:
            places = ", ".join(str(x) for x in self.images)
            problem = f"no images in {places}"
            remedy = "correct the path in data.yaml, or copy the images there"
            raise DatasetError([DataIssue(str(self.source), problem, remedy)])
        labels, notes = _label_files(files)
        present = [x.is_file() for x in files]  # broken links are not
        sizes, issues = _sizes(files, present)
        labels_of = {number: label for label, number in enumerate(sorted(self.class_names))}
        rows, classes, boxes = [], [], []
        for row, path in enumerate(labels):
            used = path is not None and present[row]
            for number, box in _lines(path, self, issues) if used else ():
                rows.append(row)
                classes.append(labels_of[number])
                boxes.append(box)
            if len(issues) > MAX_LISTED:
                break
        if issues:
            raise DatasetError(issues)
        box_image = np.array(rows, dtype=np.int64)
        boxes_xywh = _boxes_xywh(np.array(boxes).reshape(-1, 4), sizes[box_image])
        root, names, ids = _names(files)
        count = len(rows)
        return CocoTable(
            source=self.source,
            image_root=root,
            class_names=tuple(self.class_names[x] for x in sorted(self.class_names)),
            category_ids=tuple(sorted(self.class_names)),
            image_ids=ids,
            file_names=names,
            image_files=[str(x) if ok else "" for x, ok in zip(files, present, strict=True)],
            image_hw=sizes,
            box_image=box_image,
            box_class=np.array(classes, dtype=np.int64),
            boxes_xywh=boxes_xywh,
            areas=boxes_xywh[:, 2] * boxes_xywh[:, 3],
            iscrowd=np.zeros(count, dtype=bool),
            difficult=np.zeros(count, dtype=bool),
            annotation_ids=np.arange(1, count + 1),
            repairs=(REPAIR,),
            notes=(*self.notes, *notes),
        )


def _images_of(place: Path) -> Iterator[Path]:
    """Images of a folder and of the folders below it, or those that a text file lists."""
    if place.is_dir():
        for folder, files in walk(place):
            for file in files:
                if os.path.splitext(file)[1].lower() in image_suffixes():
                    yield place / folder / file
        return
    for line in place.read_text("utf-8-sig", "replace").splitlines():
        name = line.strip().replace("\\", "/")
        if not name:
            continue
        parts = PurePosixPath(name).parts
        choices = [
            x / name for x in (place.parent, place.parent.parent, place.parent.parent.parent)
        ]
        # Lists of other machines: the longest end of the path that is there counts.
        choices += [place.parent.joinpath(*parts[i:]) for i in range(1, len(parts))]
        yield next((x for x in choices if x.is_file()), choices[0])


def _label_files(files: Sequence[Path]) -> tuple[list[Path | None], list[str]]:
    """The text file of every image, None where there is none, and notes about them."""
    by_folder: dict[Path, list[int]] = defaultdict(list)
    for row, path in enumerate(files):
        by_folder[path.parent].append(row)
    labels: list[Path | None] = [None] * len(files)
    unused = 0
    for folder, rows in by_folder.items():
        names = [f"{files[row].stem}.txt" for row in rows]
        choices = [(x, present_files(x, names)) for x in _label_folders(folder)]
        place, present = max(choices, key=lambda choice: sum(choice[1]))
        for row, name, ok in zip(rows, names, present, strict=True):
            labels[row] = place / name if ok else None
        if any(present) and place != folder:
            unused += len({x.name for x in place.glob("*.txt")} - {*names, "classes.txt"})
    if not any(labels):
        expected = _label_folders(files[0].parent)[0] / f"{files[0].stem}.txt"
        problem = f"none of the {len(files)} images here has a text file (expected {expected})"
        remedy = "copy the label files there, beside or in the place of the folder `images`"
        raise DatasetError([DataIssue(str(files[0].parent), problem, remedy)])
    notes = []
    if missing := sum(x is None for x in labels):
        notes.append(f"{missing} image(s) have no text file: images without objects")
    if unused:
        notes.append(f"{unused} text file(s) belong to no image and are left out")
    return labels, notes


def _label_folders(folder: Path) -> list[Path]:
    """Folders in which the text files of a folder of images may lie, likeliest first."""
    parts = folder.parts
    places = [
        Path(*parts[:i], "labels", *parts[i + 1 :])
        for i in range(len(parts) - 1, -1, -1)
        if parts[i].casefold() in ("images", "jpegimages", "imgs", "img")
    ]
    places += [folder.parent / "labels" / folder.name, folder / "labels", folder]
    return [*places, folder.parent / "labels"]


def _sizes(files: Sequence[Path], present: Sequence[bool]) -> tuple[np.ndarray, list[DataIssue]]:
    """(I, 2) height and width of the images that are there, and issues about those of them
    that cannot be opened."""
    sizes = np.zeros((len(files), 2), dtype=np.int64)
    paths = {row: str(files[row]) for row, ok in enumerate(present) if ok}
    issues = []
    for (row, path), fact in zip(paths.items(), inspect_images([*paths.values()]), strict=True):
        sizes[row] = fact.height, fact.width
        issues += [fact.issue(path)] * bool(fact.error)
    return sizes, issues


def _lines(
    path: Path, split: YoloSplit, issues: list[DataIssue]
) -> Iterator[tuple[int, tuple[float, float, float, float]]]:
    """Class number and (x, y, width, height), center and size as fractions, of every line."""
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        words = line.decode("utf-8-sig", "replace").split()
        if not words:
            continue
        try:
            yield _class_of(words[0], split), _box_of(words[1:], split.keypoints)
        except _LineError as error:
            issues.append(DataIssue(f"{path}:{number}", *error.args))


class _LineError(ValueError):
    """Problem and remedy of a line."""


def _class_of(word: str, split: YoloSplit) -> int:
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    names = split.class_names
    if value in names:
        return int(value)
    if value.is_integer():
        numbers = f"{min(names)} to {max(names)}" if len(names) > 1 else str(min(names))
        problem = f"class {word}, but {split.source.name} names {len(names)} class(es): {numbers}"
        raise _LineError(problem, "add the class to the names, or correct the line")
    named = " (class names do not belong here, their numbers do)" * (word in names.values())
    raise _LineError(f"class {printable(word)!r}{named}", "begin the line with a class number")


def _box_of(words: Sequence[str], keypoints: bool) -> tuple[float, float, float, float]:
    """Center and size of a box, or of the box around a polygon."""
    try:
        numbers = [float(x) for x in words]
    except ValueError:
        numbers = [math.nan]
    remedy = "write `class x y width height` as fractions of the image size"
    if not all(map(math.isfinite, numbers)):
        raise _LineError(f"{printable(' '.join(words))[:60]!r} are not all numbers", remedy)
    box = len(numbers) == _BOX_NUMBERS or (keypoints and len(numbers) > _BOX_NUMBERS)
    if not box and (len(numbers) < 6 or len(numbers) % 2):
        hint = " (a confidence behind the box? these are detections)" * (len(numbers) == 5)
        raise _LineError(f"{len(numbers)} numbers behind the class{hint}", remedy)
    used = numbers[:_BOX_NUMBERS] if box else numbers
    if min(used) < -_TOLERANCE or max(used) > 1 + _TOLERANCE:
        far = max(used, key=lambda x: abs(x - 0.5))
        pixels = "; these look like pixels" * (far > 2)
        raise _LineError(f"{far:g} is no fraction between 0 and 1{pixels}", remedy)
    if box:
        return tuple(used)
    x, y = used[::2], used[1::2]
    return (
        (min(x) + max(x)) / 2,
        (min(y) + max(y)) / 2,
        max(x) - min(x),
        max(y) - min(y),
    )


def _boxes_xywh(boxes_cxcywh: np.ndarray, sizes_hw: np.ndarray) -> np.ndarray:
    """Corner and size in pixels from fractions of the image."""
    corner = boxes_cxcywh[:, :2] - boxes_cxcywh[:, 2:] / 2
    return np.hstack([corner, boxes_cxcywh[:, 2:]]) * np.tile(sizes_hw[:, ::-1], 2)


def _names(files: Sequence[Path]) -> tuple[Path, list[str], list[str]]:
    """Common folder, names relative to it, and unique ids of the images."""
    root = Path(os.path.commonpath([x.parent for x in files]))
    names = [x.relative_to(root).as_posix() for x in files]
    stems = [os.path.splitext(name)[0] for name in names]
    counts = Counter(stems)
    ids = [s if counts[s] == 1 else name for s, name in zip(stems, names, strict=True)]
    return root, names, ids
