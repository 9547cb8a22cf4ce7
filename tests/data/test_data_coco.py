"""Data sets in COCO format: layouts, reports, corrections, and errors."""

import contextlib
import copy
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, BoxMode, Instances
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools.coco import COCO

from asag.data import (
    CocoSplit,
    DatasetError,
    find_coco_splits,
    register_coco_splits,
    register_dataset,
)
from asag.data.coco_json import read_coco_table
from asag.data.coco_report import inspect_table
from asag.evaluation.coco import evaluate_boxes

CATEGORIES = [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}]


def coco(first: int = 1, count: int = 3) -> dict:
    """A valid file: `count` images of 200x100; all but the last have a cat and a dog."""
    ids = range(first, first + count)
    annotations = []
    for i in ids[:-1]:
        for category, box in ((3, [10, 20, 30, 40]), (7, [0, 0, 100.5, 99])):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i,
                    "category_id": category,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                }
            )
    return {
        "info": {},
        "images": [{"id": i, "file_name": f"{i}.png", "height": 100, "width": 200} for i in ids],
        "annotations": annotations,
        "categories": copy.deepcopy(CATEGORIES),
    }


def write(path: Path, data: dict | str, images: Path | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    if images is not None and isinstance(data, dict):
        images.mkdir(parents=True, exist_ok=True)
        for image in data["images"]:
            Image.new("RGB", (200, 100)).save(images / image["file_name"])
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    """A healthy data set."""
    root = tmp_path / "pets"
    write(root / "annotations" / "train.json", coco(), root / "images")
    write(root / "annotations" / "val.json", coco(first=11), root / "images")
    return root


def register(folder: Path, **values):
    return register_dataset(folder, output_dir=folder.parent / "out", **values)


def inspect(folder: Path, data: dict):
    path = write(folder / "annotations" / "changed.json", data)
    return inspect_table(read_coco_table(path, (folder / "images",)), "changed")


# What a healthy folder becomes.


def test_registered_dicts_and_metadata(folder):
    made = register(folder)
    assert (made.train, made.val) == ("pets_train", "pets_val")
    assert made.class_names == ("cat", "dog")  # by category id
    samples = DatasetCatalog.get("pets_train")
    assert [s["image_id"] for s in samples] == [1, 2, 3]
    assert samples[0] == {
        "file_name": str(folder / "images" / "1.png"),
        "height": 100,
        "width": 200,
        "image_id": 1,
        "annotations": [
            {
                "bbox": [10.0, 20.0, 30.0, 40.0],
                "bbox_mode": BoxMode.XYWH_ABS,
                "category_id": 0,
                "iscrowd": 0,
            },
            {
                "bbox": [0.0, 0.0, 100.5, 99.0],
                "bbox_mode": BoxMode.XYWH_ABS,
                "category_id": 1,
                "iscrowd": 0,
            },
        ],
    }
    assert samples[2]["annotations"] == []
    metadata = MetadataCatalog.get("pets_val")
    assert metadata.thing_classes == ["cat", "dog"]
    assert metadata.thing_dataset_id_to_contiguous_id == {3: 0, 7: 1}
    assert metadata.json_file == str(folder / "annotations" / "val.json")
    assert metadata.image_root == str(folder / "images")
    assert metadata.evaluator_type == "coco"


def test_dicts_equal_detectron2s(folder):
    from detectron2.data.datasets.coco import load_coco_json

    data = coco(count=6)
    order = np.random.default_rng(0).permutation(len(data["annotations"]))
    data["annotations"] = [data["annotations"][i] for i in order]  # annotations in any order
    path = write(folder / "annotations" / "train.json", data, folder / "images")
    register(folder)
    expected = load_coco_json(str(path), str(folder / "images"), "pets_reference")
    for ours, theirs in zip(DatasetCatalog.get("pets_train"), expected, strict=True):
        assert ours == theirs


def test_report_counts(folder):
    data = coco()
    crowd = {"id": 50, "image_id": 2, "category_id": 3, "bbox": [0, 0, 9, 9], "iscrowd": 1}
    data["annotations"].append(crowd | {"area": 81})
    report, _ = inspect(folder, data)
    assert (report.images, report.empty_images, report.boxes, report.crowd_boxes) == (3, 1, 5, 1)
    assert report.boxes_per_class == ((0, 2, 0), (0, 0, 2))
    assert report.max_boxes_per_image == 3
    assert report.mean_boxes_per_image == pytest.approx(5 / 3)
    assert report.warnings == []
    table = report.table()
    assert "3 images (1 empty)" in table
    assert "note" not in table
    (cat_row,) = (line for line in table.splitlines() if line.split()[0] == "cat")
    assert cat_row.split() == ["cat", "0", "2", "0", "2"]


def test_registering_again_replaces_but_never_takes_a_foreign_name(folder):
    register(folder)
    write(folder / "annotations" / "train.json", coco(count=2))
    register(folder)
    assert len(DatasetCatalog.get("pets_train")) == 2
    with pytest.raises(DatasetError, match=r"coco_2017_train.*another"):
        register(folder, name="coco_2017")


@pytest.mark.parametrize(
    ("train_json", "train_images", "val_json", "val_images"),
    [
        ("annotations/train.json", "images", "annotations/val.json", "images"),
        ("annotations/train.json", "images/train", "annotations/val.json", "images/val"),
        ("annotations/train.json", "train", "annotations/val.json", "val"),
        (
            "annotations/instances_train2017.json",
            "train2017",
            "annotations/instances_val2017.json",
            "val2017",
        ),
        (
            "annotations/instances_train2017.json",
            "images/train2017",
            "annotations/instances_val2017.json",
            "images/val2017",
        ),
        ("train/_annotations.coco.json", "train", "valid/_annotations.coco.json", "valid"),
        ("train/_annotations.coco.json", "train", "val/_annotations.coco.json", "val"),
        ("train.json", "images", "val.json", "images"),
        ("train.json", ".", "val.json", "."),
    ],
)
def test_layouts(tmp_path, train_json, train_images, val_json, val_images):
    root = tmp_path / "data-set 1"
    write(root / train_json, coco(), root / train_images)
    write(root / val_json, coco(first=11), root / val_images)
    # Annotations beside images are found even if an empty folder has a likelier name.
    (root / "images").mkdir(exist_ok=True)
    made = register(root)
    assert made.train == "data_set_1_train"
    for name, images in ((made.train, train_images), (made.val, val_images)):
        samples = DatasetCatalog.get(name)
        assert all(Path(s["file_name"]).is_file() for s in samples)
        assert Path(samples[0]["file_name"]).parent == (root / images)


def test_explicit_files(folder):
    split = CocoSplit(folder / "annotations" / "train.json", (folder / "images",))
    made = register_coco_splits("explicit", train=split, val=None, output_dir=folder)
    assert made.train == made.val == "explicit_train"
    assert "explicit_val" not in DatasetCatalog


def test_missing_val_says_what_to_do(folder):
    (folder / "annotations" / "val.json").unlink()
    with pytest.raises(DatasetError, match=r"--val-fraction 0\.2 .*--evaluate-on-train"):
        register(folder)
    made = register(folder, evaluate_on_train=True)
    assert made.val == made.train


def test_unknown_layouts(tmp_path, folder):
    with pytest.raises(DatasetError, match="no such folder"):
        find_coco_splits(tmp_path / "absent")
    (tmp_path / "bare").mkdir()
    with pytest.raises(DatasetError, match="this is an empty folder"):
        register(tmp_path / "bare")
    for year in (2014, 2017):
        write(tmp_path / "two" / "annotations" / f"instances_train{year}.json", coco())
    with pytest.raises(DatasetError, match=r"train2014\.json, annotations/instances_train"):
        find_coco_splits(tmp_path / "two")


# What stops the run: one exact error, naming file, entry and remedy.


def drop(section: str, row: int, key: str):
    return lambda data: data[section][row].pop(key)


def put(section: str, row: int, **values):
    return lambda data: data[section][row].update(values)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda data: data.pop("annotations"), "key 'annotations' is missing"),
        (lambda data: data.update(images={}), "key 'images' is not a list"),
        (lambda data: data.update(images=[]), "'images' is empty"),
        (lambda data: data.update(categories=[]), "'categories' is empty"),
        (lambda data: data["images"].append(3), r"images\[3\] is not an object"),
        (lambda data: data.update(annotations=[]), "no usable box among 0"),
        (drop("images", 1, "file_name"), r"images\[1\] \(id 2\): 'file_name' is missing"),
        (drop("images", 1, "id"), r"images\[1\]: 'id' is missing"),
        (put("images", 0, id=2), "image id 2 is used more than once"),
        (put("images", 0, width=-4), r"images\[0\] \(id 1\): height = 100, width = -4"),
        (put("images", 0, width="wide"), "width = 'wide'"),
        (drop("annotations", 2, "bbox"), r"annotations\[2\] \(id 3\): 'bbox' is missing"),
        (put("annotations", 2, bbox=[1, 2, 3]), r"annotations\[2\] \(id 3\): 'bbox' = \[1, 2, 3\]"),
        (put("annotations", 2, bbox=[1, 2, None, 3]), r"'bbox' = \[1, 2, None, 3\]"),
        (put("annotations", 2, bbox=["1", "2", "3", "4"]), r"'bbox' = \['1'"),
        (drop("annotations", 0, "image_id"), "'image_id' is missing"),
        (drop("annotations", 0, "category_id"), "'category_id' is missing"),
        (put("annotations", 0, category_id=9), r"1 annotation\(s\) use category id 9.*\[3, 7\]"),
        (put("annotations", 0, category_id=[3]), r"'category_id' = \[3\]"),
        (put("categories", 0, id=3), "category id 3 is used more than once"),
        (put("categories", 0, name="cat"), r"'cat' stands for ids \[3, 7\]"),
        (drop("categories", 0, "name"), r"categories\[0\] \(id 7\): 'name' is missing"),
    ],
)
def test_broken_files(folder, break_it, message):
    data = coco()
    break_it(data)
    path = write(folder / "annotations" / "train.json", data)
    with pytest.raises(DatasetError, match=f"(?s){message}") as error:
        register(folder)
    assert str(path) in str(error.value)
    assert "-> " in str(error.value)
    assert all(issue.remedy for issue in error.value.issues)


def test_unreadable_json_has_line_and_column(folder):
    write(folder / "annotations" / "train.json", '{\n "images": [1,\n}')
    with pytest.raises(DatasetError, match=r"train\.json: not valid JSON at line 3, column 1"):
        register(folder)
    (folder / "annotations" / "train.json").write_bytes(b'{"a": "\xff\xfe\xff"}')
    with pytest.raises(DatasetError, match="UTF-8"):
        register(folder)
    write(folder / "annotations" / "train.json", "[]")
    with pytest.raises(DatasetError, match="holds a list"):
        register(folder)


def test_all_complaints_come_at_once_and_long_lists_are_cut(folder):
    data = coco(count=40)
    for annotation in data["annotations"]:
        annotation["bbox"] = None
    data["images"][0]["id"] = 2
    write(folder / "annotations" / "train.json", data)
    write(folder / "annotations" / "val.json", "{")
    with pytest.raises(DatasetError) as error:
        register(folder)
    text = str(error.value)
    assert "image id 2" in text
    assert "annotations[4]" in text
    assert "annotations[5]" not in text
    assert "73 more entries" in text
    assert "val.json: not valid JSON" in text


def test_missing_images(folder):
    for name in ("1.png", "2.png"):
        (folder / "images" / name).unlink()
    with pytest.raises(DatasetError, match=r"2 of 3 image files are not in .*first: 1\.png"):
        register(folder)


def test_classes_must_agree(folder):
    data = coco(first=11)
    data["categories"] = [{"id": 3, "name": "cat"}, {"id": 7, "name": "dogs"}]
    write(folder / "annotations" / "val.json", data)
    with pytest.raises(DatasetError, match=r"lacks \['dog'\] and adds \['dogs'\]") as error:
        register(folder)
    assert "2 box(es) of 'dogs' could never be found" in str(error.value)
    assert "'dogs' resembles 'dog'" in str(error.value)


ODD_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.integers(-5, 5) | st.floats() | st.none(), max_size=5),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
)
PLACES = [
    (section, key)
    for section, keys in {
        "images": ("id", "file_name", "height", "width"),
        "annotations": ("id", "image_id", "category_id", "bbox", "area", "iscrowd"),
        "categories": ("id", "name"),
    }.items()
    for key in keys
]


IDS = st.one_of(
    st.integers(-5, 5),
    st.integers(2**31, 2**31 + 3),
    st.integers(2**53, 2**53 + 3),
    st.integers(2**63 - 2, 2**64 + 2),
    st.sampled_from(["1", "01", "a", "a b", "\u00e9", "\u5f69", "x/1.png", "", "1.0", "-3"]),
)


def with_ids(data: dict, image_ids: list, category_ids: list) -> None:
    """Renames all ids of a file."""
    images = dict(zip((x["id"] for x in data["images"]), image_ids, strict=True))
    categories = dict(zip((x["id"] for x in data["categories"]), category_ids, strict=True))
    for image in data["images"]:
        image["id"] = images[image["id"]]
    for category in data["categories"]:
        category["id"] = categories[category["id"]]
    for annotation in data["annotations"]:
        annotation["image_id"] = images[annotation["image_id"]]
        annotation["category_id"] = categories[annotation["category_id"]]


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.tuples(st.sampled_from(PLACES), st.integers(0, 1), ODD_VALUES), max_size=3),
    st.lists(IDS, min_size=3, max_size=3, unique=True),
    st.lists(IDS, min_size=2, max_size=2, unique=True),
)
def test_any_value_anywhere_can_be_evaluated_or_is_an_error(
    tmp_path_factory, changes, image_ids, category_ids
):
    data = coco()
    with_ids(data, image_ids, category_ids)
    for (section, key), row, value in changes:
        data[section][row][key] = value
    root = tmp_path_factory.getbasetemp() / "fuzz"
    if not root.exists():
        write(root / "train.json", coco(), root / "images")
    path = write(root / "train.json", data)
    try:
        report, usable = inspect_table(read_coco_table(path, (root / "images",)), "fuzz")
    except DatasetError as error:
        assert error.issues
        return
    assert isinstance(report.table(), str)
    usable.write(root / "clean.json")
    again = read_coco_table(root / "clean.json", (root / "images",))
    assert again.repairs == ()
    assert np.isfinite(again.boxes_xywh).all()
    assert np.isfinite(again.areas).all()
    assert (again.boxes_xywh[:, 2:] > 0).all()
    assert (again.image_hw > 0).all()
    assert score_of_perfect_detections(usable) == 1


def score_of_perfect_detections(table) -> float:
    """COCO's AP, 0 to 1, of detections equal to the objects of a table that has been written."""
    with contextlib.redirect_stdout(io.StringIO()):
        ground_truth = COCO(str(table.source.with_name("clean.json")))
    results = [
        {
            "image_id": table.image_ids[row],
            "category_id": table.category_ids[label],
            "bbox": box,
            "score": 0.5,
        }
        for row, label, box, crowd in zip(
            table.box_image.tolist(),
            table.box_class.tolist(),
            table.boxes_xywh.tolist(),
            table.iscrowd.tolist(),
            strict=True,
        )
        if not crowd
    ]
    return evaluate_boxes(ground_truth, results).stats[0]


# Corrections, counts and notes.


def test_odd_boxes_are_counted(folder):
    data = coco()
    odd = [
        [5, 5, 0, 10],
        [5, 5, 10, -1],
        [float("nan"), 5, 10, 10],
        [5, 5, float("inf"), 10],
        [5, 5, 1, 20],
        [190, 90, 30, 30],
        [-5, 5, 10, 10],
        [300, 5, 10, 10],
        [199.5, 99.5, 1.2, 1.2],
    ]
    for i, box in enumerate(odd):
        entry = {"id": 100 + i, "image_id": 3, "category_id": 3, "bbox": box, "iscrowd": 0}
        data["annotations"].append(entry | {"area": 1})
    entry = {"id": 200, "image_id": 99, "category_id": 3, "bbox": [0, 0, 9, 9]}
    data["annotations"].append(entry | {"area": 81, "iscrowd": 0})
    report, usable = inspect(folder, data)
    assert report.invalid_boxes == 4
    assert report.thin_boxes == 5
    assert report.boxes_beyond_image == 2
    assert report.boxes_outside_image == 1
    assert report.boxes_without_image == 1
    assert report.empty_images == 0
    kept = usable.boxes_xywh.tolist()
    assert len(kept) == 4 + 5
    assert all(box not in kept for box in odd[:4])
    text = report.table()
    for sentence in (
        "4 box(es) without a positive",
        "1 annotation(s) of images not in the file",
        "1 box(es) lie outside",
        "2 box(es) reach beyond",
        "1 box(es) are at most 1 pixel",
        "cleaned copy: 5 unusable annotations",
    ):
        assert sentence in text


def test_a_few_missing_images_are_dropped(folder):
    data = coco(count=5)
    write(folder / "annotations" / "train.json", data, folder / "images")
    (folder / "images" / "2.png").unlink()
    made = register(folder)
    assert made.reports[0].missing_files == 1
    samples = DatasetCatalog.get("pets_train")
    assert [s["image_id"] for s in samples] == [1, 3, 4, 5]
    assert [len(s["annotations"]) for s in samples] == [2, 2, 2, 0]
    assert json.loads(Path(MetadataCatalog.get("pets_train").json_file).read_text())["images"] == [
        image for image in data["images"] if image["id"] != 2
    ]


def test_sizes_are_read_from_the_images(folder):
    data = coco()
    for image in data["images"]:
        del image["height"], image["width"]
    write(folder / "annotations" / "train.json", data)
    register(folder)
    assert {(s["height"], s["width"]) for s in DatasetCatalog.get("pets_train")} == {(100, 200)}
    (folder / "images" / "2.png").write_text("no picture")
    with pytest.raises(DatasetError, match=r"2\.png: cannot read image"):
        register(folder)


def test_empty_parent_category_with_a_used_name_is_left_out(folder):
    for split, first in (("train", 1), ("val", 11)):
        data = coco(first=first)
        data["categories"].append({"id": 0, "name": "cat"})
        write(folder / "annotations" / f"{split}.json", data)
    made = register(folder)
    assert made.class_names == ("cat", "dog")
    assert "ids [0]" in made.reports[0].table()


def test_unused_class_is_told(folder):
    data = coco()
    data["categories"].append({"id": 0, "name": "animals"})
    assert "no boxes of class animals" in inspect(folder, data)[0].table()


def perfect_ap(name: str, output_dir: Path) -> dict:
    """COCOEvaluator's results for predictions equal to the registered ground truth."""
    evaluator = COCOEvaluator(name, ("bbox",), False, output_dir=str(output_dir))
    evaluator.reset()
    for sample in DatasetCatalog.get(name):
        annotations = [a for a in sample["annotations"] if not a["iscrowd"]]
        boxes = torch.tensor([a["bbox"] for a in annotations]).reshape(-1, 4)
        instances = Instances((sample["height"], sample["width"]))
        instances.pred_boxes = Boxes(torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1))
        labels = [a["category_id"] for a in annotations]
        instances.pred_classes = torch.tensor(labels, dtype=torch.int64)
        instances.scores = torch.ones(len(labels))
        evaluator.process([sample], [{"instances": instances}])
    return evaluator.evaluate()["bbox"]


def without_extras(data: dict) -> None:
    del data["info"]
    for annotation in data["annotations"]:
        del annotation["area"], annotation["iscrowd"], annotation["id"]


def ids_from_zero(data: dict) -> None:
    for i, annotation in enumerate(data["annotations"]):
        annotation["id"] = i


def one_id_for_all(data: dict) -> None:
    for annotation in data["annotations"]:
        annotation["id"] = 5


def other_category_order(data: dict) -> None:
    """The same names under other ids: dog comes first."""
    new_id = {3: 20, 7: 10}
    for category in data["categories"]:
        category["id"] = new_id[category["id"]]
    for annotation in data["annotations"]:
        annotation["category_id"] = new_id[annotation["category_id"]]


@pytest.mark.parametrize(
    "change",
    [lambda data: None, without_extras, ids_from_zero, one_id_for_all, other_category_order],
)
def test_evaluation_of_mended_files_scores_100(folder, tmp_path, change):
    data = coco(first=11)
    data["annotations"] = data["annotations"][:3]  # one dog, two cats
    change(data)
    path = write(folder / "annotations" / "val.json", data)
    before = path.read_bytes()
    made = register(folder)
    results = perfect_ap(made.val, tmp_path / "eval")
    for metric in ("AP", "AP-cat", "AP-dog"):
        assert results[metric] == pytest.approx(100.0)
    assert path.read_bytes() == before
    id_maps = [
        MetadataCatalog.get(name).thing_dataset_id_to_contiguous_id
        for name in (made.train, made.val)
    ]
    assert id_maps == [{3: 0, 7: 1}] * 2
    repaired = MetadataCatalog.get(made.val).json_file != str(path)
    assert repaired == bool(made.reports[1].repairs)
    labels = [a["category_id"] for s in DatasetCatalog.get(made.val) for a in s["annotations"]]
    assert labels == [0, 1, 0]


# Real photographs with degenerate boxes.


def test_bccd(shared_dir, tmp_path):
    made = register_dataset(shared_dir / "data" / "bccd", output_dir=tmp_path)
    assert made.class_names == ("RBC", "WBC", "Platelets")
    train, val = made.reports
    assert (train.images, train.boxes, val.images, val.boxes) == (205, 2805, 87, 1138)
    assert (train.invalid_boxes, val.invalid_boxes) == (0, 0)
    assert (train.thin_boxes, val.thin_boxes) == (1, 1)
    assert train.missing_files == 0
    assert sum(map(sum, train.boxes_per_class)) == 2805
    assert len(DatasetCatalog.get(made.train)) == 205
    assert perfect_ap(made.val, tmp_path / "eval")["AP"] == pytest.approx(100.0)
