"""Data sets in other formats than COCO, in archives, and with mistakes in whole columns."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from asag.data import register_dataset

from .common import Case, expect

HEIGHT, WIDTH = 40, 60
NUM_IMAGES = 6
XML = """\
<annotation><filename>{name}.png</filename>
<size><width>60</width><height>40</height><depth>3</depth></size>
<object><name>cat</name><difficult>0</difficult>
<bndbox><xmin>11</xmin><ymin>6</ymin><xmax>30</xmax><ymax>25</ymax></bndbox></object>
</annotation>
"""
YAML = "train: images/train\nval: images/val\nnames: [cat, dog]\n"

Files = Mapping[str, str | bytes]


def cases(seed: int) -> list[Case]:
    """Returns all cases; the seed is not used."""
    return [*_voc(), *_yolo(), *_descriptions(), *_archives(), *_unknown(), *_columns()]


def _write(folder: Path, files: Files) -> None:
    """Writes text and bytes; an empty `.png` becomes an image."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".png" and not content:
            Image.new("RGB", (WIDTH, HEIGHT), (90, 120, 30)).save(path)
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)


def _registered(files: Files, source: str = "", **options: Any) -> Callable[[Path], str]:
    """Registers a folder, or a file in it; returns both reports."""

    def run(folder: Path) -> str:
        _write(folder / "mine", files)
        values = {"val_fraction": 0.5} | options
        found = register_dataset(folder / "mine" / source, output_dir=folder, **values)
        boxes = sum(report.boxes for report in found.reports)
        expect(boxes > 0, "no boxes are left")
        return "\n".join(report.table() for report in found.reports)

    return run


def _case(
    title: str,
    name: str,
    happens: str,
    run: Callable[[Path], str],
    *says: str,
    remedy: str | None = None,
) -> Case:
    return Case("formats", title, name, happens, run, says, remedy)


# Pascal VOC.


def _voc_files(**changes: str | bytes) -> dict[str, str | bytes]:
    """Returns the files of four images; `changes` replaces the XML of image 2."""
    files: dict[str, str | bytes] = {}
    for number in range(4):
        files[f"images/{number}.png"] = b""
        files[f"annotations/{number}.xml"] = XML.format(name=number)
    files["annotations/2.xml"] = changes.get("xml", files["annotations/2.xml"])
    return files


def _voc() -> Iterator[Case]:
    good = XML.format(name="2")
    happens = "names the file and what is wrong in it"
    for name, xml, says, remedy in (
        ("cut off", good[:150], "not valid XML at line", "export the file again"),
        ("not XML", "cat 1 2 3 4", "not valid XML at line 1", "export the file again"),
        ("another root", "<annotation2/><annotation>", "not valid XML at line", "export"),
        ("no bndbox", good.replace("bndbox", "polygon"), "object 1 (cat) has no bndbox", "write"),
        ("no name", good.replace("<name>cat</name>", ""), "object 1 has no name", "name its class"),
        ("no xmax", good.replace("xmax>", "x2>"), "object 1 (cat): xmax is missing", "a number"),
        ("text", good.replace(">30<", ">wide<"), "object 1 (cat): xmax = 'wide'", "a number"),
        ("NaN", good.replace(">30<", ">nan<"), "object 1 (cat): xmax = 'nan'", "a number"),
        ("difficult 2", good.replace(">0<", ">2<"), "object 1 (cat): difficult = '2'", "0 or 1"),
        ("width", good.replace(">60<", ">a<"), "size: width = 'a'", "a number"),
    ):
        run = _registered(_voc_files(xml=xml))
        yield _case("Pascal VOC's XML", name, happens, run, "2.xml", says, remedy=remedy)
    no_size = good.replace(">60<", ">0<")
    yield _case("no size", "zero", "read from the image", _registered(_voc_files(xml=no_size)))
    renamed = good.replace("2.png", "IMG_0001.JPG")
    happens = "its image is taken by the name of the XML file, and reported"
    says = "1 image(s) are not where <filename> says"
    run = _registered(_voc_files(xml=renamed))
    yield _case("another <filename>", "one", happens, run, says)
    inverted = good.replace(">30<", ">5<")
    happens = "dropped and counted in the report"
    run = _registered(_voc_files(xml=inverted))
    yield _case("corners inverted", "one", happens, run, "1 box(es) without a positive")
    hard = good.replace("<difficult>0", "<difficult>1")
    happens = "trained on, ignored by the evaluation, and reported"
    run = _registered(_voc_files(xml=hard))
    yield _case("difficult object", "one", happens, run, "1 difficult object(s) are trained on")
    happens = "names list and entry"
    for name, lines, says in (
        ("absent", "0\n1\n7\n", "1 of its lines name no file"),
        ("empty", "\n", "the list is empty"),
    ):
        files = _voc_files() | {"ImageSets/Main/train.txt": lines}
        files = {x.replace("images/", "JPEGImages/"): y for x, y in files.items()}
        run = _registered(files)
        yield _case("list of a split", name, happens, run, "train.txt", says, remedy="the")


# YOLO.


def _yolo_files(**changes: str | bytes) -> dict[str, str | bytes]:
    """Returns two images for each split; `changes` replaces data.yaml and the first text file."""
    files: dict[str, str | bytes] = {"data.yaml": changes.get("yaml", YAML)}
    for split in ("train", "val"):
        for number in range(2):
            files[f"images/{split}/{split}{number}.png"] = b""
            files[f"labels/{split}/{split}{number}.txt"] = "0 0.5 0.5 0.25 0.25\n"
    files["labels/train/train0.txt"] = changes.get("text", "1 0.5 0.5 0.5 0.5\n")
    return files


def _yolo() -> Iterator[Case]:
    happens = "names file and line"
    before = "1 0.5 0.5 0.5 0.5\n"
    for name, line, says, remedy in (
        ("class too high", "2 0.5 0.5 0.1 0.1", "class 2, but data.yaml names 2 class", "add the"),
        ("class below 0", "-1 0.5 0.5 0.1 0.1", "class -1, but data.yaml names 2", "add the class"),
        (
            "a class name",
            "cat 0.5 0.5 0.1 0.1",
            "class 'cat' (class names do not",
            "a class number",
        ),
        ("a fraction", "0.5 0.5 0.5 0.1 0.1", "class '0.5'", "a class number"),
        ("pixels", "0 30 20 10 10", "30 is no fraction between 0 and 1; these look like", "write"),
        ("negative", "0 -0.5 0.5 0.1 0.1", "-0.5 is no fraction between 0 and 1", "write"),
        ("NaN", "0 nan 0.5 0.1 0.1", "'nan 0.5 0.1 0.1' are not all numbers", "write"),
        ("commas", "0, 0.5, 0.5, 0.1, 0.1", "class '0,'", "begin the line with a class number"),
        ("three numbers", "0 0.5 0.5 0.1", "3 numbers behind the class", "write"),
        ("a confidence", "0 0.5 0.5 0.1 0.1 0.9", "(a confidence behind the box?", "write"),
    ):
        run = _registered(_yolo_files(text=f"{before}\n{line}\n"), val_fraction=None)
        yield _case("line of YOLO text", name, happens, run, "train0.txt:3", says, remedy=remedy)
    happens = "an image without objects"
    run = _registered(_yolo_files(text=""), val_fraction=None)
    yield _case("empty text file", "one", happens, run, "(1 empty)")
    files = _yolo_files()
    del files["labels/train/train0.txt"]
    run = _registered(files, val_fraction=None)
    happens = "an image without objects, and reported"
    yield _case("no text file", "one", happens, run, "1 image(s) have no text file")
    polygon = "0 0.25 0.25 0.75 0.25 0.5 0.75\n"
    run = _registered(_yolo_files(text=polygon), val_fraction=None)
    yield _case("polygon", "a triangle", "the box around it", run)
    files = {x: y for x, y in _yolo_files().items() if not x.startswith("labels")}
    happens = "says where they are expected"
    run = _registered(files, val_fraction=None)
    says = "none of the 2 images here has a text file"
    yield _case("no text files at all", "none", happens, run, says, remedy="copy the label files")
    files = {x: y for x, y in _yolo_files().items() if x != "data.yaml"}
    says = "nothing names its classes"
    run = _registered(files, val_fraction=None)
    yield _case("no class names", "none", "says so", run, "YOLO", says, remedy="write data.yaml")


def _descriptions() -> Iterator[Case]:
    happens = "names the file and the place"
    for name, text, says, remedy in (
        ("not YAML", "names: [cat\ntrain: x", "not valid YAML at line", "correct the file"),
        ("no names", "train: images/train", "it has no class names", "names"),
        ("a list", "- a\n- b\n", "this is no description of a YOLO data set", "write"),
        ("nc", YAML + "nc: 3\n", "nc is 3, but names has 2 classes", "names: [cat, dog]"),
        ("names twice", YAML.replace("dog", "cat"), "'cat' stands for several classes", "names"),
        ("empty name", YAML.replace("dog", "''"), "names = ", "names: [cat, dog]"),
        ("no images", "names: [cat, dog]\n", "it names no images", "write `train:"),
        (
            "absent folder",
            YAML.replace("s/train", "s/gone"),
            "train: images/gone is not",
            "correct",
        ),
        ("empty folder", YAML.replace("images/train", "empty"), "no images in", "correct the path"),
    ):
        files = _yolo_files(yaml=text) | {"empty/readme.md": "nothing"}
        run = _registered(files, "data.yaml", val_fraction=None)
        yield _case("data.yaml", name, happens, run, "data.yaml", says, remedy=remedy)
    other = "/content/datasets/signs/images/"
    text = YAML.replace("images/", other)
    run = _registered(_yolo_files(yaml=text), val_fraction=None)
    happens = "the longest end of the path that is there"
    yield _case("folders of another machine in data.yaml", "all", happens, run)
    text = "train: ../images/train\nval: ../images/val\nnames: {0: no, 1: 'on'}\n"
    run = _registered(_yolo_files(yaml=text), val_fraction=None)
    happens = "taken as they are written"
    yield _case("class names that YAML takes for true and false", "both", happens, run, "no", "on")


# Archives and what is no data set.


def _archives() -> Iterator[Case]:
    happens = "says so"
    remedy = "download it again"
    for name, content in {"garbage": b"PK\x03\x04" + b"x" * 200, "empty": b""}.items():
        run = _registered({"set.zip": content}, "set.zip", val_fraction=None)
        yield _case("zip", name, happens, run, "set.zip", "not a valid zip", remedy=remedy)

    def empty_zip(folder: Path) -> str:
        with zipfile.ZipFile(folder / "set.zip", "w"):
            pass
        register_dataset(folder / "set.zip", output_dir=folder)
        return ""

    says = "this is an empty folder"
    yield _case("zip", "without files", happens, empty_zip, says, remedy="unpack the archive")


def _unknown() -> Iterator[Case]:
    happens = "says what it is and how to go on"
    labelme = json.dumps({"shapes": [], "imagePath": "1.png", "version": "5"})
    via = json.dumps({"_via_img_metadata": {}, "_via_settings": {}})
    studio = json.dumps([{"id": 1, "data": {"image": "1.png"}, "annotations": []}])
    createml = json.dumps([{"image": "1.png", "annotations": []}])
    results = json.dumps([{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}])
    captions = json.dumps(
        {"images": [{}], "categories": [], "annotations": [{"caption": "a cat", "image_id": 1}]}
    )
    for name, file, content, says, remedy in (
        ("LabelMe", "a.json", labelme, "LabelMe's JSON", "labelme2coco"),
        ("VIA", "a.json", via, "VIA's JSON", "export it from VIA as COCO"),
        ("Label Studio", "a.json", studio, "Label Studio's own JSON", "export the project"),
        ("CreateML", "a.json", createml, "CreateML's JSON", "as COCO"),
        ("detections", "a.json", results, "a COCO list of detections", "pass the annotations"),
        ("captions", "a.json", captions, "a COCO file of captions", "the file of instances"),
        ("table", "a.csv", "file,x\n", "a table (CSV)", "export the data as COCO"),
        ("TFRecord", "a.tfrecord", b"\x00\x01", "TensorFlow's TFRecord", "export the data as"),
        ("tar", "a.tar", b"\x00", "a tar archive", "unpack it"),
        ("7-Zip", "a.7z", b"7z", "a 7-Zip archive", "unpack it"),
        ("video", "a.mp4", b"\x00", "a video", "demo/demo.py"),
        ("image", "a.png", b"", "a single image", "pass the folder"),
        ("XML", "a.xml", XML.format(name=1), "annotation of a single image", "pass the folder"),
        ("unknown", "a.xyz", b"1", "no data set that is known", "COCO"),
    ):
        run = _registered({file: content}, file)
        yield _case("file of another kind", name, happens, run, file, says, remedy=remedy)
    cvat = "<?xml version='1.0'?><annotations><version>1.1</version></annotations>"
    for name, files, says, remedy in (
        ("LabelMe", {"1.png": b"", "1.json": labelme}, "LabelMe's JSON", "labelme2coco"),
        ("CreateML", {"1.png": b"", "_annotations.createml.json": createml}, "CreateML", "COCO"),
        ("CVAT's XML", {"1.png": b"", "annotations.xml": cvat}, "CVAT's XML", "COCO 1.0"),
        ("DOTA", {"labelTxt/1.txt": "1 2 3", "1.png": b""}, "DOTA's text", "convert it"),
        ("KITTI", {"label_2/1.txt": "Car 0 0", "1.png": b""}, "KITTI's text", "datum convert"),
        ("table", {"1.png": b"", "_annotations.csv": "a,b"}, "a table (CSV)", "COCO JSON"),
        ("packed", {"set.zip": b"PK"}, "an archive that is still packed", "pass the zip"),
        ("images only", {"1.png": b""}, "a folder of images without annotations", "label them"),
    ):
        run = _registered(files, val_fraction=None)
        yield _case("folder of another kind", name, happens, run, says, remedy=remedy)


# Whole columns.


def _coco(change: Callable[[dict[str, Any]], None]) -> dict[str, str | bytes]:
    """Returns a changed file with twelve boxes of two classes in six images."""
    rng = np.random.default_rng(0)
    images = [
        {"id": i, "file_name": f"{i}.png", "height": HEIGHT, "width": WIDTH}
        for i in range(1, NUM_IMAGES + 1)
    ]
    annotations = []
    for number in range(2 * NUM_IMAGES):
        size = rng.integers(8, 20, size=2)
        corner = rng.integers(0, np.array([WIDTH, HEIGHT]) - size)
        if number < 4:  # one box in every corner of the images
            corner = np.array([(number % 2) * (WIDTH - 1), (number // 2) * (HEIGHT - 1)])
            corner = np.minimum(corner, np.array([WIDTH, HEIGHT]) - size)
        entry = {"id": number + 1, "image_id": number // 2 + 1, "category_id": number % 2 + 1}
        box = [*corner.tolist(), *size.tolist()]
        annotations.append(entry | {"bbox": box, "area": box[2] * box[3], "iscrowd": 0})
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    data = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
    change(data)
    files = {f"images/{image['file_name']}": b"" for image in images}
    return {"annotations/train.json": json.dumps(data)} | files


def _boxes(function: Callable[..., list[float]]) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        for annotation in data["annotations"]:
            annotation["bbox"] = function(*annotation["bbox"])
            annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]

    return change


def _areas(function: Callable[[float], float]) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        for annotation in data["annotations"]:
            annotation["area"] = function(annotation["area"])

    return change


def _twice(data: dict[str, Any]) -> None:
    data["annotations"] += [a | {"id": 100 + a["id"]} for a in data["annotations"]]


def _other_ids(data: dict[str, Any]) -> None:
    for annotation in data["annotations"]:
        annotation["image_id"] = 1000 + annotation["image_id"]


def _columns() -> Iterator[Case]:
    corners = "write [x1, y1, x2 - x1, y2 - y1]"
    happens = "says what they look like and how to convert them"
    w, h = WIDTH, HEIGHT
    for name, change, says, remedy in (
        (
            "fractions",
            _boxes(lambda x, y, a, b: [x / w, y / h, a / w, b / h]),
            "look like fractions of the image size, [x, y, width, height]",
            "multiply x and width by the width",
        ),
        (
            "fractions of centers",
            _boxes(lambda x, y, a, b: [(x + a / 2) / w, (y + b / 2) / h, a / w, b / h]),
            "look like fractions of the image size, [center x, center y, width, height]",
            "with the upper left corner",
        ),
        (
            "corners",
            _boxes(lambda x, y, a, b: [x, y, x + a, y + b]),
            "look like corners [x1, y1, x2, y2]",
            corners,
        ),
        (
            "corners, y first",
            _boxes(lambda x, y, a, b: [y, x, y + b, x + a]),
            "look like corners with y first",
            corners,
        ),
        (
            "centers",
            _boxes(lambda x, y, a, b: [x + a / 2, y + b / 2, a, b]),
            "look like [center x, center y, width, height]",
            "write [center x - width / 2",
        ),
        (
            "percent",
            _boxes(lambda x, y, a, b: [100 * x / w, 100 * y / h, 100 * a / w, 100 * b / h]),
            "look like percent of the image size",
            "multiply x and width",
        ),
        (
            "of larger images",
            _boxes(lambda x, y, a, b: [7 * x, 7 * y, 7 * a, 7 * b]),
            "reach far beyond their images",
            "scale the boxes",
        ),
        (
            "of smaller images",
            _boxes(lambda x, y, a, b: [x / 3, y / 3, a / 3, b / 3]),
            "lie in the upper left corner of their images",
            "Scale them to the images",
        ),
    ):
        run = _registered(_coco(change))
        yield _case("all boxes of another meaning", name, happens, run, says, remedy=remedy)
    happens = "the areas of the boxes are used, and reported"
    says = "`area` does not fit the boxes"
    for name, function in {
        "zero": lambda area: 0,
        "one": lambda area: 1,
        "fractions": lambda area: area / (w * h),
        "too large": lambda area: 4 * area,
    }.items():
        yield _case(
            "areas that do not fit", name, happens, _registered(_coco(_areas(function))), says
        )
    happens = "each is kept once, and reported"
    says = "boxes repeat another one and are dropped"
    yield _case("every box twice", "all", happens, _registered(_coco(_twice)), says)
    happens = "says how ids and image ids differ"
    says = "12 of 12 annotations belong to no image"
    remedy = "write the id of an entry of `images`"
    run = _registered(_coco(_other_ids))
    yield _case("annotations of other images", "all", happens, run, says, remedy=remedy)
