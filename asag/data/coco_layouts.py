"""Finding the annotation files and image folders of a data set in COCO format.

The usual layouts, `*` standing for a split (`train`, `val`, `valid`, `validation`, `test`, also
with a year behind it):

    annotations/*.json, instances_*.json or any name with the split in it, images/ or images/*/
    */_annotations.coco.json, images beside it                             (Roboflow)
    */labels.json, */data/                                                 (FiftyOne)
    annotations/instances_default.json or instances_<Subset>.json, images/ (CVAT)
    result.json, images/                                                   (Label Studio)
    annotations.json, JPEGImages/                                          (labelme2coco)
    *.json, images beside it, in images/ or in */
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from asag.data.coco_json import read_coco_table
from asag.data.coco_table import CocoTable
from asag.data.errors import DataIssue, DatasetError
from asag.data.image_names import SPLIT_WORDS, image_suffixes, split_word, walk

_MAX_DEPTH = 3  # folders below the data set's in which annotation files are looked for
_MAX_ROOTS = 40  # folders with images that are tried
_FOLDERS = r"(?:annotations?|anns?|labels?|jsons?|coco)"
# Names of COCO's other files, and of detections, which hold no boxes to learn from.
_NOT_BOXES = re.compile(
    r"captions|keypoints|panoptic|stuff|image_info|results$|predictions|detections"
)
# By preference; {split} stands for the words of a split.
_SPLIT_PATTERNS = (
    _FOLDERS + r"/(?:{split})\.json",
    _FOLDERS + r"/instances[-_](?:{split})[-_]?\d*\.json",
    _FOLDERS + r"/(?:.*[-_.])?(?:{split})[-_]?\d*(?:[-_.].*)?\.json",
    r"(?:{split})[-_]?\d*/_annotations\.coco\.json",
    r"(?:{split})[-_]?\d*/(?:_?annotations?|labels|instances|coco|(?:{split})\d*)\.json",
    r"(?:images|data)/(?:{split})[-_]?\d*/(?:_annotations\.coco|_?annotations?|labels)\.json",
    r"(?:{split})\.json",
)
_SINGLE_PATTERNS = (
    _FOLDERS + r"/instances_default\.json",
    r"result\.json",
    r"_annotations\.coco\.json",
    r"(?:labels|annotations?|instances|coco)\.json",
)
# What fits these is taken only if it is a COCO file.
_LOOSE_SPLIT_PATTERNS = (
    _FOLDERS + r"/(?:{split})[-_]?\d*/[^/]+\.json",
    r"(?:{split})[-_]?\d*/" + _FOLDERS + r"/[^/]+\.json",
    r"(?:.*[-_.])?(?:{split})[-_]?\d*(?:[-_.][^/]*)?\.json",
    r"(?:{split})[-_]?\d*/[^/]+\.json",
)
_LOOSE_SINGLE_PATTERNS = (_FOLDERS + r"/[^/]+\.json", r"[^/]+\.json")
_COCO_KEYS = (b'"images"', b'"annotations"', b'"categories"')


@dataclass(frozen=True)
class CocoSplit:
    """The files of one split.

    Attributes:
        json_file: COCO-format annotation file.
        image_roots: folders that its file names may be relative to; the best fitting one is used.
    """

    json_file: Path
    image_roots: tuple[Path, ...]

    @property
    def source(self) -> Path:
        """The file that is read."""
        return self.json_file

    def read(self) -> CocoTable:
        """The split as a table.

        Raises:
            DatasetError: see `read_coco_table`.
        """
        return read_coco_table(self.json_file, self.image_roots)


def find_coco_splits(folder: str | Path) -> dict[str, CocoSplit]:
    """Find the "train", "val" and "test" splits of a folder; a split that is not there is left out.

    A single annotation file without the name of a split is "train".

    Raises:
        DatasetError: the folder does not exist, or several files could be the same split.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise DatasetError([DataIssue(str(folder), "no such folder", "check the path")])
    files = _json_files(folder)
    stems = [PurePosixPath(x).stem.casefold() for x in files]
    boxes = [x for x, stem in zip(files, stems, strict=True) if not _NOT_BOXES.search(stem)]
    # Files of keypoints have boxes too, but in COCO itself those of one class only.
    keypoints = [x for x, stem in zip(files, stems, strict=True) if "keypoints" in stem]
    return _splits_of(folder, boxes) or _splits_of(folder, keypoints)


def _splits_of(folder: Path, files: Sequence[str]) -> dict[str, CocoSplit]:
    """Splits among these annotation files, relative to the folder."""
    splits = {}
    for split, words in SPLIT_WORDS.items():
        strict, loose = (
            [pattern.format(split="|".join(words)) for pattern in patterns]
            for patterns in (_SPLIT_PATTERNS, _LOOSE_SPLIT_PATTERNS)
        )
        found = _matching(folder, files, strict, loose)
        if len(found) > 1:
            raise _ambiguous(folder, found, f"the {split} annotations")
        if found:
            splits[split] = CocoSplit(folder / found[0], image_roots(folder, found[0], split))
    if "train" not in splits:
        named = {x.json_file.relative_to(folder).as_posix() for x in splits.values()}
        rest = [x for x in files if x not in named and not _names_a_split(x)]
        found = _matching(folder, rest, _SINGLE_PATTERNS, _LOOSE_SINGLE_PATTERNS)
        if len(found) > 1:
            raise _ambiguous(folder, found, "the annotations")
        if found:
            splits["train"] = CocoSplit(folder / found[0], image_roots(folder, found[0], "train"))
    return splits


def coco_file(path: Path) -> CocoSplit:
    """A single annotation file as a split; its images lie beside it or in one of the usual
    folders."""
    folder = path.parent
    if split_word(folder.name) or re.fullmatch(_FOLDERS, folder.name.casefold()):
        folder = folder.parent
    relative = path.relative_to(folder).as_posix()
    split = next((x for x in SPLIT_WORDS if _names_split(relative, x)), "train")
    return CocoSplit(path, image_roots(folder, relative, split))


def is_coco_file(path: Path) -> bool:
    """Returns True if the three sections of a COCO file are named in a file."""
    missing = set(_COCO_KEYS)
    try:
        with open(path, "rb") as file:
            tail = b""
            while missing and (block := file.read(1 << 22)):
                missing = {key for key in missing if key not in tail + block}
                tail = block[-20:]
    except OSError:
        return False
    return not missing


def image_roots(folder: Path, json_file: str, split: str) -> tuple[Path, ...]:
    """Folders that may hold the images of an annotation file, likeliest first.

    Args:
        folder: of the data set.
        json_file: relative to it.
        split: "train", "val" or "test"; folders named for another split are left out.
    """
    path = PurePosixPath(json_file)
    beside = folder / path.parent
    stem = path.stem.removeprefix("instances_")
    places = [stem, stem.split("_")[0], *SPLIT_WORDS[split]]
    parents = [folder / "images", folder, folder / "data", beside, beside / "images"]
    roots = []
    if split_word(beside.name) == split:
        roots += [beside, beside / "images", beside / "data", beside.parent]
    roots += [parent / place for parent in parents for place in places]
    roots += [folder / "images", beside / "images", folder / "images" / "default"]
    roots += [folder / "data", folder / "JPEGImages", beside, folder]
    existing = [x for x in dict.fromkeys(roots) if x.is_dir()]
    if not any(map(_holds_images, existing)):
        existing += [x for x in _folders_with_images(folder, split) if x not in existing]
    return tuple(existing)


def _json_files(folder: Path) -> list[str]:
    """JSON files below a folder, relative to it, in the order of their names."""
    return [
        (Path(place) / x).as_posix()
        for place, files in walk(folder, max_depth=_MAX_DEPTH)
        for x in files
        if x.lower().endswith(".json")
    ]


def _matching(
    folder: Path, files: Sequence[str], strict: Sequence[str], loose: Sequence[str]
) -> list[str]:
    """The files that fit the first pattern that any fits; what fits a loose one is a COCO file."""
    for pattern in (*strict, *loose):
        fitting = [x for x in files if re.fullmatch(pattern, x.casefold())]
        if len(fitting) > 1 or pattern in loose:
            fitting = [x for x in fitting if is_coco_file(folder / x)]
        if fitting:
            return fitting
    return []


def _names_a_split(json_file: str) -> bool:
    return any(_names_split(json_file, split) for split in SPLIT_WORDS)


def _names_split(json_file: str, split: str) -> bool:
    words = "|".join(SPLIT_WORDS[split])
    patterns = (*_SPLIT_PATTERNS, *_LOOSE_SPLIT_PATTERNS)
    return any(re.fullmatch(p.format(split=words), json_file.casefold()) for p in patterns)


def _ambiguous(folder: Path, found: Sequence[str], what: str) -> DatasetError:
    problem = f"several files could be {what}: {', '.join(found[:10])}"
    remedy = (
        "keep one of them, name them for their splits (train, val), or name annotation file and "
        "image folder yourself (--train-json, --train-images, --val-json, --val-images)"
    )
    return DatasetError([DataIssue(str(folder), problem, remedy)])


def _holds_images(folder: Path) -> bool:
    suffixes = image_suffixes()
    with os.scandir(folder) as entries:
        return any(os.path.splitext(x.name)[1].lower() in suffixes for x in entries)


def _folders_with_images(folder: Path, split: str) -> list[Path]:
    """The first folders that hold images and are not named for another split."""
    found = []
    for place, _ in walk(folder, max_depth=_MAX_DEPTH):
        words = {split_word(part) for part in PurePosixPath(place).parts}
        if words <= {None, split} and _holds_images(folder / place):
            found.append(folder / place)
    return sorted(found, key=lambda x: (len(x.parts), str(x)))[:_MAX_ROOTS]
