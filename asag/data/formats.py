"""Recognizing a data set by what is there: format, splits, and the files of each.

`find_dataset` is the one place that knows all formats. A reader of a further format offers
`find_..._splits(folder)`, which returns objects with `source` and `read()`, and is listed in
`_FORMATS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from asag.data.archives import unpack
from asag.data.coco_layouts import coco_file, find_coco_splits, is_coco_file
from asag.data.coco_table import CocoTable
from asag.data.errors import DataIssue, DatasetError
from asag.data.other_formats import describe_file, describe_folder
from asag.data.voc import find_voc_splits, is_voc_file
from asag.data.yolo_layouts import find_yolo_splits, read_data_yaml

_MAX_NESTED = 4  # folders, one inside the other, of which each is the only one


class Split(Protocol):
    """One split of a data set in any format."""

    @property
    def source(self) -> Path:
        """The file or folder that describes the split."""

    def read(self) -> CocoTable:
        """The split as a table; raises DatasetError."""


@dataclass(frozen=True)
class FoundDataset:
    """A data set in a known format.

    Attributes:
        path: what was given, or the folder into which it was unpacked.
        format: name of the format.
        splits: "train", and "val" and "test" where they are there.
        notes: sentences about what was found.
    """

    path: Path
    format: str
    splits: Mapping[str, Split]
    notes: tuple[str, ...] = ()


_FORMATS: dict[str, Callable[[Path], Mapping[str, Split]]] = {
    "COCO": find_coco_splits,
    "Pascal VOC": find_voc_splits,
    "YOLO": find_yolo_splits,
}


def find_dataset(path: str | Path) -> FoundDataset:
    """Find out what a folder, a data.yaml, a COCO JSON or a zip holds.

    Args:
        path: the folder or file.

    Raises:
        DatasetError: nothing is there, it is ambiguous, or it cannot be read; the message names
            what it is where that can be told.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return _find_in_folder(path)
    if not path.exists():
        raise DatasetError([DataIssue(str(path), "no such folder or file", "check the path")])
    suffix = path.suffix.lower()
    if suffix == ".zip":
        folder = unpack(path)
        found = _find_in_folder(folder)
        notes = (f"{path.name} is unpacked into {folder}", *found.notes)
        return FoundDataset(found.path, found.format, found.splits, notes)
    if suffix == ".json":
        split = coco_file(path)
        if not is_coco_file(path):
            split.read()  # says what is wrong with it
        return FoundDataset(path, "COCO", {"train": split})
    if suffix in (".yaml", ".yml"):
        return FoundDataset(path, "YOLO", read_data_yaml(path))
    if suffix == ".xml" and is_voc_file(path):
        problem = "this is Pascal VOC's annotation of a single image"
        remedy = f"pass the folder of the data set, for example {path.parent.parent}"
        raise DatasetError([DataIssue(str(path), problem, remedy)])
    raise DatasetError([describe_file(path)])


def _find_in_folder(folder: Path) -> FoundDataset:
    given, first_error = folder, None
    for _ in range(_MAX_NESTED):
        found, errors = {}, []
        for name, find in _FORMATS.items():
            try:
                splits = find(folder)
            except DatasetError as error:
                errors.append(error)
                continue
            if splits:
                found[name] = splits
        complete = [name for name, splits in found.items() if "train" in splits]
        if complete:
            others = ", ".join(complete[1:])
            notes = (f"{complete[0]} is read; {others} is there too",) * bool(others)
            return FoundDataset(folder, complete[0], found[complete[0]], notes)
        if found and not errors:
            errors.append(_without_training(folder, found))
        first_error = first_error or (errors[0] if errors else None)
        inner = [
            x for x in folder.iterdir() if x.is_dir() and x.name[0] != "." and x.name != "__MACOSX"
        ]
        if len(inner) != 1:
            break
        folder = inner[0]
    raise first_error or describe_folder(given)


def _without_training(folder: Path, found: Mapping[str, Mapping[str, Split]]) -> DatasetError:
    name, splits = next(iter(found.items()))
    there = ", ".join(f"{split} ({x.source})" for split, x in splits.items())
    problem = f"no training annotations found; of {name} there is {there}"
    remedy = "add the training split, or pass the file alone to use it for training"
    return DatasetError([DataIssue(str(folder), problem, remedy)])
