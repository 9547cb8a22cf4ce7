"""Malformed annotation files in COCO format."""

from __future__ import annotations

import copy
import functools
import gzip
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog
from PIL import Image

from asag import load_config
from asag.data import (
    CocoSplit,
    DatasetReport,
    SparseDetectionMapper,
    register_coco_splits,
    register_dataset,
)

from .common import ROOT, Case, expect

HEIGHT, WIDTH = 40, 60
NUM_IMAGES = 6
FILE = "train.json"
EXPORT = "export"  # "export or download it again"

Change = Callable[[dict[str, Any]], Any]


def cases(seed: int) -> list[Case]:
    """Returns all cases; the seed selects the broken entries and the positions of truncation."""
    rng = np.random.default_rng(seed)
    return [
        *_boxes(rng),
        *_identifiers(rng),
        *_values(rng),
        *_sections(),
        *_files(rng),
        *_not_json(rng),
        *_splits(),
        *_folders(),
    ]


def healthy() -> dict[str, Any]:
    """Returns a valid file: two boxes for each image, ids and classes with gaps."""
    images = [
        {"id": 10 * i, "file_name": f"{i}.png", "height": HEIGHT, "width": WIDTH}
        for i in range(1, NUM_IMAGES + 1)
    ]
    annotations = [
        {"image_id": image["id"], "category_id": label, "bbox": box, "area": box[2] * box[3]}
        for image in images
        for label, box in ((3, [5, 6, 20, 10]), (7, [0, 0, 30.5, 39]))
    ]
    for number, annotation in enumerate(annotations, start=1):
        annotation |= {"id": 3 * number, "iscrowd": 0}
    categories = [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}]
    return {
        "info": {},
        "images": images,
        "annotations": annotations,
        "categories": categories,
    }


@functools.cache
def image_folder() -> Path:
    """Writes the images of `healthy` once and returns their folder."""
    folder = tempfile.TemporaryDirectory(prefix="bad_inputs_images_")
    _kept.append(folder)
    for i in range(1, NUM_IMAGES + 1):
        Image.new("RGB", (WIDTH, HEIGHT), (30 * i, 90, 200)).save(Path(folder.name, f"{i}.png"))
    return Path(folder.name)


_kept: list[tempfile.TemporaryDirectory] = []  # removed at the end of the process


@functools.cache
def _mapper() -> SparseDetectionMapper:
    cfg = load_config(str(ROOT / "configs/SparseRCNN/sparse_rcnn_tiny.yaml"))
    cfg.INPUT.RANDOM_FLIP = "none"
    return SparseDetectionMapper(cfg, is_train=True)


def use(folder: Path, content: bytes) -> str:
    """Registers a file for training and loads every image; returns the report.

    Raises:
        WrongResult: a box is lost without being counted in the report.
    """
    (folder / FILE).write_bytes(content)
    split = CocoSplit(folder / FILE, (image_folder(),))
    found = register_coco_splits("bad_inputs", train=split, val=None, output_dir=folder)
    (report,) = found.reports
    records = DatasetCatalog.get(found.train)
    trained = sum(len(_mapper()(record)["instances"]) for record in records)
    _account(json.loads(content), report, len(records), trained)
    return report.table()


def _account(data: dict[str, Any], report: DatasetReport, images: int, trained: int) -> None:
    """Checks that every image and box is trained on or counted as left out."""
    expect(
        images + report.missing_files == len(data["images"]),
        f"of {len(data['images'])} images {images} remain, {report.missing_files} are reported",
    )
    crowd = sum(bool(a.get("iscrowd")) for a in data["annotations"])
    expect(report.crowd_boxes == crowd, f"{report.crowd_boxes} crowd regions instead of {crowd}")
    root = image_folder()
    absent = {i["id"] for i in data["images"] if not os.path.isfile(root / i["file_name"])}
    of_absent = sum(a["image_id"] in absent for a in data["annotations"])
    reported = report.invalid_boxes + report.boxes_without_image + report.boxes_outside_image
    lost = len(data["annotations"]) - trained - crowd - of_absent
    expect(lost == reported, f"{lost} boxes are lost, {reported} are reported")


def _changed(change: Change) -> Callable[[Path], str]:
    def run(folder: Path) -> str:
        data = copy.deepcopy(healthy())
        change(data)
        return use(folder, json.dumps(data).encode())

    return run


def _case(
    title: str, name: str, happens: str, change: Change, *says: str, remedy: str | None = None
) -> Case:
    """Makes a case of a changed copy of the valid file; errors must name it."""
    named = (FILE, *says) if remedy is not None else says
    return Case("annotations", title, name, happens, _changed(change), named, remedy)


def _put(section: str, row: int, **values: Any) -> Change:
    return lambda data: data[section][row].update(values)


def _drop(section: str, row: int, key: str) -> Change:
    return lambda data: data[section][row].pop(key)


def _boxes(rng: np.random.Generator) -> Iterator[Case]:
    def at(row: int, box: Any) -> Change:
        return _put("annotations", row, bbox=box)

    nan, inf = float("nan"), float("inf")
    dropped = "dropped and counted in the report"
    for place in range(4):
        for number in (nan, inf, -inf, 1e30):
            box = [5.0, 6.0, 20.0, 10.0]
            box[place] = number
            row = int(rng.integers(2 * NUM_IMAGES))
            title = "box with NaN, infinite or absurd numbers"
            name = f"{number} at {place}"
            yield _case(title, name, dropped, at(row, box), "1 box(es) without a positive")
    for name, box in {
        "no width": [5, 6, 0, 10],
        "no height": [5, 6, 10, 0],
        "a point": [5, 6, 0, 0],
        "negative width": [25, 6, -20, 10],
        "negative height": [5, 26, 20, -10],
        "a millionth of a pixel wide": [5, 6, 1e-6, 10],
        "corners inverted": [40, 30, -30, -20],
        "all zero": [0, 0, 0, 0],
    }.items():
        row = int(rng.integers(2 * NUM_IMAGES))
        says = "1 box(es) without a positive, finite size are dropped"
        yield _case("box without a size, or inverted", name, dropped, at(row, box), says)
    for name, box in {
        "right of it": [70, 5, 10, 10],
        "below it": [5, 50, 10, 10],
        "left of it": [-20, 5, 10, 10],
        "above it": [5, -20, 10, 10],
        "touching from outside": [60, 5, 10, 10],
        "by a millionth inside": [60 - 1e-6, 5, 10, 10],
    }.items():
        row = int(rng.integers(2 * NUM_IMAGES))
        happens = "ignored and counted in the report"
        says = "1 box(es) lie outside their image"
        yield _case("box outside its image", name, happens, at(row, box), says)
    for name, box in {
        "to the right": [40, 5, 50, 10],
        "to the left": [-10, 5, 20, 10],
        "everywhere": [-10, -10, 500, 500],
    }.items():
        row = int(rng.integers(2 * NUM_IMAGES))
        happens = "clipped and counted in the report"
        says = "1 box(es) reach beyond their image and are clipped"
        yield _case("box beyond its image", name, happens, at(row, box), says)
    says = "1 box(es) are at most 1 pixel"
    for side in (1.0, 0.3):
        change = at(3, [5, 5, side, 9])
        yield _case("thin box", f"{side} pixels", "kept and counted", change, says)
    for name, box in {
        "three numbers": [1, 2, 3],
        "five numbers": [1, 2, 3, 4, 5],
        "nothing": [],
        "null": None,
        "a null in it": [1, 2, None, 4],
        "text": "1 2 3 4",
        "numbers as text": ["1", "2", "3", "4"],
        "an object": {"x": 1, "y": 2, "w": 3, "h": 4},
        "nested": [[1, 2], [3, 4]],
        "a number": 7,
        "true": [1, 2, True, "x"],
        "a number of 400 digits": [10**399, 2, 3, 4],
    }.items():
        row = int(rng.integers(2 * NUM_IMAGES))
        happens = "names entry and value; write four numbers"
        says = f"annotations[{row}] (id {3 * row + 3}): 'bbox' = "
        yield _case(
            "box that is not four numbers", name, happens, at(row, box), says, remedy="four"
        )
    change = _drop("annotations", 4, "bbox")
    says = "annotations[4] (id 15): 'bbox' is missing"
    yield _case("no box", "bbox", "names the entry", change, says, remedy="four numbers")


def _identifiers(rng: np.random.Generator) -> Iterator[Case]:
    row = int(rng.integers(2 * NUM_IMAGES))
    where = f"annotations[{row}] (id {3 * row + 3})"

    def renumber(section: str, ids: Callable[[int], Any]) -> Change:
        def change(data: dict[str, Any]) -> None:
            for number, entry in enumerate(data[section]):
                entry["id"] = ids(number)

        return change

    for unknown in (0, 99, -3, 3.5, float("nan")):
        happens = "names the id and those declared"
        says = f"1 annotation(s) use category id {unknown!r}"
        change = _put("annotations", row, category_id=unknown)
        remedy = "declared ids: [3, 7]"
        yield _case("unknown category", f"id {unknown}", happens, change, says, remedy=remedy)
    happens = "taken for the id that it means, and reported"
    says = "1 annotations whose `category_id` is written differently"
    for value in ("3", "03", " 3"):
        change = _put("annotations", row, category_id=value)
        yield _case("category id written differently", repr(value), happens, change, says)
    for name, value in {"null": None, "list": [3], "true": True}.items():
        says = f"{where}: 'category_id' = {value!r}"
        change = _put("annotations", row, category_id=value)
        happens = "names the entry"
        yield _case("category id of another type", name, happens, change, says, remedy="needs")
    yield _case(
        "no category id",
        "missing",
        "names the entry",
        _drop("annotations", row, "category_id"),
        f"{where}: 'category_id' is missing",
        remedy="every entry of annotations needs",
    )
    happens = "taken for the id that it means, and reported"
    says = "1 annotations whose `image_id` is written differently"
    for name, value in {"text": "10", "leading zeros": "0010", "file name": "1.png"}.items():
        change = _put("annotations", row, image_id=value)
        yield _case("image id written differently", name, happens, change, says)
    for name, value in {"unknown": 999, "unknown text": "x", "NaN": float("nan")}.items():
        happens = "dropped and counted in the report"
        change = _put("annotations", row, image_id=value)
        says = "1 annotation(s) of images not in the file are dropped"
        yield _case("annotation of an unknown image", name, happens, change, says)
    for name, value in {"null": None, "list": [10], "object": {}}.items():
        change = _put("annotations", row, image_id=value)
        says = f"{where}: 'image_id' = {value!r}"
        happens = "names the entry"
        yield _case("image id of another type", name, happens, change, says, remedy="needs")
    for name, ids in {
        "used twice": lambda n: n // 2 + 1,
        "zero": lambda n: n,
        "negative": lambda n: -n - 1,
        "text": str,
        "null": lambda n: None,
        "fractions": lambda n: n + 1.5,
        "beyond 64 bits": lambda n: 2**63 + n,
    }.items():
        happens = "numbered anew in a copy for the evaluation, and reported"
        change = renumber("annotations", ids)
        says = "annotation ids that are missing, not positive or used twice"
        yield _case("annotation ids", name, happens, change, says)
    yield _case(
        "image id twice",
        "same id",
        "names the id",
        _put("images", 1, id=10),
        "image id 10 is used more than once",
        remedy="its own id",
    )
    yield _case(
        "category id twice",
        "same id",
        "names the id",
        _put("categories", 1, id=7),
        "category id 7 is used more than once",
        remedy="its own id",
    )
    for name, ids in {"scattered": lambda n: 1000 - 7 * n, "text": lambda n: f"image {n}"}.items():

        def rename(data: dict[str, Any], ids: Callable[[int], Any] = ids) -> None:
            new = {image["id"]: ids(n) for n, image in enumerate(data["images"])}
            for image in data["images"]:
                image["id"] = new[image["id"]]
            for annotation in data["annotations"]:
                annotation["image_id"] = new[annotation["image_id"]]

        yield _case("image ids not in a row", name, "taken as they are", rename)

    def scatter_categories(data: dict[str, Any]) -> None:
        new = {3: 90210, 7: -4}
        for entry in data["categories"]:
            entry["id"] = new[entry["id"]]
        for annotation in data["annotations"]:
            annotation["category_id"] = new[annotation["category_id"]]

    happens = "classes in the order of the ids"
    yield _case("category ids not in a row", "scattered", happens, scatter_categories)


def _values(rng: np.random.Generator) -> Iterator[Case]:
    row = int(rng.integers(2 * NUM_IMAGES))
    for value in ("0", "false", 2, -1, 0.5, float("nan"), [], {}):
        happens = "names the entry; write 0 or 1"
        change = _put("annotations", row, iscrowd=value)
        says = f"annotations[{row}] (id {3 * row + 3}): 'iscrowd' = "
        remedy = "write 1 for a region to ignore"
        yield _case(
            "iscrowd that is neither 0 nor 1", repr(value), happens, change, says, remedy=remedy
        )
    for value in (1, True, 1.0):
        happens = "a region to ignore, counted in the report"
        change = _put("annotations", row, iscrowd=value)
        yield _case("iscrowd", repr(value), happens, change, "(1 crowd)")
    happens = "no crowd, and reported"
    change = _drop("annotations", row, "iscrowd")
    yield _case("iscrowd", "missing", happens, change, "1 annotations without `iscrowd`")
    odd = {"NaN": float("nan"), "negative": -5, "text": "12", "null": None, "huge": 10**399}
    for name, value in odd.items():
        happens = "the box's in a copy for the evaluation, and reported"
        change = _put("annotations", row, area=value)
        yield _case("area", name, happens, change, "1 annotations without a valid `area`")
    for name, size in {
        "zero": (0, 60),
        "negative": (40, -60),
        "text": ("high", "wide"),
        "NaN": (float("nan"), 60.0),
        "infinite": (float("inf"), 60.0),
        "a fraction": (40.5, 60),
        "a list": ([40], 60),
        "half of it": (40, None),
        "beyond 64 bits": (10**30, 60),
    }.items():
        happens = "names the image and the values"
        change = _put("images", 2, height=size[0], width=size[1])
        says = "images[2] (id 30): height = "
        yield _case("image size", name, happens, change, says, remedy="leave both keys out")
    happens = "taken as numbers"
    change = _put("images", 2, height="40", width="60")
    yield _case("image size", "numbers as text", happens, change)

    def without_sizes(data: dict[str, Any]) -> None:
        for image in data["images"]:
            del image["height"], image["width"]

    happens = "read from the images, and reported"
    yield _case("no image sizes", "none", happens, without_sizes, "images without a size")
    for name, value in {"number": 5, "null": None, "list": ["a.png"]}.items():
        change = _put("images", 3, file_name=value)
        says = f"images[3] (id 40): 'file_name' = {value!r}"
        happens = "names the entry"
        yield _case("file name of another type", name, happens, change, says, remedy="text")
    change = _drop("images", 3, "file_name")
    says = "images[3] (id 40): 'file_name' is missing"
    yield _case("no file name", "missing", "names the entry", change, says, remedy="every entry")
    for name, value in {"number": 5, "null": None}.items():
        change = _put("categories", 0, name=value)
        says = f"categories[0] (id 7): 'name' = {value!r}"
        happens = "names the entry"
        yield _case("class name of another type", name, happens, change, says, remedy="text")
    change = _put("categories", 0, name="\ud83d")
    says = "is not a valid text"
    yield _case("half a character", "class name", "names it", change, says, remedy="rename it")


def _sections() -> Iterator[Case]:
    shape = "an object with the lists"
    for key in ("images", "annotations", "categories"):
        change = _without(key)
        says = f"key '{key}' is missing"
        yield _case("missing section", key, "names the key", change, says, remedy=shape)
        for name, value in {"object": {}, "null": None, "text": "none", "number": 3}.items():
            change = _with(key, value)
            says = f"key '{key}' is not a list"
            title = "section that is not a list"
            yield _case(title, f"{key}: {name}", "names the key", change, says, remedy=shape)
        for name, value in {"null": None, "number": 3, "list": []}.items():

            def change(data: dict[str, Any], k: str = key, v: Any = value) -> None:
                data[k].insert(1, v)

            title = "entry that is not an object"
            says = f"{key}[1] is not an object"
            yield _case(title, f"{key}: {name}", "names the entry", change, says, remedy=shape)
    for key, says in {
        "images": "'images' is empty",
        "annotations": "no usable box among 0",
        "categories": "'categories' is empty",
    }.items():
        happens = "names the section; choose another file"
        change = _with(key, [])
        yield _case("empty list", key, happens, change, says, remedy="choose")

    def all_crowd(data: dict[str, Any]) -> None:
        for annotation in data["annotations"]:
            annotation["iscrowd"] = 1

    def all_flat(data: dict[str, Any]) -> None:
        for annotation in data["annotations"]:
            annotation["bbox"] = [1, 1, 0, 0]

    says = f"no usable box among {2 * NUM_IMAGES} annotations"
    happens = "counts the annotations"
    yield _case("no usable box", "no sizes", happens, all_flat, says, remedy="choose the file")
    says = f"all {2 * NUM_IMAGES} annotations are crowd regions"
    happens = "says so"
    yield _case("crowd regions only", "all", happens, all_crowd, says, remedy="set iscrowd to 0")

    def no_boxes_in_image(data: dict[str, Any]) -> None:
        data["annotations"] = data["annotations"][2:]

    happens = "kept as an image without objects, counted in the report"
    yield _case("image without annotations", "one", happens, no_boxes_in_image, "(1 empty)")

    def same_name(data: dict[str, Any]) -> None:
        data["categories"][1]["name"] = "dog"

    def umbrella(data: dict[str, Any]) -> None:
        data["categories"].append({"id": 1, "name": "dog"})

    says = "category name 'dog' stands for ids [3, 7]"
    yield _case("class name twice", "both used", "names both", same_name, says, remedy="rename")
    happens = "the unused one is left out, and reported"
    says = "unused categories with a name used twice: ids [1]"
    yield _case("class name twice", "one unused", happens, umbrella, says)
    change = _more_categories
    happens = "kept, and reported"
    yield _case("classes without boxes", "one", happens, change, "no boxes of class ghost")


def _without(key: str) -> Change:
    return lambda data: data.pop(key)


def _with(key: str, value: Any) -> Change:
    return lambda data: data.update({key: value})


def _more_categories(data: dict[str, Any]) -> None:
    data["categories"].append({"id": 8, "name": "ghost"})


def _files(rng: np.random.Generator) -> Iterator[Case]:
    for name, file_name in {
        "no such file": "gone.png",
        "empty name": "",
        "null byte": "a\x00b.png",
        "too long": "x" * 5000,
        "half a character": "\ud83d.png",
        "other folder": "elsewhere/1.png",
    }.items():
        row = int(rng.integers(NUM_IMAGES))
        happens = "its image is dropped and counted in the report"
        change = _put("images", row, file_name=file_name)
        says = "1 image file(s) do not exist; these images are dropped"
        yield _case("missing image file", name, happens, change, says)

    def most(data: dict[str, Any]) -> None:
        for image in data["images"][1:]:
            image["file_name"] = f"wrong/photo_{image['file_name']}"

    says = (f"5 of {NUM_IMAGES} image files are not in", "wrong/photo_2.png", "nearest name", "png")
    happens = "names the folder, the first file and the nearest one"
    yield _case("most image files missing", "5 of 6", happens, most, *says, remedy="folder")
    happens = "kept, and reported"
    says = "1 file name(s) stand for more than one image"
    yield _case(
        "one file for two images", "same", happens, _put("images", 1, file_name="1.png"), says
    )


def _raw(title: str, name: str, happens: str, content: bytes, *says: str, remedy: str) -> Case:
    def run(folder: Path) -> str:
        return use(folder, content)

    return Case("annotations", title, name, happens, run, (FILE, *says), remedy)


def _not_json(rng: np.random.Generator) -> Iterator[Case]:
    text = json.dumps(healthy())
    for i, share in enumerate(np.sort(rng.uniform(0.01, 0.99, size=8))):
        content = text[: int(len(text) * share)].encode()
        happens = "names line and column; export it again"
        says = "not valid JSON at line 1, column"
        yield _raw(
            "cut off", f"place {i}, after {share:.0%}", happens, content, says, remedy=EXPORT
        )
    broken = {
        "empty": b"",
        "blanks": b" \n\n ",
        "trailing comma": text.replace("}]", "},]").encode(),
        "single quotes": text.replace('"', "'").encode(),
        "no quotes": text.replace('"', "").encode(),
        "comment": b"// exported\n" + text.encode(),
        "two objects": (text + "\n" + text).encode(),
        "web page": b"<!DOCTYPE html><html>Sign in</html>",
        "XML": b"<?xml version='1.0'?><annotation/>",
        "CSV": b"file,x,y,w,h\na.png,1,2,3,4\n",
        "LFS pointer": b"version https://git-lfs.github.com/spec/v1\n",
    }
    for name, content in broken.items():
        says = "not valid JSON at line"
        happens = "names line and column; export it again"
        yield _raw("not JSON", name, happens, content, says, remedy=EXPORT)
    for name, content in {
        "gzip": gzip.compress(text.encode(), mtime=0),
        "Latin-1": text.replace("cat", "k\u00e4tzchen")
        .encode("latin-1")
        .replace(b"\\u00e4", b"\xe4"),
        "zip": b"PK\x03\x04\xff\xfe\xfd" + rng.bytes(100),
    }.items():
        happens = "says that it is no text"
        yield _raw("not text", name, happens, content, "not text in UTF-8", remedy="UTF-8")
    for name, content in {
        "100000 brackets": b"[" * 100_000,
        "a number of 5000 digits": b'{"images": [' + b"9" * 5000 + b"]}",
    }.items():
        happens = "names the file; export it again"
        yield _raw("JSON beyond reason", name, happens, content, "not a COCO file", remedy=EXPORT)
    for name, content in {
        "list": b"[]",
        "text": b'"coco"',
        "number": b"3",
        "null": b"null",
    }.items():
        happens = "says what the file holds"
        remedy = "an object with the lists"
        yield _raw("JSON of another kind", name, happens, content, "not an object", remedy=remedy)
    for encoding in ("utf-8-sig", "utf-16", "utf-32"):

        def run(folder: Path, e: str = encoding) -> str:
            return use(folder, text.encode(e))

        yield Case("annotations", "other encodings of Unicode", encoding, "read", run)


def _splits() -> Iterator[Case]:
    def with_val(change: Change, expected: Sequence[int] = (0, 1)) -> Callable[[Path], str]:
        def run(folder: Path) -> str:
            data = healthy()
            (folder / FILE).write_text(json.dumps(data))
            change(data)
            (folder / "val.json").write_text(json.dumps(data))
            splits = [CocoSplit(folder / f, (image_folder(),)) for f in (FILE, "val.json")]
            found = register_coco_splits(
                "bad_inputs", train=splits[0], val=splits[1], output_dir=folder
            )
            expect(found.class_names == ("cat", "dog"), f"classes are {found.class_names}")
            labels = [a["category_id"] for a in DatasetCatalog.get(found.val)[0]["annotations"]]
            expect(labels == [*expected], f"labels of the evaluation are {labels}")
            return found.reports[1].table()

        return run

    def swapped(data: dict[str, Any]) -> None:
        ids = {3: 7, 7: 3}
        for entry in data["categories"]:
            entry["id"] = ids[entry["id"]]
        for annotation in data["annotations"]:
            annotation["category_id"] = ids[annotation["category_id"]]

    def fewer(data: dict[str, Any]) -> None:
        data["categories"] = [{"id": 3, "name": "cat"}]
        data["annotations"] = [a for a in data["annotations"] if a["category_id"] == 3]

    def used(data: dict[str, Any]) -> None:
        _more_categories(data)
        data["annotations"][0]["category_id"] = 8

    happens = "matched by name, and reported"
    title = "evaluation file of other category ids"
    says = ("category ids or their order differ",)
    yield Case("annotations", title, "swapped", happens, with_val(swapped), says)
    happens = "accepted, and reported"
    for title, change, says in (
        (
            "evaluation file of other classes, which it does not use",
            _more_categories,
            "unused classes that the training split lacks are left out: ['ghost']",
        ),
        (
            "evaluation file of fewer classes",
            fewer,
            "classes that only the training split declares: dog",
        ),
        (
            "evaluation file of classes spelled otherwise",
            _put("categories", 0, name="Dog"),
            "classes spelled differently in the training split: 'Dog' is 'dog'",
        ),
    ):
        labels = [0] if change is fewer else [0, 1]
        yield Case("annotations", title, "one", happens, with_val(change, labels), (says,))
    title = "evaluation file with boxes of other classes"
    happens = "names and counts them"
    says = ("val.json", "adds ['ghost']", "1 box(es) of 'ghost'")
    yield Case("annotations", title, "one", happens, with_val(used), says, "declare the same")


def _folders() -> Iterator[Case]:
    def folder_case(title: str, name: str, says: str, remedy: str, *files: str) -> Case:
        def run(folder: Path) -> str:
            for file in files:
                (folder / "mine" / file).parent.mkdir(parents=True, exist_ok=True)
                (folder / "mine" / file).write_text(json.dumps(healthy()))
            register_dataset(folder / "mine", output_dir=folder)
            return ""

        return Case("annotations", title, name, "says what to do", run, ("mine", says), remedy)

    title = "folder"
    yield folder_case(title, "absent", "no such folder", "check the path")
    yield folder_case(title, "another one", "no training", "layouts", "readme.txt")
    said = "no evaluation annotations"
    yield folder_case(title, "no evaluation", said, "--val-fraction", "annotations/train.json")
    said = "several files could be the train annotations"
    years = [f"annotations/instances_train{year}.json" for year in (2014, 2017)]
    yield folder_case(title, "ambiguous", said, "keep one of them", *years)

    def json_is_folder(folder: Path) -> str:
        (folder / FILE).mkdir()
        split = CocoSplit(folder / FILE, (image_folder(),))
        register_coco_splits("bad_inputs", train=split, val=None, output_dir=folder)
        return ""

    says = (FILE, "cannot be read")
    happens = "names the file"
    yield Case(
        "annotations", "folder", "as a file", happens, json_is_folder, says, "check the path"
    )

    def json_is_absent(folder: Path) -> str:
        split = CocoSplit(folder / FILE, (image_folder(),))
        register_coco_splits("bad_inputs", train=split, val=None, output_dir=folder)
        return ""

    says = (FILE, "no such file")
    yield Case("annotations", "file", "absent", happens, json_is_absent, says, "check the path")
