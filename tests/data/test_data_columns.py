"""Whole columns of boxes, areas and marks: plausible ones pass, mistaken ones are named."""

import json
from pathlib import Path

import numpy as np
import pytest
from data_support import HEIGHT, WIDTH, evaluate_perfect, write_roboflow
from detectron2.data import DatasetCatalog, MetadataCatalog
from hypothesis import given, settings
from hypothesis import strategies as st

from asag.data import DataChecks, DatasetError, register_dataset
from asag.data.coco_table import CocoTable
from asag.data.columns import check_boxes, corrected_columns


def table(boxes_xywh, image=None, sizes_wh=None, areas=None) -> CocoTable:
    """A table of one class; by default every box is in an image of its own."""
    boxes = np.array(boxes_xywh, dtype=np.float64).reshape(-1, 4)
    image = np.arange(len(boxes)) if image is None else np.array(image)
    count = int(image.max(initial=-1)) + 1
    sizes = np.tile([[WIDTH, HEIGHT]], (count, 1)) if sizes_wh is None else np.array(sizes_wh)
    names = [f"{n}.png" for n in range(count)]
    return CocoTable(
        source=Path("x.json"),
        image_root=Path(),
        class_names=("cat",),
        category_ids=(1,),
        image_ids=list(range(count)),
        file_names=names,
        image_files=names,
        image_hw=sizes[:, ::-1],
        box_image=image,
        box_class=np.zeros(len(boxes), dtype=np.int64),
        boxes_xywh=boxes,
        areas=boxes[:, 2] * boxes[:, 3] if areas is None else np.array(areas, dtype=np.float64),
        iscrowd=np.zeros(len(boxes), dtype=bool),
        difficult=np.zeros(len(boxes), dtype=bool),
        annotation_ids=np.arange(1, len(boxes) + 1),
        repairs=(),
    )


def plausible(seed: int, count: int, largest: float) -> tuple[np.ndarray, np.ndarray]:
    """Boxes anywhere in images of many sizes, (A, 4) and (A, 2)."""
    rng = np.random.default_rng(seed)
    wh = rng.integers(50, 3000, size=(count, 2)).astype(float)
    sides = np.maximum(1.5, rng.uniform(0.01, largest, size=(count, 2)) * wh)
    corner = rng.uniform(size=(count, 2)) * (wh - sides)
    return np.hstack([corner, sides]), wh


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 60), st.sampled_from([0.05, 0.3, 0.95]), st.booleans())
def test_plausible_boxes_pass(seed, count, largest, one_image):
    boxes, wh = plausible(seed, count, largest)
    image = np.zeros(count, dtype=np.int64) if one_image else np.arange(count)
    if one_image:
        boxes, wh = boxes / wh[:, [0, 1, 0, 1]] * [640, 480, 640, 480], np.array([[640, 480]])
    given_table = table(boxes, image, wh)
    check_boxes(given_table)
    assert corrected_columns(given_table).repairs == ()


READINGS = {
    "corners [x1, y1, x2, y2]": lambda x, y, w, h, W, H: (x, y, x + w, y + h),
    "corners with y first [y1, x1, y2, x2]": lambda x, y, w, h, W, H: (y, x, y + h, x + w),
    "[center x, center y, width, height]": lambda x, y, w, h, W, H: (x + w / 2, y + h / 2, w, h),
    "fractions of the image size, [x, y, width, height]": lambda x, y, w, h, W, H: (
        x / W,
        y / H,
        w / W,
        h / H,
    ),
    "fractions of the image size, corners [x1, y1, x2, y2]": lambda x, y, w, h, W, H: (
        x / W,
        y / H,
        (x + w) / W,
        (y + h) / H,
    ),
    "fractions of the image size, [center x, center y, width, height]": (
        lambda x, y, w, h, W, H: ((x + w / 2) / W, (y + h / 2) / H, w / W, h / H)
    ),
}


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 10**6))
@pytest.mark.parametrize("reading", READINGS)
def test_other_meanings_are_named(reading, seed):
    boxes, wh = plausible(seed, 40, 0.6)
    written = np.stack(READINGS[reading](*boxes.T, *wh.T), axis=1)
    with pytest.raises(DatasetError) as error:
        check_boxes(table(written, sizes_wh=wh))
    text = str(error.value)
    assert f"look like {reading}" in text or "look like fractions of the image size" in text
    assert "DATASETS.CHECK_BOXES False" in text


def test_a_few_odd_boxes_do_not_make_a_mistaken_file():
    boxes, wh = plausible(3, 100, 0.5)
    boxes[:3] = [[0.1, 0.2, 0.3, 0.4]] * 3
    boxes[3:6, 2:] *= 20
    check_boxes(table(boxes, sizes_wh=wh))


@pytest.mark.parametrize("unit", [100, 1000])
@pytest.mark.parametrize("size", [(60, 40), (1920, 1080), (5000, 4000)])
def test_percent_and_thousandths(unit, size):
    boxes, wh = plausible(5, 200, 0.6)
    shares = boxes / wh[:, [0, 1, 0, 1]] * unit
    shares[0] = [0.9 * unit, 0.9 * unit, 0.1 * unit, 0.1 * unit]
    sizes = np.tile([size], (200, 1))
    expected = "percent" if unit == 100 else "thousandths"
    if unit == 1000 and size == (1920, 1080):  # as likely in pixels
        check_boxes(table(shares, sizes_wh=sizes))
        return
    with pytest.raises(DatasetError, match=f"look like {expected} of the image size"):
        check_boxes(table(shares, sizes_wh=sizes))


def test_splits_are_judged_together(tmp_path):
    """Each split of six boxes is too small to tell."""

    def change(name: str, data: dict) -> None:
        for annotation in data["annotations"]:
            annotation["bbox"] = [x / 4 for x in annotation["bbox"]]
            del annotation["area"]

    folder = write_roboflow(tmp_path / "d", change, train=2, val=2)
    with pytest.raises(DatasetError, match="all 12 boxes lie in the upper left corner"):
        register_dataset(folder, output_dir=tmp_path)
    made = register_dataset(folder, output_dir=tmp_path, checks=DataChecks(boxes=False))
    assert made.reports[0].boxes == 6


@pytest.mark.parametrize(
    ("corner", "move"),
    [
        ("upper left", lambda x, y: (x, y)),
        ("lower left", lambda x, y: (x, HEIGHT - 20 + y)),
        ("upper right", lambda x, y: (WIDTH - 30 + x, y)),
        ("lower right", lambda x, y: (WIDTH - 30 + x, HEIGHT - 20 + y)),
    ],
)
def test_boxes_in_one_corner(corner, move):
    rng = np.random.default_rng(1)
    boxes = [[*move(*rng.integers(0, 10, 2)), *rng.integers(4, 10, 2)] for _ in range(12)]
    with pytest.raises(DatasetError, match=f"all 12 boxes lie in the {corner} corner"):
        check_boxes(table(boxes))
    check_boxes(table(boxes[:9])), "too few"
    check_boxes(table(boxes, np.arange(12) % 3)), "of too few images"
    check_boxes(table([*boxes, [60, 50, 20, 20]])), "one is elsewhere"


def test_a_mark_at_a_fixed_place_is_told_only():
    same = table([[5, 5, 20, 10]] * 12)
    check_boxes(same)
    assert corrected_columns(same).notes == (
        "all 12 boxes lie in the upper left corner of their images: within 16% of the width and "
        "12% of the height",
    )


# Areas.


@pytest.mark.parametrize(
    "wrong",
    [
        lambda boxes: 0 * boxes[:, 2],
        lambda boxes: 0 * boxes[:, 2] + 400,
        lambda boxes: boxes[:, 2] * boxes[:, 3] / 20480,
        lambda boxes: boxes[:, 2] * boxes[:, 3] * 2,
        lambda boxes: boxes[:, 2] + boxes[:, 3],
        lambda boxes: -boxes[:, 2] * boxes[:, 3],
    ],
    ids=["zero", "constant", "fraction", "double", "perimeter", "negative"],
)
def test_areas_that_do_not_fit_are_those_of_the_boxes(wrong):
    boxes, wh = plausible(2, 30, 0.5)
    fixed = corrected_columns(table(boxes, sizes_wh=wh, areas=wrong(boxes)))
    if wrong(boxes)[0] == boxes[0, 2] + boxes[0, 3]:
        assert (fixed.areas == boxes[:, 2] * boxes[:, 3]).all() or fixed.repairs == ()
        return
    assert (fixed.areas == boxes[:, 2] * boxes[:, 3]).all()
    (repair,) = fixed.repairs
    assert repair.startswith("`area` does not fit the boxes (")


def test_areas_of_masks_are_kept():
    boxes, wh = plausible(2, 30, 0.5)
    share = np.random.default_rng(0).uniform(0.2, 1.0, size=30)
    areas = boxes[:, 2] * boxes[:, 3] * share
    areas[0] = 0  # a single one says nothing about the column
    kept = corrected_columns(table(boxes, sizes_wh=wh, areas=areas))
    assert (kept.areas == areas).all() and kept.repairs == ()


def test_report_and_evaluation_agree_where_areas_are_zero(tmp_path):
    def change(name: str, data: dict) -> None:
        for annotation in data["annotations"]:
            annotation["area"] = 0

    made = register_dataset(write_roboflow(tmp_path / "d", change), output_dir=tmp_path)
    small, medium, large = np.array(made.reports[1].boxes_per_class).sum(axis=0)
    assert medium == 6 - small and large == 0 and medium > 0
    results, _ = evaluate_perfect(made, tmp_path / "inference")
    assert results["bbox"]["AP"] == results["bbox"]["APm"] == pytest.approx(100)
    written = json.loads(Path(MetadataCatalog.get(made.val).json_file).read_text())
    assert all(x["area"] == x["bbox"][2] * x["bbox"][3] for x in written["annotations"])
    assert "`area` does not fit the boxes (0 for a box of " in made.reports[0].table()


# Repeated boxes and crowd marks.


def test_boxes_that_are_all_there_twice_are_kept_once(tmp_path):
    def change(name: str, data: dict) -> None:
        data["annotations"] += [x | {"id": 1000 + x["id"]} for x in data["annotations"]]

    made = register_dataset(write_roboflow(tmp_path / "d", change), output_dir=tmp_path)
    assert [report.boxes for report in made.reports] == [12, 6]
    assert "12 of 24 boxes repeat another one and are dropped" in made.reports[0].table()
    results, _ = evaluate_perfect(made, tmp_path / "inference")
    assert results["bbox"]["AP"] == pytest.approx(100)


def test_a_single_repeated_box_is_told():
    boxes, wh = plausible(4, 20, 0.5)
    boxes[1], wh[1] = boxes[0], wh[0]
    image = np.arange(20)
    image[1] = 0
    kept = corrected_columns(table(boxes, image, wh))
    assert len(kept.boxes_xywh) == 20
    assert kept.notes == ("1 box(es) are exactly equal to another one of their image and class",)


def test_crowd_regions_only(tmp_path):
    def change(name: str, data: dict) -> None:
        for annotation in data["annotations"]:
            annotation["iscrowd"] = 1

    folder = write_roboflow(tmp_path / "d", change)
    with pytest.raises(DatasetError, match="all 12 annotations are crowd regions") as error:
        register_dataset(folder, output_dir=tmp_path)
    assert "positive width" not in str(error.value)


def test_images_in_both_splits_are_told(tmp_path):
    folder = write_roboflow(tmp_path / "d")
    (folder / "valid" / "001.png").write_bytes((folder / "train" / "003.png").read_bytes())
    made = register_dataset(folder, output_dir=tmp_path)
    note = "1 of 2 images are training images as well, which overstates accuracy"
    assert note in made.reports[1].warnings
    assert len(DatasetCatalog.get(made.val)) == 2
