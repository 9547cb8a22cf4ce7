"""Finding splits and class names of a data set in YOLO text: data.yaml, Darknet, or folders."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from asag.data.errors import DataIssue, DatasetError
from asag.data.image_names import SPLIT_WORDS, image_suffixes, split_word, walk
from asag.data.yolo import YoloSplit

_MAX_DEPTH = 4  # folders below the data set's in which images and text files are looked for
_KEYS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
_NAME_FILES = ("classes.txt", "obj.names", "_darknet.labels", "predefined_classes.txt", "names.txt")
_YAML_ENDINGS = (".yaml", ".yml")
_LABEL_LINE = re.compile(rb"\s*\d+(\.0*)?(\s+-?[\d.]+(e-?\d+)?){4,}\s*")


def find_yolo_splits(folder: Path) -> dict[str, YoloSplit]:
    """Find the splits of a folder with YOLO text; empty if it has none.

    Raises:
        DatasetError: several descriptions lie there, or one that cannot be used.
    """
    described = [
        x
        for x in sorted(folder.iterdir())
        if x.suffix.lower() in _YAML_ENDINGS and x.is_file() and _describes_data(x)
    ]
    preferred = [x for x in described if x.stem in ("data", "dataset")]
    if len(described) > 1 and len(preferred) != 1:
        found = ", ".join(x.name for x in described)
        problem = f"several files describe a YOLO data set: {found}"
        raise DatasetError([DataIssue(str(folder), problem, "pass one of these files")])
    if described:
        return read_data_yaml((preferred or described)[0])
    darknet = [x for x in sorted(folder.glob("*.data")) if x.is_file()]
    if darknet:
        return _read_darknet(darknet[0])
    return _splits_of_folders(folder)


def read_data_yaml(path: Path) -> dict[str, YoloSplit]:
    """The splits that a data.yaml describes.

    Raises:
        DatasetError: no valid YAML, classes or paths that are missing or wrong.
    """
    data = _load_yaml(path)
    if not isinstance(data, dict) or not {"names", "nc"} & data.keys():
        problem = "this is no description of a YOLO data set: it has no class names"
        remedy = "write `train`, `val` (folders of images) and `names` (a list of classes)"
        raise DatasetError([DataIssue(str(path), problem, remedy)])
    names, notes = _class_names(path, data)
    base = _base(path, data.get("path"))
    places: dict[str, tuple[Path, ...]] = {}
    for split, keys in _KEYS.items():
        value = next((data[key] for key in keys if data.get(key) not in (None, "", "null")), None)
        if value is None or (split == "test" and "val" in places):
            continue
        try:
            values = value if isinstance(value, list) else [value]
            places[split] = tuple(_place(path, base, keys[0], x) for x in values)
        except DatasetError as error:
            if split == "train":
                raise
            # Exporters name splits that a data set does not have.
            notes = (*notes, error.issues[0].problem)
    keypoints = "kpt_shape" in data
    splits = {
        split: YoloSplit(path, found, names, keypoints=keypoints, notes=notes)
        for split, found in places.items()
    }
    if not splits:
        remedy = "write `train: images/train` and `val: images/val`, relative to this file"
        raise DatasetError([DataIssue(str(path), "it names no images", remedy)])
    return splits


def _load_yaml(path: Path) -> Any:
    """Contents with all values as text: a class called `no` or `007` keeps its name."""
    try:
        return yaml.load(path.read_bytes(), Loader=yaml.BaseLoader)
    except OSError as error:
        problem, remedy = f"cannot be read ({error.strerror})", "check the path and permissions"
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = f"not valid YAML{place}: {getattr(error, 'problem', None) or error}"
        remedy = "correct the file, or export it again"
    except (ValueError, RecursionError) as error:
        problem, remedy = f"not valid YAML: {error}", "export it again as UTF-8"
    raise DatasetError([DataIssue(str(path), problem, remedy)])


def _describes_data(path: Path) -> bool:
    """Returns True if a YAML file looks like a data.yaml; other programs have theirs there too."""
    try:
        data = _load_yaml(path)
    except DatasetError:
        return path.stem in ("data", "dataset")
    return isinstance(data, dict) and "names" in data and bool({"train", "val"} & data.keys())


def _class_names(path: Path, data: Mapping[str, Any]) -> tuple[dict[int, str], tuple[str, ...]]:
    """Class number -> name, and notes."""
    count, given = data.get("nc"), data.get("names")
    number = int(count) if isinstance(count, str) and count.strip().isdecimal() else None
    remedy = "write `names: [cat, dog]`, or a mapping of numbers from 0 to names"
    if given is None and number:
        names = {k: f"class_{k}" for k in range(number)}
        return names, (f"{path.name} has no class names: they are called class_0, class_1, ...",)
    if isinstance(given, str):  # "[a, b]" is a list already; this is `names: a, b` or a file
        given = [x.strip() for x in given.split(",") if x.strip()]
    try:
        pairs = given.items() if isinstance(given, dict) else enumerate(given)
        names = {int(k): v.strip() for k, v in pairs}
    except (TypeError, ValueError, AttributeError):
        names = {}
    problem = ""
    if not names or not all(names.values()) or min(names) < 0:
        problem = f"names = {given!r}"
    elif len(set(names.values())) < len(names):
        twice = next(x for x in names.values() if list(names.values()).count(x) > 1)
        problem = f"names: {twice!r} stands for several classes"
    elif number is not None and number != len(names):
        problem = f"nc is {number}, but names has {len(names)} classes"
    if problem:
        raise DatasetError([DataIssue(str(path), problem, remedy)])
    return names, ()


def _base(path: Path, given: Any) -> Path:
    """The folder that paths are relative to: `path`, if it is there, else that of the file."""
    if isinstance(given, str) and given not in ("", "."):
        text = given.replace("\\", "/")
        for place in (path.parent / Path(text).expanduser(), Path(text).expanduser()):
            if place.is_dir():
                return place
    return path.parent


def _place(path: Path, base: Path, key: str, value: Any) -> Path:
    """The folder or list of images that a path of data.yaml means.

    Roboflow's paths begin with `../` where none is meant, and others with the folders of another
    machine: the longest end of the path that is there counts.
    """
    text = str(value).replace("\\", "/").strip()
    parts = [
        x for x in PurePosixPath(re.sub(r"^[A-Za-z]:", "", text)).parts if x not in ("/", "..")
    ]
    choices = [base / text, path.parent / text]
    for root in dict.fromkeys((base, path.parent)):
        choices += [root.joinpath(*parts[i:]) for i in range(len(parts))]
    found = next((x for x in choices if x.is_dir() or x.is_file()), None)
    if found is None:
        problem = f"{key}: {text} is not there (looked in {base})"
        remedy = f"correct the path; it is relative to {base}"
        raise DatasetError([DataIssue(str(path), problem, remedy)])
    return found


def _read_darknet(path: Path) -> dict[str, YoloSplit]:
    """The splits of a Darknet description: lines of `key = value`."""
    lines = path.read_text("utf-8-sig", "replace").splitlines()
    pairs = [line.partition("=") for line in lines if "=" in line and line.strip()[:1] != "#"]
    data = {key.strip(): value.strip() for key, _, value in pairs}
    names_file = _place(path, path.parent, "names", data.get("names", "obj.names"))
    names = _read_names(names_file)
    splits = {}
    for split, key in (("train", "train"), ("val", "valid"), ("test", "test")):
        if data.get(key):
            place = _place(path, path.parent, key, data[key])
            splits[split] = YoloSplit(names_file, (place,), names)
    return splits


def _splits_of_folders(folder: Path) -> dict[str, YoloSplit]:
    """Splits of folders with images and text files, without a description."""
    places = _image_folders(folder)
    if not places:
        return {}
    name_file = _name_file(folder, places)
    if name_file is None:
        problem = "this is YOLO text, but nothing names its classes"
        remedy = (
            "write data.yaml with `train`, `val` (folders of images) and `names` (a list of "
            "classes), or classes.txt with a name a line"
        )
        raise DatasetError([DataIssue(str(folder), problem, remedy)])
    names = _read_names(name_file)
    of_split: dict[str, list[Path]] = {}
    for place in places:
        words = [split_word(part) for part in place.relative_to(folder).parts]
        split = next((word for word in reversed(words) if word), "train")
        of_split.setdefault(split, []).append(place)
    return {split: YoloSplit(name_file, tuple(x), names) for split, x in of_split.items()}


def _image_folders(folder: Path) -> list[Path]:
    """Folders of images that have YOLO text files beside them or in a folder `labels`."""
    with_images, with_labels = [], set()
    for place, files in walk(folder, max_depth=_MAX_DEPTH):
        endings = {os.path.splitext(x)[1].lower() for x in files}
        if endings & image_suffixes():
            with_images.append(folder / place)
        texts = [x for x in files if x.lower().endswith(".txt") and x not in _NAME_FILES]
        if texts and any(_is_label_file(folder / place / x) for x in texts[:20]):
            with_labels.add(folder / place)
    if not with_labels:
        return []
    if with_labels & set(with_images):
        return [x for x in with_images if x in with_labels]
    return [x for x in with_images if "labels" not in x.relative_to(folder).parts]


def _is_label_file(path: Path) -> bool:
    """Returns True if a text file has nothing but lines of YOLO text, at least one."""
    try:
        lines = [x for x in path.read_bytes()[:20_000].splitlines()[:20] if x.strip()]
    except OSError:
        return False
    return bool(lines) and all(_LABEL_LINE.fullmatch(x) for x in lines[:-1] or lines)


def _name_file(folder: Path, places: Sequence[Path]) -> Path | None:
    folders = [folder, folder / "labels", *places]
    folders += [x / "labels" for x in places] + [x.parent for x in places]
    folders += [folder / word for words in SPLIT_WORDS.values() for word in words]
    files = (x / name for x in folders for name in _NAME_FILES)
    return next((x for x in files if x.is_file()), None)


def _read_names(path: Path) -> dict[int, str]:
    """Class number -> name of a file with a name a line."""
    lines = path.read_text("utf-8-sig", "replace").splitlines()
    names = [x.strip() for x in lines]
    while names and not names[-1]:
        names.pop()
    if not names or not all(names) or len(set(names)) < len(names):
        problem = "the file of class names is empty, has empty lines or a name twice"
        raise DatasetError([DataIssue(str(path), problem, "write every class once, one a line")])
    return dict(enumerate(names))
