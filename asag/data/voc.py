"""Pascal VOC: one XML file an image.

Layouts: XML files beside the images, in `annotations/` beside `images/`, in `Annotations/` beside
`JPEGImages/` (VOCdevkit, with the splits in `ImageSets/Main/*.txt`), each also below a folder for
every split.

Corners are 1-based and inclusive: pixels xmin to xmax become x = xmin - 1, width = xmax - xmin + 1.
Classes are the names that occur, in alphabetical order, with category ids from 1. The image id is
the name of the XML file.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from asag.data.coco_table import CocoTable
from asag.data.errors import DataIssue, DatasetError
from asag.data.image_names import find_images, printable, split_word, walk

REPAIR = "converted from Pascal VOC"
_MAX_DEPTH = 4  # folders below the data set's in which XML files are looked for
_FOLDERS = ("JPEGImages", "images", "Images", "imgs", "img", "image", "data")
# Files of ImageSets for each split, by preference.
_LISTS = {"train": ("train", "trainval", "default"), "val": ("val",), "test": ("test",)}
_TRUE, _FALSE = ("1", "true", "yes"), ("", "0", "false", "no", "unspecified")


@dataclass(frozen=True)
class VocObject:
    """One object of an image: class name, [xmin, ymin, xmax, ymax] as written, and its mark."""

    name: str
    corners: tuple[float, float, float, float]
    difficult: bool


@dataclass(frozen=True)
class VocImage:
    """Contents of one XML file.

    Attributes:
        file_name: "" where the file does not say.
        height: pixels; 0 where the file does not say.
        width: pixels; 0 where the file does not say.
        objects: in the order of the file.
    """

    file_name: str
    height: int
    width: int
    objects: tuple[VocObject, ...]


@dataclass(frozen=True)
class VocSplit:
    """The files of one split.

    Attributes:
        source: folder of the XML files, or the list of ImageSets.
        xml_files: one an image.
        folder: the image ids are the names of the XML files relative to it.
        image_roots: folders in which the images may lie.
        notes: sentences for the report.
    """

    source: Path
    xml_files: tuple[Path, ...]
    folder: Path
    image_roots: tuple[Path, ...]
    notes: tuple[str, ...] = ()

    def read(self) -> CocoTable:
        """The split as a table.

        Raises:
            DatasetError: with every XML file that cannot be used.
        """
        images, issues = [], []
        for path in self.xml_files:
            try:
                images.append(read_voc_xml(path))
            except DatasetError as error:
                issues += error.issues
        if issues:
            raise DatasetError(issues)
        return self._table(images)

    def _table(self, images: Sequence[VocImage]) -> CocoTable:
        ids = [x.relative_to(self.folder).with_suffix("").as_posix() for x in self.xml_files]
        objects = [x for image in images for x in image.objects]
        names = tuple(sorted({x.name for x in objects}))
        label_of = {name: label for label, name in enumerate(names)}
        counts = [len(image.objects) for image in images]
        boxes_xywh = _boxes_xywh(np.array([x.corners for x in objects]).reshape(-1, 4))
        difficult = np.array([x.difficult for x in objects], dtype=bool)
        notes = [*self.notes]
        if difficult.any():
            notes.append(
                f"{np.count_nonzero(difficult)} difficult object(s) are trained on and, as in "
                "Pascal VOC, ignored by the evaluation"
            )
        table = CocoTable(
            source=self.source,
            image_root=self.image_roots[0],
            class_names=names,
            category_ids=tuple(range(1, len(names) + 1)),
            image_ids=ids,
            file_names=[image.file_name for image in images],
            image_files=[],
            image_hw=np.array([(x.height, x.width) for x in images], np.int64).reshape(-1, 2),
            box_image=np.repeat(np.arange(len(images)), counts),
            box_class=np.array([label_of[x.name] for x in objects], dtype=np.int64),
            boxes_xywh=boxes_xywh,
            areas=boxes_xywh[:, 2] * boxes_xywh[:, 3],
            iscrowd=np.zeros(len(objects), dtype=bool),
            difficult=difficult,
            annotation_ids=np.arange(1, len(objects) + 1),
            repairs=(REPAIR,),
            notes=tuple(notes),
            evaluator_type="pascal_voc",
            classes_declared=False,
        )
        return _with_files(table, self.image_roots)


def find_voc_splits(folder: Path) -> dict[str, VocSplit]:
    """Find the splits of a folder with Pascal VOC's XML files; empty if it has none.

    Raises:
        DatasetError: several data sets lie there, or a list names files that are not there.
    """
    folders = _xml_folders(folder)
    listed = [x for x in folders if _image_sets(x) is not None]
    if listed and len(folders) > 1:
        found = ", ".join(str(x) for x in folders)
        problem = f"several Pascal VOC data sets lie here: {found}"
        raise DatasetError([DataIssue(str(folder), problem, "pass the folder of one of them")])
    if listed:
        return _listed_splits(listed[0])
    of_split: dict[str, list[Path]] = {}
    for place in folders:
        words = [split_word(part) for part in place.relative_to(folder).parts]
        split = next((word for word in reversed(words) if word), "train")
        of_split.setdefault(split, []).append(place)
    return {split: _folder_split(folder, places) for split, places in of_split.items()}


def read_voc_xml(path: Path) -> VocImage:
    """Read one XML file.

    Raises:
        DatasetError: with everything that is wrong with the file.
    """
    root = _parse(path)
    issues: list[DataIssue] = []

    def number(parent: ElementTree.Element | None, key: str, where: str) -> float:
        text = "" if parent is None else (parent.findtext(key) or "").strip()
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not np.isfinite(value):
            state = f"= {text!r}" if text else "is missing"
            issues.append(DataIssue(str(path), f"{where}: {key} {state}", "write a number"))
        return value

    objects = []
    for position, node in enumerate(root.findall("object"), start=1):
        name = (node.findtext("name") or "").strip()
        where = f"object {position} ({printable(name)})" if name else f"object {position}"
        if not name:
            issues.append(DataIssue(str(path), f"{where} has no name", "name its class"))
        box = node.find("bndbox")
        if box is None:
            remedy = "write <bndbox> with xmin, ymin, xmax and ymax, or take the object out"
            issues.append(DataIssue(str(path), f"{where} has no bndbox", remedy))
            continue
        corners = tuple(number(box, key, where) for key in ("xmin", "ymin", "xmax", "ymax"))
        mark = (node.findtext("difficult") or "").strip().lower()
        if mark not in (*_TRUE, *_FALSE):
            problem = f"{where}: difficult = {mark!r}"
            issues.append(DataIssue(str(path), problem, "write 0 or 1"))
        objects.append(VocObject(name, corners, mark in _TRUE))
    size = root.find("size")
    height, width = (
        0.0 if size is None or not (size.findtext(key) or "").strip() else number(size, key, "size")
        for key in ("height", "width")
    )
    if issues:
        raise DatasetError(issues)
    if min(height, width) <= 0:
        height = width = 0
    file_name = (root.findtext("filename") or "").strip()
    return VocImage(file_name, round(height), round(width), tuple(objects))


def _parse(path: Path) -> ElementTree.Element:
    """The root of an XML file of Pascal VOC."""
    remedy = "export the file again, or take it out"
    try:
        data = path.read_bytes()
        root = _root_of(data)
    except OSError as error:
        problem, remedy = f"cannot be read ({error.strerror})", "check the path and permissions"
    except ElementTree.ParseError as error:
        line, column = error.position
        problem = f"not valid XML at line {line}, column {column + 1}: {error.msg}"
    except (ValueError, LookupError) as error:
        problem = f"not valid XML: {error}"
    else:
        if root.tag == "annotation":
            return root
        problem = f"not Pascal VOC's XML: its root is <{root.tag}>, not <annotation>"
    raise DatasetError([DataIssue(str(path), problem, remedy)])


def _root_of(data: bytes) -> ElementTree.Element:
    try:
        return ElementTree.fromstring(data)
    except ValueError:  # encodings of several bytes a character, of which expat knows Unicode only
        declared = re.search(rb"<\?xml[^>]*encoding=[\"']([\w.-]+)[\"']", data[:200])
        if declared is None:
            raise
        text = data.decode(declared[1].decode())
        return ElementTree.fromstring(re.sub(r"<\?xml.*?\?>", "", text, count=1))


def _boxes_xywh(corners: np.ndarray) -> np.ndarray:
    """(A, 4) from 1-based inclusive corners. Some programs count from 0: a 0 stays at the edge."""
    low, high = corners[:, :2], corners[:, 2:]
    low = np.where((low >= 0) & (low < 1), 0.0, low - 1.0)
    return np.hstack([low, high - low])


def _with_files(table: CocoTable, roots: Sequence[Path]) -> CocoTable:
    """Finds the images by <filename>, else by the name of the XML file."""
    stems = [str(image_id) for image_id in table.image_ids]
    counts = Counter(table.file_names)
    # A name that several files give was copied along with the XML.
    named = [row for row, name in enumerate(table.file_names) if name and counts[name] == 1]
    files = find_images(roots, [table.file_names[row] for row in named])
    paths = [""] * len(stems)
    for row, path in zip(named, files.paths, strict=True):
        paths[row] = path
    root, notes, hint = files.root, files.notes, files.hint
    if 2 * sum(map(bool, paths)) < len(stems):  # then the folder is not that of <filename> either
        by_stem = find_images(roots, stems)
        if sum(map(bool, by_stem.paths)) > sum(map(bool, paths)):
            paths, root, notes, hint = [""] * len(stems), by_stem.root, (), by_stem.hint
    left = [row for row, path in enumerate(paths) if not path]
    by_stem = find_images((root,), [stems[row] for row in left])
    for row, path in zip(left, by_stem.paths, strict=True):
        paths[row] = path
    renamed = [row for row in left if paths[row] and table.file_names[row]]
    if renamed:
        names = printable(table.file_names[renamed[0]]), Path(paths[renamed[0]]).name
        notes = (
            *notes,
            f"{len(renamed)} image(s) are not where <filename> says and are taken by the name of "
            f"the XML file ({names[0]!r} is {names[1]!r})",
        )
    return replace(
        table,
        image_root=root,
        file_names=[
            Path(path).relative_to(root).as_posix() if path else name or stem
            for path, name, stem in zip(paths, table.file_names, stems, strict=True)
        ],
        image_files=paths,
        notes=(*table.notes, *notes),
        missing_hint=by_stem.hint or hint,
    )


def _xml_folders(folder: Path) -> list[Path]:
    """Folders with Pascal VOC's XML files."""
    found = []
    for place, files in walk(folder, max_depth=_MAX_DEPTH):
        first = next((x for x in files if x.lower().endswith(".xml")), None)
        if first is not None and is_voc_file(folder / place / first):
            found.append(folder / place)
    return found


def is_voc_file(path: Path) -> bool:
    """Returns True if an XML file begins like Pascal VOC's."""
    with open(path, "rb") as file:
        head = file.read(4000)
    return re.search(rb"<annotation[\s>/]", head.replace(b"\0", b"")) is not None  # also UTF-16


def _image_sets(xml_folder: Path) -> Path | None:
    """The folder of the lists of a split, beside the folder of XML files."""
    for place in ("ImageSets/Main", "ImageSets", "imagesets/main", "ImageSets/main"):
        folder = xml_folder.parent / place
        if any((folder / f"{x}.txt").is_file() for names in _LISTS.values() for x in names):
            return folder
    return None


def _listed_splits(xml_folder: Path) -> dict[str, VocSplit]:
    sets = _image_sets(xml_folder)
    chosen = {
        split: next((sets / f"{x}.txt" for x in lists if (sets / f"{x}.txt").is_file()), None)
        for split, lists in _LISTS.items()
    }
    files = {split: _listed_files(x, xml_folder) for split, x in chosen.items() if x is not None}
    if chosen["train"] is not None and chosen["train"].stem == "trainval" and "val" in files:
        held_out = set(files["val"])
        files["train"] = tuple(x for x in files["train"] if x not in held_out)
    roots = _roots(xml_folder)
    return {
        split: VocSplit(chosen[split], found, xml_folder, roots) for split, found in files.items()
    }


def _listed_files(list_file: Path, xml_folder: Path) -> tuple[Path, ...]:
    """XML files of the lines of a list."""
    lines = [x.strip() for x in list_file.read_text("utf-8-sig", "replace").splitlines()]
    found, absent = [], []
    for line in filter(None, lines):
        names = (line, line.split()[0], Path(line).stem, Path(line.split()[0]).stem)
        paths = [xml_folder / f"{name}.xml" for name in names]
        path = next((x for x in paths if x.is_file()), None)
        if path is None:
            absent.append(line)
        else:
            found.append(path)
    if absent:
        problem = (
            f"{len(absent)} of its lines name no file of {xml_folder} (first: "
            f"{printable(absent[0])}.xml)"
        )
        remedy = "take these lines out, or copy the annotations there"
        raise DatasetError([DataIssue(str(list_file), problem, remedy)])
    if not found:
        remedy = "list the names of its images, one a line, or remove the file"
        raise DatasetError([DataIssue(str(list_file), "the list is empty", remedy)])
    return tuple(dict.fromkeys(found))


def _folder_split(folder: Path, places: Sequence[Path]) -> VocSplit:
    files = [
        place / x
        for place in places
        for x in sorted(x.name for x in place.iterdir() if x.suffix.lower() == ".xml")
        if x[:2] != "._"
    ]
    ids_from = places[0] if len(places) == 1 else folder
    roots = [root for place in places for root in _roots(place)]
    roots = tuple(dict.fromkeys(roots + [folder] * (len(places) > 1)))
    return VocSplit(places[0], tuple(files), ids_from, roots)


def _roots(xml_folder: Path) -> tuple[Path, ...]:
    """Folders in which the images of a folder of XML files may lie, likeliest first."""
    parent, name = xml_folder.parent, xml_folder.name
    roots = [parent / x for x in _FOLDERS] + [parent.parent / x / name for x in _FOLDERS]
    roots += [xml_folder, *(xml_folder / x for x in _FOLDERS), parent]
    if not split_word(name):
        roots += [parent.parent / x / parent.name for x in _FOLDERS]
    return tuple(x for x in dict.fromkeys(roots) if x.is_dir())
