"""Reading and checking a COCO-format annotation file.

Letters: I images, A annotations, K classes.

A COCO file is a JSON object with the lists `images`, `annotations` and `categories`. All that is
wrong with a file is gathered before the reader stops, so that one run names everything to fix.
"""

import reprlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from asag.data.coco_table import CocoTable
from asag.data.errors import DataIssue, DatasetError
from asag.data.ids import IdIndex, id_order
from asag.data.image_names import find_images
from asag.data.json_files import load_json
from asag.data.other_formats import describe_json

MAX_INT = 2**1000  # beyond about 2^1023 JSON's whole numbers are no floats
MAX_AREA = 1e10  # square pixels; COCO's evaluation ignores larger objects
MAX_UNLISTED = 0.5  # larger share of annotations without an image: the ids are wrong, not the list
MAX_LISTED_PER_KIND = 5  # entries named for one kind of issue; the rest is counted


def read_coco_table(json_file: Path, image_roots: Sequence[Path]) -> CocoTable:
    """Read one COCO-format file.

    Args:
        json_file: the annotation file.
        image_roots: folders its file names may be relative to; the one that holds most of the files
            is taken (the first one on a tie).

    Raises:
        DatasetError: unreadable file, missing sections or keys, malformed values, duplicate image
            or category ids, categories that are not declared, or no image at all.
    """
    reader = _Reader(json_file)
    images, annotations, categories = reader.sections()
    image_ids = reader.ids("images", images)
    file_names = reader.column("images", images, "file_name", (str,), "text")
    reader.unique("image id", image_ids, "give every image its own id")
    image_hw = reader.image_sizes(images)
    names, ids, box_class = reader.classes(categories, annotations)
    box_image_ids = reader.column(
        "annotations", annotations, "image_id", (int, str, float), "an id"
    )
    boxes_xywh = reader.boxes(annotations)
    iscrowd = reader.flags(annotations, "iscrowd", "write 1 for a region to ignore, else 0")
    difficult = np.zeros(len(annotations), dtype=bool)
    if reader.evaluator_type == "pascal_voc":  # elsewhere COCO's own rules hold
        difficult = reader.flags(annotations, "difficult", "write 1 for a difficult object, else 0")
    reader.stop_if_wrong()

    box_image = reader.box_images(image_ids, file_names, box_image_ids)
    areas = reader.areas(annotations, boxes_xywh)
    files = find_images(image_roots, file_names)
    reader.notes += files.notes
    return CocoTable(
        source=json_file,
        image_root=files.root,
        class_names=names,
        category_ids=ids,
        image_ids=image_ids,
        file_names=file_names,
        image_files=files.paths,
        image_hw=image_hw,
        box_image=box_image,
        box_class=box_class,
        boxes_xywh=boxes_xywh,
        areas=areas,
        iscrowd=iscrowd,
        difficult=difficult & ~iscrowd,
        annotation_ids=reader.annotation_ids(annotations),
        repairs=tuple(reader.repairs),
        notes=tuple(reader.notes),
        evaluator_type=reader.evaluator_type,
        missing_hint=files.hint,
    )


def _describe(section: str, row: int, entry: Any) -> str:
    has_id = isinstance(entry, dict) and "id" in entry
    return f"{section}[{row}]" + (f" (id {entry['id']!r})" if has_id else "")


def _is_flag(value: Any) -> bool:
    """Returns True for 0 and 1, not for text: "0" would pass for true."""
    return isinstance(value, int | float) and value in (0, 1)


def _is_text(value: str) -> bool:
    """Returns True if a terminal or a file can take a text: JSON can hold half a character."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


class _Reader:
    """Checks the parts of one file and gathers issues, so that one run names all of them."""

    def __init__(self, json_file: Path) -> None:
        self.json_file = json_file
        self.issues: list[DataIssue] = []
        self.repairs: list[str] = []
        self.notes: list[str] = []
        self.evaluator_type = "coco"

    def report(self, problem: str, remedy: str) -> None:
        self.issues.append(DataIssue(str(self.json_file), problem, remedy))

    def report_each(self, problems: list[str], remedy: str) -> None:
        """Report the first few of a kind and count the rest."""
        for problem in problems[:MAX_LISTED_PER_KIND]:
            self.report(problem, remedy)
        if len(problems) > MAX_LISTED_PER_KIND:
            rest = len(problems) - MAX_LISTED_PER_KIND
            self.report(f"{rest} more entries like the one above", remedy)

    def stop_if_wrong(self) -> None:
        if self.issues:
            raise DatasetError(self.issues)

    def sections(self) -> tuple[list[dict], list[dict], list[dict]]:
        data = load_json(self.json_file)
        remedy = "a COCO file is an object with the lists images, annotations and categories"
        known = describe_json(data)
        if known:
            self.report(f"this is {known[0]}", f"{known[1]}; {remedy}")
            self.stop_if_wrong()
        if not isinstance(data, dict):
            self.report(f"holds a {type(data).__name__}, not an object", remedy)
            self.stop_if_wrong()
        info = data.get("info")
        if "info" not in data:
            self.repairs.append("no `info`")
        elif isinstance(info, dict) and info.get("evaluator_type") == "pascal_voc":
            self.evaluator_type = "pascal_voc"
        sections = []
        for key in ("images", "annotations", "categories"):
            section = data.get(key)
            if not isinstance(section, list):
                state = "is missing" if key not in data else "is not a list"
                self.report(f"key {key!r} {state}", remedy)
            else:
                wrong = [i for i, entry in enumerate(section) if not isinstance(entry, dict)]
                self.report_each([f"{key}[{i}] is not an object" for i in wrong], remedy)
                if not section and key != "annotations":
                    self.report(f"{key!r} is empty", f"add {key} or choose another file")
            sections.append(section)
        self.stop_if_wrong()
        return tuple(sections)

    def column(
        self, section: str, entries: list[dict], key: str, types: tuple[type, ...], expected: str
    ) -> list:
        """The values of one key; reports entries that lack it or hold something else."""
        values = [entry.get(key) for entry in entries]
        wrong = [i for i, value in enumerate(values) if type(value) not in types]
        problems = []
        for i in wrong:
            state = f"= {values[i]!r}" if key in entries[i] else "is missing"
            problems.append(f"{_describe(section, i, entries[i])}: {key!r} {state}")
        self.report_each(problems, f"every entry of {section} needs {key!r}: {expected}")
        return values

    def ids(self, section: str, entries: list[dict]) -> list:
        """The ids of a section; 7.0, as tables of other programs write it, is 7."""
        values = [
            int(x["id"]) if isinstance(x.get("id"), float) and x["id"].is_integer() else x.get("id")
            for x in entries
        ]
        given = [
            x | {"id": value} if "id" in x else x for x, value in zip(entries, values, strict=True)
        ]
        return self.column(section, given, "id", (int, str), "a whole number or text")

    def unique(self, what: str, values: list, remedy: str) -> None:
        counts = Counter(value for value in values if type(value) in (int, str))
        twice = [value for value, count in counts.items() if count > 1]
        self.report_each([f"{what} {value!r} is used more than once" for value in twice], remedy)

    def image_sizes(self, images: list[dict]) -> np.ndarray:
        """(I, 2) height and width; 0 where neither is written."""
        sizes = np.zeros((len(images), 2), dtype=np.int64)
        problems = []
        for row, image in enumerate(images):
            height, width = image.get("height"), image.get("width")
            if height is None and width is None:
                continue
            try:
                sizes[row] = height, width
                if sizes[row].tolist() != [float(height), float(width)]:
                    sizes[row] = -1
            except (TypeError, ValueError, OverflowError):
                sizes[row] = -1
            if sizes[row].min() < 1:
                where = _describe("images", row, image)
                problems.append(f"{where}: height = {height!r}, width = {width!r}")
        self.report_each(problems, "write the size in pixels, or leave both keys out")
        if (sizes == 0).any():
            self.repairs.append("images without a size")
        return sizes

    def classes(
        self, categories: list[dict], annotations: list[dict]
    ) -> tuple[tuple[str, ...], tuple[int | str, ...], np.ndarray]:
        """Class names and category ids by rising id, and the (A,) class index of every box."""
        issues_before = len(self.issues)
        ids = self.ids("categories", categories)
        names = self.column("categories", categories, "name", (str,), "text")
        types = (int, float, str)
        used = self.column("annotations", annotations, "category_id", types, "a category's id")
        unprintable = [name for name in names if isinstance(name, str) and not _is_text(name)]
        self.report_each(
            [f"category name {name!r} is not a valid text" for name in unprintable], "rename it"
        )
        if len(self.issues) > issues_before:
            return (), (), np.zeros(0, dtype=np.int64)  # checks below would echo these issues
        self.unique("category id", ids, "give every category its own id")
        index = IdIndex(ids, (names,))
        rows = [index.find(i) for i in used]
        self._note_corrected("category_id", "categories", index)
        counts = Counter(i for i, row in zip(used, rows, strict=True) if row < 0)
        self.report_each(
            [
                f"{n} annotation(s) use category id {i!r}, which `categories` does not declare"
                for i, n in counts.items()
            ],
            "add it to `categories` (declared ids: "
            f"{sorted(ids, key=id_order)[:10]}) or correct the annotations",
        )
        entries = sorted(zip(ids, names, strict=True), key=lambda entry: id_order(entry[0]))
        kept = self._without_umbrellas(entries, Counter(ids[row] for row in rows if row >= 0))
        label_of = {i: label for label, (i, _) in enumerate(kept)}
        labels = [label_of.get(ids[row], -1) if row >= 0 else -1 for row in rows]
        return (
            tuple(name for _, name in kept),
            tuple(i for i, _ in kept),
            np.array(labels, dtype=np.int64),
        )

    def box_images(
        self, image_ids: list[int | str], file_names: list[str], box_image_ids: list
    ) -> np.ndarray:
        """(A,) rows of the annotations' images; -1 for images that are not listed.

        An id of another type than the image's, or its file name, is taken where it fits one image
        only. Reports an error if most annotations fit no image.
        """
        stems = [PurePosixPath(name.replace("\\", "/")) for name in file_names]
        names = ([x.name for x in stems], [x.stem for x in stems])
        index = IdIndex(image_ids, (file_names, *names))
        rows = np.array([index.find(i) for i in box_image_ids], dtype=np.int64)
        self._note_corrected("image_id", "images", index)
        unlisted = rows < 0
        if len(rows) and unlisted.mean() > MAX_UNLISTED:
            first = box_image_ids[int(unlisted.argmax())]
            self.report(
                f"{np.count_nonzero(unlisted)} of {len(rows)} annotations belong to no image: "
                f"their image_id is {first!r} for example, while ids of images are like "
                f"{reprlib.repr(image_ids[0])}",
                "write the id of an entry of `images` as the image_id of every annotation",
            )
            self.stop_if_wrong()
        return rows

    def _note_corrected(self, key: str, section: str, index: IdIndex) -> None:
        if index.corrected:
            written, listed = map(reprlib.repr, index.example)
            self.repairs.append(
                f"{index.corrected} annotations whose `{key}` is written differently from the id "
                f"in `{section}` ({written} is {listed})"
            )

    def _without_umbrellas(
        self, categories: list[tuple[int | str, str]], counts: Counter
    ) -> list[tuple[int | str, str]]:
        """Resolve equal names: some exporters add an empty parent category named like its child."""
        ids_of_name: dict[str, list[int | str]] = defaultdict(list)
        for i, name in categories:
            ids_of_name[name].append(i)
        dropped: set[int | str] = set()
        for name, ids in ids_of_name.items():
            used = [i for i in ids if counts[i]] or ids[:1]
            if len(used) > 1:
                self.report(
                    f"category name {name!r} stands for ids {used}, all with annotations",
                    "rename one of them or merge their annotations",
                )
            dropped |= set(ids) - set(used)
        if dropped:
            self.repairs.append(
                f"unused categories with a name used twice: ids {sorted(dropped, key=id_order)}"
            )
        return [(i, name) for i, name in categories if i not in dropped]

    def boxes(self, annotations: list[dict]) -> np.ndarray:
        """(A, 4) float64; reports anything that is not four numbers."""
        values = [annotation.get("bbox") for annotation in annotations]
        if not values:
            return np.zeros((0, 4))
        try:
            boxes = np.array(values)
            if boxes.dtype.kind in "iuf" and boxes.shape == (len(values), 4):
                return boxes.astype(np.float64)
        except (ValueError, OverflowError):
            pass  # ragged: the search below names the entries

        def is_box(value: Any) -> bool:
            return (
                isinstance(value, list)
                and len(value) == 4
                and all(type(v) is float or (type(v) is int and abs(v) < MAX_INT) for v in value)
            )

        wrong = [i for i, value in enumerate(values) if not is_box(value)]
        problems = []
        for i in wrong:
            written = reprlib.repr(values[i])
            state = f"= {written}" if "bbox" in annotations[i] else "is missing"
            problems.append(f"{_describe('annotations', i, annotations[i])}: 'bbox' {state}")
        self.report_each(problems, "write it as four numbers, [x, y, width, height] in pixels")
        if wrong:
            return np.zeros((len(values), 4))
        return np.array(values, dtype=np.float64)

    def areas(self, annotations: list[dict], boxes_xywh: np.ndarray) -> np.ndarray:
        """(A,) square pixels: as written, or that of the box."""
        areas = [a.get("area") for a in annotations]
        known = np.array(
            [type(area) in (int, float) and 0 <= area <= MAX_AREA for area in areas], dtype=bool
        )
        if not known.all():
            self.repairs.append(f"{np.count_nonzero(~known)} annotations without a valid `area`")
        written = np.array(
            [area if k else 0 for area, k in zip(areas, known, strict=True)], dtype=np.float64
        )
        with np.errstate(over="ignore", invalid="ignore"):  # such boxes are dropped later
            product = boxes_xywh[:, 2] * boxes_xywh[:, 3]
        return np.where(known, written, np.minimum(product, MAX_AREA))

    def flags(self, annotations: list[dict], key: str, remedy: str) -> np.ndarray:
        """(A,) bool; reports anything but 0, 1, true and false."""
        flags = [annotation.get(key) for annotation in annotations]
        unsaid = sum(flag is None for flag in flags)
        if unsaid and key == "iscrowd":
            self.repairs.append(f"{unsaid} annotations without `iscrowd`")
        wrong = [i for i, flag in enumerate(flags) if flag is not None and not _is_flag(flag)]
        problems = [
            f"{_describe('annotations', i, annotations[i])}: {key!r} = {flags[i]!r}" for i in wrong
        ]
        self.report_each(problems, remedy)
        return np.array([_is_flag(flag) and bool(flag) for flag in flags], dtype=bool)

    def annotation_ids(self, annotations: list[dict]) -> np.ndarray:
        """Ids as written if they can serve; else 1..A.

        pycocotools takes id 0 for "no match" and keeps only one annotation of an id, so both cost
        AP silently.
        """
        ids = [annotation.get("id") for annotation in annotations]
        if all(type(i) is int and 0 < i < 2**63 for i in ids) and len(set(ids)) == len(ids):
            return np.array(ids, dtype=np.int64)
        self.repairs.append("annotation ids that are missing, not positive or used twice")
        return np.arange(1, len(ids) + 1, dtype=np.int64)
