"""Dividing a single split: reproducible, by class, copies of an image together."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from data_support import coco_split, evaluate_perfect, write_image, write_roboflow
from detectron2.data import DatasetCatalog
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data_columns import table

from asag.data import CocoSplit, DatasetError, register_coco_splits, register_dataset
from asag.data.division import divide_table, source_groups


def labeled(classes: list[list[int]], names=None):
    """A table with these classes in each image."""
    image = [row for row, labels in enumerate(classes) for _ in labels]
    result = table([[1, 1, 20, 20]] * len(image), image)
    count = len(classes)
    names = names or [f"{n:04d}.png" for n in range(count)]
    return replace(
        result,
        class_names=("a", "b", "c"),
        category_ids=(1, 2, 3),
        image_ids=list(range(count)),
        file_names=names,
        image_files=names,
        image_hw=np.full((count, 2), 100),
        box_image=np.array(image, dtype=np.int64),
        box_class=np.array([label for labels in classes for label in labels], dtype=np.int64),
    )


CLASSES = st.lists(st.lists(st.integers(0, 2), max_size=3), min_size=2, max_size=60)


@settings(deadline=None, max_examples=40)
@given(CLASSES, st.floats(0.05, 0.95), st.integers(0, 5))
def test_images_and_boxes_are_shared_out(classes, fraction, seed):
    whole = labeled(classes)
    train, val = divide_table(whole, fraction, seed=seed)
    assert sorted(train.image_ids + val.image_ids) == whole.image_ids
    assert train.image_ids and val.image_ids
    for part in (train, val):
        for row, image_id in enumerate(part.image_ids):
            assert part.box_class[part.box_image == row].tolist() == classes[image_id]
    again = divide_table(whole, fraction, seed=seed)
    assert [x.image_ids for x in again] == [train.image_ids, val.image_ids]
    # Iterative stratification keeps close to the share: of all images, and of each class.
    assert abs(len(val.image_ids) - fraction * len(classes)) <= 4
    for label in range(3):
        having = [i for i, labels in enumerate(classes) if label in labels]
        kept = len(set(having) & set(val.image_ids))
        assert abs(kept - fraction * len(having)) <= 4


def test_the_order_of_the_images_does_not_matter():
    rng = np.random.default_rng(0)
    classes = [rng.integers(0, 3, size=rng.integers(0, 3)).tolist() for _ in range(40)]
    names = [f"{n:03d}.png" for n in range(40)]
    order = rng.permutation(40)
    first = divide_table(labeled(classes, names), 0.25)[1]
    second = divide_table(labeled([classes[i] for i in order], [names[i] for i in order]), 0.25)[1]
    assert sorted(first.file_names) == sorted(second.file_names)
    assert sorted(divide_table(labeled(classes, names), 0.25, seed=1)[1].file_names) != sorted(
        first.file_names
    )


def test_rare_classes_are_on_both_sides():
    classes = [[0]] * 90 + [[0, 1]] * 5 + [[0, 2]] * 5
    for seed in range(5):
        train, val = divide_table(labeled(classes), 0.2, seed=seed)
        counts = np.bincount(val.box_class, minlength=3).tolist()
        assert counts == [20, 1, 1]
        assert np.bincount(train.box_class, minlength=3).tolist() == [80, 4, 4]


def test_augmented_copies_stay_together():
    names = [
        f"{stem}_jpg.rf.{hash_:032x}.jpg"
        for stem in range(20)
        for hash_ in range(3 * stem, 3 * stem + 3)
    ]
    train, val = divide_table(labeled([[n % 3] for n in range(60)], names), 0.25)
    sources = [{name.split("_jpg.rf.")[0] for name in part.file_names} for part in (train, val)]
    assert not sources[0] & sources[1]
    assert (len(train.file_names), len(val.file_names)) == (45, 15)
    assert "augmented copies stay together: 60 images of 20 sources" in val.notes


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("cat_jpg.rf.de93a93205682e9b86b0bd05bd591818.jpg", "cat_jpg.rf"),
        ("train/cat_jpg.rf.0000aaaa.png", "cat_jpg.rf"),
        ("a\\cat_jpg.rf.0000aaaa.png", "cat_jpg.rf"),
        ("my.rf.cat_jpeg.rf.xYz012345.webp", "my.rf.cat_jpeg.rf"),
        ("cat.jpg", "cat.jpg"),
        ("cat.rf.jpg", "cat.rf.jpg"),
        ("a/cat.jpg", "a/cat.jpg"),
    ],
)
def test_names_of_sources(name, group):
    assert source_groups([name]) == [group]


def test_what_cannot_be_divided():
    for fraction in (0, 1, -0.2, 20, float("nan")):
        with pytest.raises(ValueError, match="it must lie between 0 and 1"):
            divide_table(labeled([[0], [1]]), fraction)
    with pytest.raises(DatasetError, match="1 image cannot be divided"):
        divide_table(labeled([[0]]), 0.2)
    copies = [f"a_jpg.rf.{n:08x}.jpg" for n in range(3)]
    with pytest.raises(DatasetError, match="1 source image with 3 copies cannot be divided"):
        divide_table(labeled([[0], [0], [0]], copies), 0.2)
    train, val = divide_table(labeled([[0], [0]]), 0.01)
    assert (len(train.image_ids), len(val.image_ids)) == (1, 1)


def test_a_divided_data_set_is_evaluated(tmp_path):
    folder = write_roboflow(tmp_path / "d", train=10)
    files = CocoSplit(folder / "train" / "_annotations.coco.json", (folder / "train",))
    made = register_coco_splits(
        "divided", train=files, val=None, output_dir=tmp_path, val_fraction=0.3
    )
    assert (made.train, made.val) == ("divided_train", "divided_val")
    assert [report.images for report in made.reports] == [7, 3]
    results, written = evaluate_perfect(made, tmp_path / "inference")
    assert results["bbox"]["AP"] == pytest.approx(100)
    ids = [{x["image_id"] for x in DatasetCatalog.get(name)} for name in (made.train, made.val)]
    assert ids[0] | ids[1] == set(range(1, 11)) and not ids[0] & ids[1]
    assert {x["image_id"] for x in written} == ids[1], "the user's ids"
    assert "3 of 10 images, kept for evaluation (val_fraction 0.3, seed 0)" in (
        made.reports[1].table()
    )


def test_a_data_set_with_an_evaluation_split_is_not_divided(tmp_path):
    folder = write_roboflow(tmp_path / "d")
    with pytest.raises(DatasetError, match=r"it has an evaluation split already: .*valid"):
        register_dataset(folder, output_dir=tmp_path, val_fraction=0.2)
    with pytest.raises(ValueError, match="either --val-fraction or --evaluate-on-train"):
        register_dataset(folder, output_dir=tmp_path, val_fraction=0.2, evaluate_on_train=True)


def test_same_files_same_division_in_any_format(tmp_path):
    """COCO and YOLO files of the same images give the same evaluation images."""
    folder = write_roboflow(tmp_path / "d", train=10)
    made = register_dataset(
        folder / "train" / "_annotations.coco.json", output_dir=tmp_path, val_fraction=0.4
    )
    data = coco_split("train", 10)
    yolo = tmp_path / "yolo"
    for image in data["images"]:
        write_image(yolo / "images" / image["file_name"])
        lines = [
            f"{a['category_id'] - 1} {(x + w / 2) / 160} {(y + h / 2) / 128} {w / 160} {h / 128}\n"
            for a in data["annotations"]
            if a["image_id"] == image["id"]
            for x, y, w, h in [a["bbox"]]
        ]
        (yolo / "labels").mkdir(exist_ok=True)
        (yolo / "labels" / f"{Path(image['file_name']).stem}.txt").write_text("".join(lines))
    (yolo / "data.yaml").write_text("train: images\nnames: [cat, dog]\n")
    other = register_dataset(yolo, output_dir=tmp_path, val_fraction=0.4)
    names = [[Path(x["file_name"]).name for x in DatasetCatalog.get(x.val)] for x in (made, other)]
    assert names[0] == names[1] and len(names[0]) == 4
