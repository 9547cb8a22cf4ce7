"""Formats and layouts: what `--data` takes, converted exactly."""

import json
import math
import os
import shutil
import zipfile
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
import pytest
from data_support import HEIGHT, WIDTH, coco_split, evaluate_perfect, write_image, write_roboflow
from detectron2.data import DatasetCatalog, MetadataCatalog
from hypothesis import given, settings
from hypothesis import strategies as st

from asag.data import DataChecks, DatasetError, find_dataset, register_dataset
from asag.data.coco_json import read_coco_table
from asag.data.voc import VocSplit
from asag.data.yolo import YoloSplit
from asag.data.yolo_layouts import read_data_yaml

CAT_AND_DOG = "names: [cat, dog]\n"


# Writers of the formats, for the tests only.


def voc_xml(name: str, objects=(), size=(WIDTH, HEIGHT), path: str = "") -> str:
    """An annotation; objects are (class name, (xmin, ymin, xmax, ymax), difficult)."""
    nodes = "".join(
        f"<object><name>{escape(label)}</name><difficult>{int(difficult)}</difficult><bndbox>"
        f"<xmax>{x2}</xmax><xmin>{x1}</xmin><ymin>{y1}</ymin><ymax>{y2}</ymax></bndbox>"
        f"<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part></object>"
        for label, (x1, y1, x2, y2), difficult in objects
    )
    return (
        f"<annotation><folder>x</folder><filename>{escape(name)}</filename>{path}"
        f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>{nodes}"
        "</annotation>"
    )


def write_voc(folder: Path, images: str, xmls: str, names, offset: int = 0) -> None:
    """An image and an XML file of two objects for each name."""
    for number, name in enumerate(names):
        write_image(folder / images / f"{name}.png")
        low = 10 + number + offset
        objects = [("cat", (low, low, low + 49, low + 39), False)]
        objects.append(("dog", (1, 1, 30 + number, 40), number == 1))
        path = folder / xmls / f"{name}.xml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(voc_xml(f"{name}.png", objects))


def write_yolo(folder: Path, images: str, labels: str, names) -> None:
    """An image and a text file of two objects for each name."""
    for name in names:
        write_image(folder / images / f"{name}.png")
        path = folder / labels / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("0 0.5 0.5 0.25 0.5\n1 0.25 0.25 0.5 0.5\n")


def counts(made) -> list[tuple[int, int]]:
    return [(report.images, report.boxes) for report in made.reports]


# COCO layouts.


def place(folder: Path, split: str, json_file: str, images: str, count: int) -> None:
    data = coco_split(split, count)
    for image in data["images"]:
        image["file_name"] = f"{split}_{image['file_name']}"
        write_image(folder / images / image["file_name"])
    (folder / json_file).parent.mkdir(parents=True, exist_ok=True)
    (folder / json_file).write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("train_json", "train_images", "val_json", "val_images"),
    [
        (
            "annotations/train2017.json",
            "images/train2017",
            "annotations/val2017.json",
            "images/val2017",
        ),
        ("train2017.json", "train2017", "val2017.json", "val2017"),
        (
            "annotations/train_annotations.json",
            "images/train",
            "annotations/val_annotations.json",
            "images/val",
        ),
        ("train_coco.json", "train", "validation_coco.json", "validation"),
        ("instances_train.json", "images", "instances_val.json", "images"),
        ("train/labels.json", "train/data", "validation/labels.json", "validation/data"),
        ("train/labels.json", "train/data", "test/labels.json", "test/data"),
        (
            "annotations/instances_Train.json",
            "images/Train",
            "annotations/instances_Validation.json",
            "images/Validation",
        ),
        ("annotations/instances_Train.json", "images", "annotations/instances_Test.json", "images"),
        ("Annotations/Train.json", "Images/Train", "Annotations/Valid.json", "Images/Valid"),
        ("train/train.json", "train/images", "val/val.json", "val/images"),
        (
            "images/train/annotations.json",
            "images/train",
            "images/val/annotations.json",
            "images/val",
        ),
        ("annotations/train/coco.json", "photos", "annotations/val/coco.json", "photos"),
        ("set/annotations/train.json", "set/images", "set/annotations/val.json", "set/images"),
        ("labels/train.json", "data/train", "labels/dev.json", "data/dev"),
    ],
)
def test_coco_layouts_of_two_splits(tmp_path, train_json, train_images, val_json, val_images):
    folder = tmp_path / "d"
    place(folder, "a", train_json, train_images, 4)
    place(folder, "b", val_json, val_images, 2)
    made = register_dataset(folder, output_dir=tmp_path)
    assert counts(made) == [(4, 12), (2, 6)]
    assert [report.missing_files for report in made.reports] == [0, 0]
    for name, images in ((made.train, train_images), (made.val, val_images)):
        files = [Path(x["file_name"]) for x in DatasetCatalog.get(name)]
        assert {x.parent for x in files} == {folder / images}


@pytest.mark.parametrize(
    ("json_file", "images"),
    [
        ("annotations/instances_default.json", "images"),
        ("annotations/person_keypoints_default.json", "images"),
        ("annotations/instances_default.json", "images/default"),
        ("annotations/instances_front_camera.json", "images/front_camera"),
        ("result.json", "images"),
        ("labels.json", "data"),
        ("annotations.json", "JPEGImages"),
        ("_annotations.coco.json", "."),
        ("my project.json", "pictures"),
        ("annotations/whatever.json", "images"),
        ("train.json", "images"),
    ],
)
def test_coco_layouts_of_a_single_split(tmp_path, json_file, images):
    folder = tmp_path / "d"
    place(folder, "a", json_file, images, 10)
    (folder / "notes.json").write_text('{"categories": [], "info": {}}')
    with pytest.raises(DatasetError, match=r"single split \(COCO\)\n.*--val-fraction 0\.2"):
        register_dataset(folder, output_dir=tmp_path)
    made = register_dataset(folder, output_dir=tmp_path, val_fraction=0.2)
    assert counts(made) == [(8, 24), (2, 6)]
    assert [report.missing_files for report in made.reports] == [0, 0]
    assert made.reports[0].notes == (), "names fit as they are"
    single = register_dataset(folder / json_file, output_dir=tmp_path, val_fraction=0.2)
    assert counts(single) == counts(made)


def test_other_files_of_coco_are_left_alone(tmp_path):
    folder = tmp_path / "d"
    for split in ("train", "val"):
        place(folder, split, f"annotations/instances_{split}2017.json", f"{split}2017", 3)
        for kind in ("captions", "person_keypoints", "panoptic", "stuff"):
            (folder / "annotations" / f"{kind}_{split}2017.json").write_text("{}")
    (folder / "annotations" / "image_info_test2017.json").write_text("{}")
    (folder / "coco_instances_results.json").write_text("[]")
    assert counts(register_dataset(folder, output_dir=tmp_path)) == [(3, 9), (3, 9)]


def test_two_subsets_without_the_names_of_splits_are_ambiguous(tmp_path):
    folder = tmp_path / "d"
    for name in ("front", "rear"):
        place(folder, name, f"annotations/instances_{name}.json", f"images/{name}", 3)
    with pytest.raises(DatasetError, match=r"instances_front\.json, annotations/instances_rear"):
        register_dataset(folder, output_dir=tmp_path)


def test_a_json_beside_others_names_the_folder(tmp_path):
    folder = write_roboflow(tmp_path / "d")
    with pytest.raises(DatasetError, match=f"pass the folder with all splits \\({folder}\\); or"):
        register_dataset(folder / "train" / "_annotations.coco.json", output_dir=tmp_path)


def test_the_test_split_stands_in_for_a_missing_one(tmp_path):
    folder = write_roboflow(tmp_path / "d")
    (folder / "valid").rename(folder / "test")
    made = register_dataset(folder, output_dir=tmp_path)
    assert "there is no split val" in made.reports[0].table()
    assert counts(made) == [(4, 12), (2, 6)]
    made = register_dataset(folder, output_dir=tmp_path, val_fraction=0.5)
    assert counts(made) == [(2, 6), (2, 6)], "asked to divide, the test images stay out"


# Archives.


@pytest.mark.parametrize("inner", ["", "my set/"])
def test_a_zip_is_read_once(tmp_path, monkeypatch, inner):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "cache"))
    folder = write_roboflow(tmp_path / "d")
    with zipfile.ZipFile(tmp_path / "road signs.zip", "w") as file:
        for path in sorted(folder.rglob("*.*")):
            file.write(path, inner + str(path.relative_to(folder)))
        file.writestr("__MACOSX/._train", "x")
    made = register_dataset(tmp_path / "road signs.zip", output_dir=tmp_path)
    assert made.train == "road_signs_train"
    assert counts(made) == [(4, 12), (2, 6)]
    (note,) = made.reports[0].notes
    assert note.startswith(f"road signs.zip is unpacked into {tmp_path / 'cache' / 'unpacked'}")
    (unpacked,) = (tmp_path / "cache" / "unpacked").iterdir()
    mark = unpacked / "mark"
    mark.touch()
    register_dataset(tmp_path / "road signs.zip", output_dir=tmp_path)
    assert mark.exists(), "not unpacked again"
    results, _ = evaluate_perfect(made, tmp_path / "inference")
    assert results["bbox"]["AP"] == pytest.approx(100)


class Undeclared(zipfile.ZipInfo):
    """A member whose name is UTF-8 without the flag that says so, as some programs write it."""

    def _encodeFilenameFlags(self):
        return self.filename.encode(), self.flag_bits & ~0x800


def test_names_in_a_zip(tmp_path, monkeypatch):
    """Backslashes of Windows, and UTF-8 that is not declared."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "cache"))
    folder = write_roboflow(tmp_path / "d")
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as file:
        for split in ("train", "valid"):
            data = json.loads((folder / split / "_annotations.coco.json").read_text())
            for image in data["images"]:
                content = (folder / split / image["file_name"]).read_bytes()
                image["file_name"] = f"b\u00e4r {image['file_name']}"
                file.writestr(Undeclared(f"{split}\\{image['file_name']}"), content)
            file.writestr(f"{split}\\_annotations.coco.json", json.dumps(data))
    with zipfile.ZipFile(tmp_path / "d.zip") as file:
        assert not any("\u00e4" in x for x in file.namelist()), "the test writes no such archive"
    made = register_dataset(tmp_path / "d.zip", output_dir=tmp_path)
    assert [x.warnings[1:] for x in made.reports] == [[], []]
    assert [x.missing_files for x in made.reports] == [0, 0]


def test_members_of_a_zip_stay_in_its_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "cache"))
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as file:
        file.writestr("../../evil.txt", "x")
        file.writestr("/etc/evil.txt", "x")
    with pytest.raises(DatasetError):
        register_dataset(tmp_path / "d.zip", output_dir=tmp_path)
    assert not list(tmp_path.glob("evil.txt")) and not list(tmp_path.glob("cache/evil.txt"))
    assert len(list((tmp_path / "cache" / "unpacked").rglob("evil.txt"))) == 2


def test_a_zip_that_cannot_be_unpacked(tmp_path, monkeypatch):
    write_roboflow(tmp_path / "d")
    archive = Path(shutil.make_archive(str(tmp_path / "d"), "zip", tmp_path / "d"))
    (tmp_path / "file").touch()
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "file"))
    with pytest.raises(DatasetError, match=r"cannot be unpacked into .*\n.*DETECTRON2_DATASETS"):
        register_dataset(archive, output_dir=tmp_path)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "cache"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 8, 1))
    with pytest.raises(DatasetError, match="MiB, 0 are free"):
        register_dataset(archive, output_dir=tmp_path)
    assert list((tmp_path / "cache" / "unpacked").iterdir()) == []


# Pascal VOC.

NUMBERS = st.integers(1, 90)
VOC_OBJECTS = st.lists(
    st.tuples(
        st.sampled_from(["cat", "dog & co", "b\u00e4r", "\u732b"]),
        st.tuples(NUMBERS, NUMBERS, st.integers(0, 60), st.integers(0, 30)),
        st.booleans(),
    ),
    max_size=3,
)


@settings(deadline=None, max_examples=25)
@given(st.lists(VOC_OBJECTS, min_size=1, max_size=3))
def test_voc_round_trip(tmp_path_factory, images):
    folder = tmp_path_factory.mktemp("voc")
    expected = []
    for number, objects in enumerate(images):
        corners = [(c, (x, y, x + w, y + h), d) for c, (x, y, w, h), d in objects]
        (folder / f"img {number}.xml").write_text(voc_xml(f"{number}.jpg", corners), "utf-8")
        (folder / f"{number}.jpg").touch()
        expected += [(number, c, [x - 1, y - 1, w + 1, h + 1], d) for c, (x, y, w, h), d in objects]
    files = tuple(sorted(folder.glob("*.xml")))
    table = VocSplit(folder, files, folder, (folder,)).read()
    assert table.image_ids == [f"img {n}" for n in range(len(images))]
    assert table.file_names == [f"{n}.jpg" for n in range(len(images))]
    assert table.image_files == [str(folder / f"{n}.jpg") for n in range(len(images))]
    assert table.image_hw.tolist() == [[HEIGHT, WIDTH]] * len(images)
    assert table.class_names == tuple(sorted({c for _, c, _, _ in expected}))
    assert table.category_ids == tuple(range(1, len(table.class_names) + 1))
    names = [table.class_names[label] for label in table.box_class]
    columns = (table.box_image.tolist(), names, table.boxes_xywh.tolist(), table.difficult.tolist())
    assert list(zip(*columns, strict=True)) == expected
    if not expected:
        return
    table.write(folder / "copy.json")
    again = read_coco_table(folder / "copy.json", (folder,))
    assert again.evaluator_type == "pascal_voc" and again.repairs == ()
    for column in ("image_ids", "file_names", "class_names", "category_ids", "image_files"):
        assert getattr(again, column) == getattr(table, column)
    for column in ("image_hw", "box_image", "box_class", "boxes_xywh", "areas", "difficult"):
        assert (getattr(again, column) == getattr(table, column)).all()


@pytest.mark.parametrize(
    ("images", "xmls"),
    [
        ("images", "annotations"),
        ("JPEGImages", "Annotations"),
        (".", "."),
        ("pictures", "pictures/xml"),
        ("images", "labels"),
        ("data", "labels"),
        ("set/JPEGImages", "set/Annotations"),
    ],
)
def test_voc_of_a_single_split(tmp_path, images, xmls):
    folder = tmp_path / "d"
    write_voc(folder, images, xmls, [f"{n:03d}" for n in range(10)])
    with pytest.raises(DatasetError, match=r"single split \(Pascal VOC\)\n.*--val-fraction 0\.2"):
        register_dataset(folder, output_dir=tmp_path)
    made = register_dataset(folder, output_dir=tmp_path, val_fraction=0.2)
    assert counts(made) == [(8, 16), (2, 4)]
    assert MetadataCatalog.get(made.val).evaluator_type == "pascal_voc"


@pytest.mark.parametrize("nested", ["VOCdevkit/VOC2012", "VOC2012", "."])
@pytest.mark.parametrize(
    ("lists", "expected"),
    [
        ({"train": "a b", "val": "c", "test": "d"}, ["a", "b", "/", "c"]),
        ({"trainval": "a b", "test": "c d"}, ["a", "b", "/", "c", "d"]),
        ({"trainval": "a b c", "val": "c"}, ["a", "b", "/", "c"]),
        ({"train": "a.png b.xml", "val": "c 1"}, ["a", "b", "/", "c"]),
        ({"train": "a b", "val": "c", "cat_train": "a 1 b -1"}, ["a", "b", "/", "c"]),
    ],
)
def test_voc_lists(tmp_path, nested, lists, expected):
    folder = tmp_path / "d"
    write_voc(folder / nested, "JPEGImages", "Annotations", "abcd")
    sets = folder / nested / "ImageSets" / "Main"
    sets.mkdir(parents=True)
    for name, words in lists.items():
        text = words if "1" in words else words.replace(" ", "\n")
        (sets / f"{name}.txt").write_text(text + "\n")
    made = register_dataset(folder, output_dir=tmp_path)
    ids = [[x["image_id"] for x in DatasetCatalog.get(name)] for name in (made.train, made.val)]
    assert [*ids[0], "/", *ids[1]] == expected


def test_voc_folders_of_splits(tmp_path):
    """Roboflow's layout, and one with images and annotations below each split."""
    folder = tmp_path / "d"
    write_voc(folder, "train", "train", "abc")
    write_voc(folder, "valid", "valid", "de")
    assert counts(register_dataset(folder, output_dir=tmp_path)) == [(3, 6), (2, 4)]
    folder = tmp_path / "e"
    write_voc(folder, "images/train", "annotations/train", "abc")
    write_voc(folder, "images/val", "annotations/val", "abc", offset=1)
    made = register_dataset(folder, output_dir=tmp_path)
    assert counts(made) == [(3, 6), (3, 6)]
    for name, split in ((made.train, "train"), (made.val, "val")):
        files = {Path(x["file_name"]).parent for x in DatasetCatalog.get(name)}
        assert files == {folder / "images" / split}


def test_voc_classes_are_those_of_both_splits(tmp_path):
    folder = tmp_path / "d"
    boxes = ((1, 1, 50, 50), False)
    for split, name, labels in (
        ("train", "a", "dog cat"),
        ("train", "b", "dog"),
        ("val", "c", "Dog bird"),
    ):
        write_image(folder / split / f"{name}.png")
        xml = voc_xml(f"{name}.png", [(label, *boxes) for label in labels.split()])
        (folder / split / f"{name}.xml").write_text(xml)
    made = register_dataset(folder, output_dir=tmp_path)
    assert made.class_names == ("bird", "cat", "dog")
    labels = [
        [x["category_id"] for entry in DatasetCatalog.get(name) for x in entry["annotations"]]
        for name in (made.train, made.val)
    ]
    assert labels == [[2, 1, 2], [2, 0]]
    notes = "\n".join(made.reports[1].warnings)
    assert "'Dog' is 'dog'" in notes
    assert "none in the training split, which cannot be learned: bird (1)" in notes
    results, _ = evaluate_perfect(made, tmp_path / "inference")
    assert results["voc"]["AP50"] == pytest.approx(100)
    assert math.isnan(results["voc"]["AP50-cat"])


def test_voc_difficult_objects(tmp_path):
    folder = tmp_path / "d"
    write_voc(folder, ".", ".", [f"{n}" for n in range(4)])
    made = register_dataset(folder, output_dir=tmp_path, evaluate_on_train=True)
    assert "1 difficult object(s) are trained on and, as in Pascal VOC, ignored" in (
        made.reports[0].table()
    )
    objects = [x for entry in DatasetCatalog.get(made.train) for x in entry["annotations"]]
    assert [x.get("difficult", 0) for x in objects] == [0, 0, 0, 1, 0, 0, 0, 0]
    assert not any(x["iscrowd"] for x in objects), "they are trained on"
    for difficult in (True, False):
        results, written = evaluate_perfect(made, tmp_path / "inference", difficult=difficult)
        assert len(written) == 7 + difficult
        for task, keys in (
            ("bbox", ("AP", "AP50", "AP-cat", "AP-dog")),
            ("voc", ("AP50", "AP50_11_points", "AP50-cat", "AP50-dog")),
        ):
            assert [results[task][key] for key in keys] == pytest.approx([100] * 4)
    assert {x["file_name"] for x in written} == {f"{n}.png" for n in range(4)}
    assert {x["image_id"] for x in written} == {f"{n}" for n in range(4)}


def test_voc_sizes_and_names_that_are_missing_or_wrong(tmp_path):
    folder = tmp_path / "d"
    objects = [("cat", (1, 1, 50, 50), False)]
    for name in "abcdef":
        write_image(folder / "images" / f"{name}.png")
    xmls = {
        "a": voc_xml("a.png", objects, size=(0, 0)),
        "b": voc_xml("IMG_0001.JPG", objects),
        "c": "<annotation verified='yes'></annotation>",
        "d": voc_xml("same.png", objects),
        "e": voc_xml("same.png", objects),
        "f": voc_xml("f.png", objects, path="<path>C:\\me\\f.png</path>"),
    }
    (folder / "annotations").mkdir()
    for name, text in xmls.items():
        (folder / "annotations" / f"{name}.xml").write_text(text)
    made = register_dataset(folder, output_dir=tmp_path, evaluate_on_train=True)
    entries = DatasetCatalog.get(made.train)
    assert [Path(x["file_name"]).name for x in entries] == [f"{name}.png" for name in "abcdef"]
    assert {(x["height"], x["width"]) for x in entries} == {(HEIGHT, WIDTH)}
    assert [len(x["annotations"]) for x in entries] == [1, 1, 0, 1, 1, 1]
    assert "image(s) are not where <filename> says" in made.reports[0].table()


def test_voc_corners_that_count_from_zero(tmp_path):
    write_image(tmp_path / "d" / "a.png")
    objects = [("cat", (0, 0, 50, 40), False), ("cat", (0.5, 1, WIDTH, 40.5), False)]
    (tmp_path / "d" / "a.xml").write_text(voc_xml("a.png", objects))
    made = register_dataset(tmp_path / "d", output_dir=tmp_path, evaluate_on_train=True)
    boxes = [x["bbox"] for x in DatasetCatalog.get(made.train)[0]["annotations"]]
    assert boxes == [[0, 0, 50, 40], [0, 0, WIDTH, 40.5]]


@pytest.mark.parametrize("encoding", ["gb2312", "utf-16", "latin-1", "utf-8-sig"])
def test_voc_encodings(tmp_path, encoding):
    write_image(tmp_path / "d" / "a.png")
    name = "b\u00e4r" if encoding == "latin-1" else "\u732b"
    text = f'<?xml version="1.0" encoding="{encoding.removesuffix("-sig")}"?>\n'
    text += voc_xml("a.png", [(name, (1, 1, 50, 40), False)])
    (tmp_path / "d" / "a.xml").write_text(text, encoding)
    made = register_dataset(tmp_path / "d", output_dir=tmp_path, evaluate_on_train=True)
    assert made.class_names == (name,)


def test_several_voc_data_sets_are_ambiguous(tmp_path):
    for year in ("VOC2007", "VOC2012"):
        root = tmp_path / "VOCdevkit" / year
        write_voc(root, "JPEGImages", "Annotations", "ab")
        (root / "ImageSets" / "Main").mkdir(parents=True)
        (root / "ImageSets" / "Main" / "train.txt").write_text("a\n")
    with pytest.raises(DatasetError, match="several Pascal VOC data sets lie here"):
        register_dataset(tmp_path / "VOCdevkit", output_dir=tmp_path)


# YOLO.

SHARES = st.integers(0, 64).map(lambda x: x / 64)


@settings(deadline=None, max_examples=30)
@given(
    st.lists(
        st.lists(
            st.tuples(st.sampled_from([0, 3, 11]), SHARES, SHARES, SHARES, SHARES), max_size=3
        ),
        min_size=1,
        max_size=3,
    ),
    st.booleans(),
)
def test_yolo_round_trip(tmp_path_factory, images, polygons):
    """Boxes with edges at 64ths of sizes that are powers of two are exact."""
    folder = tmp_path_factory.mktemp("yolo")
    width, height = 256, 128
    expected = []
    for number, objects in enumerate(images):
        write_image(folder / "images" / f"{number:04d}.png", (width, height))
        lines = []
        for label, a, b, c, d in objects:
            x1, x2, y1, y2 = min(a, b), max(a, b), min(c, d), max(c, d)
            if polygons:
                points = (x1, y1, x2, y1, (x1 + x2) / 2, y2, x1, y1)
                lines.append(f"{label} {' '.join(map(repr, points))}")
            else:
                cxcywh = (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1
                lines.append(f"{label}  {' '.join(map(repr, cxcywh))} ")
            box = [x1 * width, y1 * height, (x2 - x1) * width, (y2 - y1) * height]
            expected.append((number, label, box))
        if lines:
            (folder / "labels").mkdir(exist_ok=True)
            (folder / "labels" / f"{number:04d}.txt").write_text("\n".join(lines))
    names = {0: "cat", 3: "dog", 11: "b\u00e4r"}
    split = YoloSplit(folder / "data.yaml", (folder / "images",), names)
    if not expected:
        with pytest.raises(DatasetError, match="has a text file"):
            split.read()
        return
    table = split.read()
    assert table.category_ids == (0, 3, 11) and table.class_names == ("cat", "dog", "b\u00e4r")
    assert table.image_ids == [f"{n:04d}" for n in range(len(images))]
    assert table.file_names == [f"{n:04d}.png" for n in range(len(images))]
    assert table.image_hw.tolist() == [[height, width]] * len(images)
    labels = [table.category_ids[label] for label in table.box_class]
    columns = zip(table.box_image.tolist(), labels, table.boxes_xywh.tolist(), strict=True)
    assert list(columns) == expected


@pytest.mark.parametrize(
    ("images", "labels", "yaml"),
    [
        ("images/{}", "labels/{}", "path: .\ntrain: images/train\nval: images/valid\n"),
        ("images/{}", "labels/{}", "train: images/train\nval: [images/valid]\n"),
        ("{}/images", "{}/labels", "train: ../train/images\nval: ../valid/images\nnc: 2\n"),
        ("{}/images", "{}/labels", "train: train\nvalid: valid\n"),
        ("{}/images", "{}/labels", "path: /kaggle/input\ntrain: train/images\nval: valid/images\n"),
        ("{}/images", "{}/labels", "train: C:\\x\\train\\images\nval: C:\\x\\valid\\images\n"),
        ("{}", "{}", "train: train\nval: valid\n"),
        ("{}/images/deep", "{}/labels/deep", "train: train/images\nval: valid/images\n"),
        ("{}/images", "{}/labels", "train: train.txt\nval: lists/valid.txt\n"),
    ],
)
def test_yolo_layouts(tmp_path, images, labels, yaml):
    folder = tmp_path / "d"
    for split, names in (("train", "abc"), ("valid", "de")):
        write_yolo(folder, images.format(split), labels.format(split), names)
        lists = folder / ("train.txt" if split == "train" else "lists/valid.txt")
        lists.parent.mkdir(exist_ok=True)
        lists.write_text("".join(f"./{images.format(split)}/{x}.png\n" for x in names))
    (folder / "data.yaml").write_text(yaml + CAT_AND_DOG)
    for source in (folder, folder / "data.yaml"):
        made = register_dataset(source, output_dir=tmp_path)
        assert counts(made) == [(3, 6), (2, 4)]
        assert made.class_names == ("cat", "dog")
    results, written = evaluate_perfect(made, tmp_path / "inference")
    assert results["bbox"]["AP"] == pytest.approx(100)
    assert {x["image_id"] for x in written} == {"d", "e"}
    assert {x["category_id"] for x in written} == {0, 1}, "class numbers"
    assert {os.path.basename(x["file_name"]) for x in written} == {"d.png", "e.png"}


@pytest.mark.parametrize(
    ("files", "names_file"),
    [
        ("images/{}/ labels/{}/", "classes.txt"),
        ("images/{}/ labels/{}/", "labels/classes.txt"),
        ("{}/images/ {}/labels/", "obj.names"),
        ("{}/ {}/", "train/_darknet.labels"),
    ],
)
def test_yolo_without_a_description(tmp_path, files, names_file):
    folder = tmp_path / "d"
    images, labels = files.split()
    for split, names in (("train", "abc"), ("valid", "de")):
        write_yolo(folder, images.format(split), labels.format(split), names)
    (folder / names_file).write_text("cat\ndog\n\n")
    made = register_dataset(folder, output_dir=tmp_path)
    assert counts(made) == [(3, 6), (2, 4)]
    assert made.class_names == ("cat", "dog")


def test_yolo_of_a_single_split(tmp_path):
    """Label Studio's export."""
    folder = tmp_path / "d"
    write_yolo(folder, "images", "labels", [f"{n}" for n in range(5)])
    (folder / "classes.txt").write_text("cat\ndog\n")
    (folder / "notes.json").write_text('{"categories": [], "info": {}}')
    made = register_dataset(folder, output_dir=tmp_path, val_fraction=0.2)
    assert counts(made) == [(4, 8), (1, 2)]


def test_yolo_in_an_outer_folder(tmp_path):
    folder = tmp_path / "d" / "my signs"
    write_yolo(folder, "train/images", "train/labels", "abc")
    write_yolo(folder, "valid/images", "valid/labels", "de")
    (folder / "data.yaml").write_text("train: train/images\nval: valid/images\n" + CAT_AND_DOG)
    (tmp_path / "d" / "README.txt").write_text("Exported on a Monday")
    assert counts(register_dataset(tmp_path / "d", output_dir=tmp_path)) == [(3, 6), (2, 4)]


def test_yolo_splits_that_are_named_but_not_there(tmp_path):
    """Roboflow's data.yaml names three splits, whether they have images or not."""
    folder = tmp_path / "d"
    write_yolo(folder, "train/images", "train/labels", "abcde")
    paths = "train: ../train/images\nval: ../valid/images\ntest: ../test/images\n"
    (folder / "data.yaml").write_text(paths + CAT_AND_DOG)
    with pytest.raises(DatasetError, match=r"single split \(YOLO\); val: \.\./valid/images is not"):
        register_dataset(folder, output_dir=tmp_path)
    made = register_dataset(folder, output_dir=tmp_path, val_fraction=0.2)
    assert counts(made) == [(4, 8), (1, 2)]


def test_yolo_of_darknet(tmp_path):
    """CVAT's export."""
    folder = tmp_path / "d"
    write_yolo(folder, "obj_train_data", "obj_train_data", "abcd")
    (folder / "obj.names").write_text("cat\ndog\n")
    (folder / "obj.data").write_text(
        "classes = 2\ntrain = data/train.txt\nnames = data/obj.names\nbackup = backup/\n"
    )
    (folder / "train.txt").write_text("".join(f"data/obj_train_data/{x}.png\n" for x in "abcd"))
    made = register_dataset(folder, output_dir=tmp_path, val_fraction=0.25)
    assert counts(made) == [(3, 6), (1, 2)]


def test_yolo_names(tmp_path):
    for text, names in (
        ("names: [cat, dog]", {0: "cat", 1: "dog"}),
        ("names: {0: cat, 1: dog}", {0: "cat", 1: "dog"}),
        ("names:\n  0: cat\n  7: 'dog '", {0: "cat", 7: "dog"}),
        ("names: [no, 'on', 1, 007]", {0: "no", 1: "on", 2: "1", 3: "007"}),
        ("names: ['\u732b']", {0: "\u732b"}),
        ("names: cat, dog", {0: "cat", 1: "dog"}),
        ("nc: 2", {0: "class_0", 1: "class_1"}),
    ):
        (tmp_path / "data.yaml").write_text(f"train: .\n{text}\n", encoding="utf-8")
        assert read_data_yaml(tmp_path / "data.yaml")["train"].class_names == names


def test_yolo_keypoints_are_left_out(tmp_path):
    write_image(tmp_path / "images" / "a.png")
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "a.txt").write_text("0 0.5 0.5 0.25 0.25 0.1 0.1 2 0.2 0.2 1\n")
    text = "train: images\nkpt_shape: [2, 3]\nnames: [cat]\n"
    (tmp_path / "data.yaml").write_text(text)
    table = read_data_yaml(tmp_path / "data.yaml")["train"].read()
    assert table.boxes_xywh.tolist() == [[60, 48, 40, 32]]


def test_yolo_images_turned_by_exif(tmp_path):
    from PIL import Image

    (tmp_path / "labels").mkdir()
    (tmp_path / "images").mkdir()
    image = Image.new("RGB", (40, 20))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "images" / "a.jpg", exif=exif)
    (tmp_path / "labels" / "a.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    (tmp_path / "data.yaml").write_text("train: images\nnames: [cat]\n")
    table = read_data_yaml(tmp_path / "data.yaml")["train"].read()
    assert table.image_hw.tolist() == [[40, 20]]
    assert table.boxes_xywh.tolist() == [[5, 10, 10, 20]]


def test_yolo_files_that_are_not_there(tmp_path):
    folder = tmp_path / "d"
    write_yolo(folder, "images/train", "labels/train", "abcd")
    write_yolo(folder, "images/val", "labels/val", "ef")
    (folder / "images/train/b.png").unlink()
    (folder / "images/train/c.png").unlink()
    (folder / "images/train/c.png").symlink_to("gone.png")
    (folder / "labels/train/d.txt").unlink()
    (folder / "labels/train/classes.txt").write_text("cat\ndog\n")
    (folder / "data.yaml").write_text("train: images/train\nval: images/val\n" + CAT_AND_DOG)
    made = register_dataset(folder, output_dir=tmp_path)
    report = made.reports[0]
    assert (report.images, report.missing_files, report.boxes) == (3, 1, 2)
    table = report.table()
    assert "1 image(s) have no text file: images without objects" in table
    assert "1 text file(s) belong to no image and are left out" in table
    assert [x["image_id"] for x in DatasetCatalog.get(made.train)] == ["a", "d"]


def test_errors_of_many_files_come_together(tmp_path):
    folder = tmp_path / "d"
    write_yolo(folder, "images", "labels", "abc")
    for name in "ab":
        (folder / "labels" / f"{name}.txt").write_text("0 0.5 0.5 0.5 0.5\n7 0.5 0.5 0.1 0.1\n")
    (folder / "data.yaml").write_text("train: images\n" + CAT_AND_DOG)
    with pytest.raises(DatasetError) as error:
        register_dataset(folder, output_dir=tmp_path, val_fraction=0.5)
    for name in "ab":
        assert f"labels/{name}.txt:2: class 7, but data.yaml names 2 class(es): 0 to 1" in str(
            error.value
        )


# What is chosen where several formats lie together.


def test_the_complete_format_is_read(tmp_path):
    folder = tmp_path / "d"
    write_yolo(folder, "images/train", "labels/train", "abc")
    write_yolo(folder, "images/val", "labels/val", "de")
    (folder / "data.yaml").write_text("train: images/train\nval: images/val\n" + CAT_AND_DOG)
    place(folder, "val", "annotations/instances_val.json", "images/val", 2)
    assert find_dataset(folder).format == "YOLO", "COCO has no training split"
    place(folder, "train", "annotations/instances_train.json", "images/train", 4)
    found = find_dataset(folder)
    assert (found.format, found.notes) == ("COCO", ("COCO is read; YOLO is there too",))
    assert find_dataset(folder / "data.yaml").format == "YOLO"


@pytest.mark.parametrize(
    ("source", "values", "images", "boxes", "classes"),
    [
        ("voc_flat", {"val_fraction": 0.25}, (18, 6), 28, 1),
        ("VOCdevkit", {}, (12, 6), 44, 9),
        ("VOCdevkit/VOC2012", {}, (12, 6), 44, 9),
        ("yolo_images_labels", {}, (16, 8), 126, 80),
        ("yolo_roboflow", {}, (16, 8), 35, 21),
        ("yolo_roboflow/data.yaml", {}, (16, 8), 35, 21),
    ],
)
def test_real_data(shared_dir, tmp_path, source, values, images, boxes, classes):
    made = register_dataset(shared_dir / "data/formats" / source, output_dir=tmp_path, **values)
    assert tuple(report.images for report in made.reports) == images
    assert sum(report.boxes for report in made.reports) == boxes
    assert all(report.missing_files == report.invalid_boxes == 0 for report in made.reports)
    assert len(made.class_names) == classes
    results, _ = evaluate_perfect(made, tmp_path / "inference")
    assert results["bbox"]["AP"] == pytest.approx(100)


def test_real_voc_equals_its_coco_version(shared_dir, tmp_path):
    """The same photographs in COCO format and another size, converted by somebody else."""
    values = {"output_dir": tmp_path, "checks": DataChecks(decode_images=False)}
    made = register_dataset(shared_dir / "data/formats/VOCdevkit", **values)
    other = register_dataset(shared_dir / "data/voc2012_animals", **values)
    found = {}
    for registered in (made, other):
        for split in (registered.train, registered.val):
            for x in DatasetCatalog.get(split):
                size = np.array([x["width"], x["height"]] * 2)
                boxes = [
                    (registered.class_names[a["category_id"]], (np.array(a["bbox"]) / size))
                    for a in x["annotations"]
                ]
                boxes = sorted(boxes, key=lambda y: (y[0], *y[1].round(2)))
                found.setdefault(Path(x["file_name"]).stem, []).append(boxes)
    pairs = [x for x in found.values() if len(x) == 2]
    assert len(pairs) == 18
    for ours, theirs in pairs:
        assert [x[0] for x in ours] == [x[0] for x in theirs]
        for (_, a), (_, b) in zip(ours, theirs, strict=True):
            assert np.abs(a - b).max() < 0.01
