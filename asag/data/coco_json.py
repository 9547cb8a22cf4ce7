"""Reading and checking a COCO-format annotation file.

Letters: I images, A annotations, K classes.

A COCO file is a JSON object with the lists `images`, `annotations` and `categories`. All that is
wrong with a file is gathered before the reader stops, so that one run names everything to fix.
"""

import json
import os
import reprlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from asag.data.coco_table import CocoTable
from asag.data.errors import DataIssue, DatasetError

MAX_INT = 2**1000  # beyond about 2^1023 JSON's whole numbers are no floats
MAX_LISTED_PER_KIND = 5  # entries named for one kind of issue; the rest is counted


def load_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        DatasetError: the file is absent, unreadable or not JSON (with line and column).
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        problem, remedy = "no such file", "check the path"
    except OSError as error:
        problem, remedy = f"cannot be read ({error.strerror})", "check the path and its permissions"
    except json.JSONDecodeError as error:
        problem = f"not valid JSON at line {error.lineno}, column {error.colno}: {error.msg}"
        remedy = "the file may be cut off or edited by hand; export or download it again"
    except UnicodeDecodeError as error:
        problem = f"not text in UTF-8 (byte {error.start})"
        remedy = "export it again as UTF-8 JSON"
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, deep nesting
        problem, remedy = f"not a COCO file: {error}", "export or download it again"
    raise DatasetError([DataIssue(str(path), problem, remedy)])


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
    image_ids = reader.column("images", images, "id", (int, str), "a number or text")
    file_names = reader.column("images", images, "file_name", (str,), "text")
    reader.unique("image id", image_ids, "give every image its own id")
    image_hw = reader.image_sizes(images)
    names, ids, label_of = reader.classes(categories, annotations)
    box_image_ids = reader.column(
        "annotations", annotations, "image_id", (int, str, float), "an id"
    )
    boxes_xywh = reader.boxes(annotations)
    iscrowd = reader.crowd(annotations)
    reader.stop_if_wrong()

    row_of = {image_id: row for row, image_id in enumerate(image_ids)}
    areas = reader.areas(annotations, boxes_xywh)
    return CocoTable(
        json_file=json_file,
        image_root=_best_root(image_roots, file_names),
        class_names=names,
        category_ids=ids,
        image_ids=image_ids,
        file_names=file_names,
        image_hw=image_hw,
        box_image=np.array([row_of.get(i, -1) for i in box_image_ids], dtype=np.int64),
        box_class=np.array([label_of[a["category_id"]] for a in annotations], dtype=np.int64),
        boxes_xywh=boxes_xywh,
        areas=areas,
        iscrowd=iscrowd,
        annotation_ids=reader.annotation_ids(annotations),
        repairs=tuple(reader.repairs),
    )


def _best_root(roots: Sequence[Path], file_names: Sequence[str]) -> Path:
    sample = file_names[:: max(1, len(file_names) // 50)]
    return min(roots, key=lambda root: sum(not os.path.isfile(root / name) for name in sample))


def _describe(section: str, row: int, entry: Any) -> str:
    has_id = isinstance(entry, dict) and "id" in entry
    return f"{section}[{row}]" + (f" (id {entry['id']!r})" if has_id else "")


def _is_flag(value: Any) -> bool:
    """Whether a value is 0 or 1; text is not, "0" would pass for true."""
    return isinstance(value, int | float) and value in (0, 1)


def _is_text(value: str) -> bool:
    """Whether a terminal or a file can take a text: JSON can hold half a character."""
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
        if not isinstance(data, dict):
            self.report(f"holds a {type(data).__name__}, not an object", remedy)
            self.stop_if_wrong()
        if "info" not in data:
            self.repairs.append("no `info`")
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
    ) -> tuple[tuple[str, ...], tuple[int, ...], dict[int, int]]:
        """Class names and category ids by rising id, and the class index of every category id."""
        issues_before = len(self.issues)
        ids = self.column("categories", categories, "id", (int,), "a whole number")
        names = self.column("categories", categories, "name", (str,), "text")
        self.column("annotations", annotations, "category_id", (int, float), "a category's id")
        unprintable = [name for name in names if isinstance(name, str) and not _is_text(name)]
        self.report_each(
            [f"category name {name!r} is not a valid text" for name in unprintable], "rename it"
        )
        if len(self.issues) > issues_before:
            return (), (), {}  # the checks below would only echo these issues
        self.unique("category id", ids, "give every category its own id")
        counts = Counter(a["category_id"] for a in annotations)
        declared = set(ids)
        self.report_each(
            [
                f"{n} annotation(s) use category id {i!r}, which `categories` does not declare"
                for i, n in counts.items()
                if i not in declared
            ],
            f"add it to `categories` (declared ids: {sorted(ids)[:10]}) or fix the annotations",
        )
        kept = self._without_umbrellas(sorted(zip(ids, names, strict=True)), counts)
        return (
            tuple(name for _, name in kept),
            tuple(i for i, _ in kept),
            {i: label for label, (i, _) in enumerate(kept)},
        )

    def _without_umbrellas(
        self, categories: list[tuple[int, str]], counts: Counter
    ) -> list[tuple[int, str]]:
        """Resolve equal names: some exporters add an empty parent category named like its child."""
        ids_of_name: dict[str, list[int]] = defaultdict(list)
        for i, name in categories:
            ids_of_name[name].append(i)
        dropped: set[int] = set()
        for name, ids in ids_of_name.items():
            used = [i for i in ids if counts[i]] or ids[:1]
            if len(used) > 1:
                self.report(
                    f"category name {name!r} stands for ids {used}, all with annotations",
                    "rename one of them or merge their annotations",
                )
            dropped |= set(ids) - set(used)
        if dropped:
            self.repairs.append(f"unused categories with a name used twice: ids {sorted(dropped)}")
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
            [type(area) in (int, float) and 0 <= area < MAX_INT for area in areas], dtype=bool
        )
        if not known.all():
            self.repairs.append(f"{np.count_nonzero(~known)} annotations without a valid `area`")
        written = np.array(
            [area if k else 0 for area, k in zip(areas, known, strict=True)], dtype=np.float64
        )
        with np.errstate(over="ignore", invalid="ignore"):  # such boxes are dropped later
            product = boxes_xywh[:, 2] * boxes_xywh[:, 3]
        return np.where(known, written, product)

    def crowd(self, annotations: list[dict]) -> np.ndarray:
        """(A,) bool; reports anything but 0, 1, true and false."""
        flags = [annotation.get("iscrowd") for annotation in annotations]
        unsaid = sum(flag is None for flag in flags)
        if unsaid:
            self.repairs.append(f"{unsaid} annotations without `iscrowd`")
        wrong = [i for i, flag in enumerate(flags) if flag is not None and not _is_flag(flag)]
        problems = [
            f"{_describe('annotations', i, annotations[i])}: 'iscrowd' = {flags[i]!r}"
            for i in wrong
        ]
        self.report_each(problems, "write 1 for a region to ignore, else 0")
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
