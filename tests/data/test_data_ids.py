"""Ids of any kind: read, mapped around the evaluation, and written as they were."""

import contextlib
import copy
import io
import json
import random

import pytest
from data_support import evaluate_perfect, write_roboflow
from hypothesis import given
from hypothesis import strategies as st
from pycocotools.coco import COCO

from asag.data import DatasetError, register_dataset
from asag.data.ids import IdIndex, id_order, loose_id
from asag.evaluation.coco import evaluate_boxes

BACKENDS = ("pycocotools", "faster-coco-eval")
DRAW = random.Random(0)
IMAGE_IDS = {
    "numbers": [1, 2, 3, 4],
    "text": ["a", "b", "c", "d"],
    "digits": ["0001", "2", "03", "4"],
    "mixed": [1, "2", 3, "4"],
    "32 bits": [2**31 + i for i in range(4)],
    "53 bits": [2**53 + i for i in range(4)],
    "64 bits": [DRAW.getrandbits(64) for _ in range(4)],
    "128 bits": [DRAW.getrandbits(128) for _ in range(4)],
    "negative": [-1, -2, -3, -4],
}
CATEGORY_IDS = {"numbers": (1, 2), "large": (2**40, 2**62), "odd": (-4, 0), "text": ("x", "7")}


def ground_truth(image_ids, category_ids=(1, 2), first=1) -> COCO:
    """Two boxes of different classes in every image."""
    annotations = [
        {"image_id": i, "category_id": c, "bbox": [10 + 20 * k, 10, 15, 15], "iscrowd": 0}
        for i in image_ids
        for k, c in enumerate(category_ids)
    ]
    for number, annotation in enumerate(annotations, start=first):
        annotation |= {"id": number, "area": 225}
    coco = COCO()
    coco.dataset = {
        "info": {},
        "images": [{"id": i, "file_name": "a", "width": 99, "height": 99} for i in image_ids],
        "annotations": annotations,
        "categories": [{"id": c, "name": str(c)} for c in category_ids],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def detections(coco: COCO) -> list[dict]:
    keys = ("image_id", "category_id", "bbox")
    return [{k: x[k] for k in keys} | {"score": 0.9} for x in coco.dataset["annotations"]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("image_ids", IMAGE_IDS.values(), ids=IMAGE_IDS)
def test_images_of_any_ids_are_scored(image_ids, backend):
    coco = ground_truth(image_ids)
    before = copy.deepcopy(coco.dataset)
    evaluation = evaluate_boxes(coco, detections(coco), backend=backend)
    assert evaluation.stats[0] == pytest.approx(1)
    assert sorted(evaluation.params.imgIds, key=id_order) == sorted(image_ids, key=id_order)
    assert coco.dataset == before
    half = evaluate_boxes(coco, detections(coco)[:4], backend=backend)
    assert half.stats[0] == pytest.approx(0.5, abs=0.01), "two images of four are found"
    found = evaluate_boxes(coco, detections(coco)[:4], backend=backend, image_ids=image_ids[:2])
    assert found.stats[0] == pytest.approx(1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("category_ids", CATEGORY_IDS.values(), ids=CATEGORY_IDS)
def test_categories_of_any_ids_are_scored(category_ids, backend):
    coco = ground_truth([1, 2, 3], category_ids, first=2**53)
    found = [x for x in detections(coco) if x["category_id"] == category_ids[1]]
    evaluation = evaluate_boxes(coco, found, backend=backend)
    columns = evaluation.params.catIds
    assert columns == sorted(category_ids, key=id_order)
    precision = evaluation.eval["precision"][..., 0, -1]  # (IoUs, recalls, K)
    assert precision[..., columns.index(category_ids[1])].min() == pytest.approx(1)
    assert precision[..., columns.index(category_ids[0])].max() == 0


@pytest.mark.parametrize("key", ["image_id", "category_id"])
def test_detections_of_other_data_are_named(key):
    coco = ground_truth([1, 2])
    with pytest.raises(ValueError, match=f"a detection has .*{key} 'x'.* list no 'x'"):
        evaluate_boxes(coco, [detections(coco)[0] | {key: "x"}])


@pytest.mark.parametrize("difficult", [True, False])
def test_difficult_objects_do_not_count_in_data_of_pascal_voc(difficult):
    """Found or not, once or twice; but only by IoU."""
    coco = ground_truth([1, 2])
    coco.dataset["info"] = {"evaluator_type": "pascal_voc" if difficult else "coco"}
    for annotation in coco.dataset["annotations"][:2]:  # of image 1
        annotation["difficult"] = 1
    found = detections(coco)
    inside = found[0] | {"bbox": [11, 11, 2, 2], "score": 0.99}
    ap = evaluate_boxes(coco, found).stats[0]
    without = evaluate_boxes(coco, found[2:]).stats[0]
    twice = evaluate_boxes(coco, [*found, found[0] | {"score": 0.95}]).stats[0]
    small = evaluate_boxes(coco, [*found, inside]).stats[0]
    assert ap == pytest.approx(1)
    assert small < 1, "a detection in a difficult object is not one of it, as it is of a crowd"
    if difficult:
        assert without == twice == pytest.approx(1)
    else:
        assert without == pytest.approx(0.5, abs=0.01)
        assert twice < 1


def renamed(new_id):
    """A change that gives images other ids."""

    def change(name: str, data: dict) -> None:
        ids = {image["id"]: new_id(n) for n, image in enumerate(data["images"])}
        for image in data["images"]:
            image["id"] = ids[image["id"]]
        for annotation in data["annotations"]:
            annotation["image_id"] = ids[annotation["image_id"]]

    return change


@pytest.mark.parametrize(
    "new_id",
    [
        lambda n: f"cam_{n:04d}",
        lambda n: f"{n:06d}",
        lambda n: 2**63 - 5 + 3 * n,
        lambda n: n if n % 2 else str(n),
        lambda n: f"frames/\u5f69 {n}.png",
    ],
    ids=["text", "digits", "64 bits", "mixed", "names"],
)
def test_a_run_scores_and_writes_the_users_ids(tmp_path, new_id):
    made = register_dataset(
        write_roboflow(tmp_path / "d", renamed(new_id), train=4, val=3), output_dir=tmp_path
    )
    assert made.reports[1].warnings == []
    results, written = evaluate_perfect(made, tmp_path / "inference")
    assert results["bbox"]["AP"] == pytest.approx(100)
    assert results["bbox"]["AP-cat"] == results["bbox"]["AP-dog"] == pytest.approx(100)
    assert {x["image_id"] for x in written} == {new_id(n) for n in range(3)}
    assert set(written[0]) == {"image_id", "category_id", "bbox", "score"}


def test_text_category_ids(tmp_path):
    def change(name: str, data: dict) -> None:
        for entry in data["categories"]:
            entry["id"] = {1: "n02", 2: "n01"}[entry["id"]]
        for annotation in data["annotations"]:
            annotation["category_id"] = {1: "n02", 2: "n01"}[annotation["category_id"]]

    made = register_dataset(write_roboflow(tmp_path / "d", change), output_dir=tmp_path)
    assert made.class_names == ("dog", "cat"), "by rising id"
    results, written = evaluate_perfect(made, tmp_path / "inference")
    assert results["bbox"]["AP-cat"] == results["bbox"]["AP-dog"] == pytest.approx(100)
    assert {x["category_id"] for x in written} == {"n01", "n02"}


# Ids of another type than in the list.


@pytest.mark.parametrize(
    "write",
    [
        str,
        lambda i: f"{i:05d}",
        float,
        lambda i: f"{i:03d}.png",
        lambda i: f"{i:03d}",
    ],
    ids=["text", "leading zeros", "float", "file name", "stem"],
)
def test_image_ids_written_differently_are_taken_and_reported(tmp_path, write):
    def change(name: str, data: dict) -> None:
        for annotation in data["annotations"]:
            annotation["image_id"] = write(annotation["image_id"])

    made = register_dataset(write_roboflow(tmp_path / "d", change), output_dir=tmp_path)
    assert (made.reports[0].boxes, made.reports[0].boxes_without_image) == (12, 0)
    reported = any("`image_id` is written differently" in x for x in made.reports[0].warnings)
    assert reported == (write is not float), "1.0 is 1 in every respect"
    results, written = evaluate_perfect(made, tmp_path / "inference")
    assert results["bbox"]["AP"] == pytest.approx(100)
    assert {x["image_id"] for x in written} == {1, 2}


def test_ids_written_as_floats(tmp_path):
    """As tables of other programs write them."""

    def change(name: str, data: dict) -> None:
        for section in ("images", "annotations", "categories"):
            for entry in data[section]:
                for key in {"id", "image_id", "category_id"} & entry.keys():
                    entry[key] = float(entry[key])

    made = register_dataset(write_roboflow(tmp_path / "d", change), output_dir=tmp_path)
    results, written = evaluate_perfect(made, tmp_path / "inference")
    assert results["bbox"]["AP-cat"] == results["bbox"]["AP-dog"] == pytest.approx(100)
    assert {x["image_id"] for x in written} == {1, 2}

    def fraction(name: str, data: dict) -> None:
        data["images"][0]["id"] = 1.5

    folder = write_roboflow(tmp_path / "e", fraction)
    with pytest.raises(DatasetError, match=r"images\[0\] \(id 1\.5\): 'id' = 1\.5"):
        register_dataset(folder, output_dir=tmp_path)


def test_category_names_for_ids_are_taken_and_reported(tmp_path):
    def change(name: str, data: dict) -> None:
        for annotation in data["annotations"]:
            annotation["category_id"] = {1: "cat", 2: "dog"}[annotation["category_id"]]

    made = register_dataset(write_roboflow(tmp_path / "d", change), output_dir=tmp_path)
    assert "`category_id` is written differently from the id in `categories` ('cat' is 1)" in (
        made.reports[0].table()
    )
    results, _ = evaluate_perfect(made, tmp_path / "inference")
    assert results["bbox"]["AP-cat"] == results["bbox"]["AP-dog"] == pytest.approx(100)


def test_ids_that_fit_no_image_are_the_problem(tmp_path):
    def change(name: str, data: dict) -> None:
        for annotation in data["annotations"]:
            annotation["image_id"] = f"image-{annotation['image_id']}"

    folder = write_roboflow(tmp_path / "d", change)
    with pytest.raises(DatasetError, match=r"12 of 12 .* is 'image-1' .* images are like 1"):
        register_dataset(folder, output_dir=tmp_path)


@pytest.mark.parametrize(
    ("ids", "value", "row"),
    [
        ([1, 2], 2, 1),
        ([1, 2], "2", 1),
        ([1, 2], 2.0, 1),
        (["1", "2"], 2, 1),
        (["01", "02"], 2, 1),
        ([2**64 + 1], str(2**64 + 1), 0),
        ([-3], "-3", 0),
        ([1, "1"], "1", 1),
        ([1, "1"], "01", -1),
        ([1, "01"], 1, 0),
        (["1", "01"], 1, -1),
        ([1, 2], 2.5, -1),
        ([1, 2], float("nan"), -1),
        ([0, 1], False, 0),
        (["a"], " a ", 0),
        (["a"], "A", -1),
    ],
)
def test_rows_of_ids(ids, value, row):
    index = IdIndex(ids)
    assert index.find(value) == row
    assert index.corrected == (row >= 0 and value not in ids)


@given(st.lists(st.one_of(st.integers(), st.text(max_size=4)), unique=True, max_size=8))
def test_every_listed_id_is_found_exactly(ids):
    index = IdIndex(ids)
    assert [index.find(x) for x in ids] == list(range(len(ids)))
    assert index.corrected == 0
    assert sorted(ids, key=id_order) == sorted(
        (x for x in ids if isinstance(x, int)),
    ) + sorted(x for x in ids if isinstance(x, str))
    for value in ids:
        assert loose_id(value) == loose_id(loose_id(value))


def test_written_copies_keep_large_ids_exact(tmp_path):
    def change(name: str, data: dict) -> None:
        renamed(lambda n: 2**63 + n)(name, data)
        del data["info"]  # so that a copy is written

    made = register_dataset(write_roboflow(tmp_path / "d", change), output_dir=tmp_path / "out")
    copied = json.loads((tmp_path / "out" / "datasets" / f"{made.val}.json").read_text())
    assert [image["id"] for image in copied["images"]] == [2**63, 2**63 + 1]
