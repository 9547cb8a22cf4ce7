"""The generated data set: the same bytes every time, sensible boxes, AP 100 when perfect."""

import multiprocessing
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from PIL import Image

from asag.data.coco_json import load_json
from asag.data.shapes import (
    ANNOTATION_FILE,
    CROWD,
    STANDARD,
    ShapesSpec,
    load_shapes,
    make_shapes,
    register_shapes,
)
from asag.data.shapes_drawing import OUTLINES

SMALL = replace(STANDARD, images=(("train", 12), ("val", 30)))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def _make(root: Path) -> None:
    make_shapes(SMALL, "train", root)


def test_same_bytes_every_time(tmp_path):
    first = content(make_shapes(SMALL, "train", tmp_path / "a"))
    assert first == content(make_shapes(SMALL, "train", tmp_path / "b"))
    assert len(first) == 13
    # Images do not depend on how many there are, and splits and seeds do not share any.
    longer = replace(SMALL, images=(("train", 14), ("val", 30)))
    more = content(make_shapes(longer, "train", tmp_path))
    assert all(more[name] == data for name, data in first.items() if name != ANNOTATION_FILE)
    other = content(make_shapes(replace(SMALL, seed=1), "train", tmp_path))
    val = content(make_shapes(SMALL, "val", tmp_path))
    assert not set(first.values()) & (set(val.values()) | set(other.values()))


def test_every_spec_has_its_own_folder():
    specs = [STANDARD, CROWD, SMALL, replace(STANDARD, height=96), replace(STANDARD, seed=5)]
    assert len({spec.folder for spec in specs}) == len(specs)


def test_processes_that_make_it_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_make, args=(tmp_path,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    (made,) = (tmp_path / SMALL.folder).iterdir()  # and no scratch folder is left
    assert content(made) == content(make_shapes(SMALL, "train", tmp_path / "alone"))


def test_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("asag.data.shapes.draw_scene", fail)
    with pytest.raises(OSError, match="disk full"):
        make_shapes(SMALL, "train", tmp_path)
    assert list((tmp_path / SMALL.folder).iterdir()) == []


def test_standard_set_covers_what_it_promises(tmp_path):
    samples = load_shapes(replace(STANDARD, images=(("train", 150),)), "train", tmp_path)
    boxes = np.array([a["bbox"] for s in samples for a in s["annotations"]])
    labels = Counter(a["category_id"] for s in samples for a in s["annotations"])
    assert sorted(labels) == [0, 1, 2, 3, 4]
    assert min(labels.values()) > 0.1 * len(boxes)
    assert 0 < sum(not s["annotations"] for s in samples) < 20
    sides = boxes[:, 2:].max(axis=1)
    assert np.count_nonzero(sides < 32) > 20
    assert np.count_nonzero(sides > 80) > 20
    assert (boxes >= 0).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= [160, 128]).all()
    pixels = np.asarray(Image.open(samples[0]["file_name"]))
    assert pixels.shape == (128, 160, 3)
    assert pixels.std() > 3


def test_color_does_not_tell_the_class(tmp_path):
    """The mean colors of the classes' box centers are alike, far below their spread."""
    samples = load_shapes(replace(STANDARD, images=(("train", 150),)), "train", tmp_path)
    colors: dict[int, list[np.ndarray]] = {k: [] for k in range(5)}
    for sample in samples:
        pixels = np.asarray(Image.open(sample["file_name"]), dtype=float)
        for annotation in sample["annotations"]:
            x, y, w, h = (int(v) for v in annotation["bbox"])
            patch = pixels[y : y + h, x : x + w]
            colors[annotation["category_id"]].append(patch.mean(axis=(0, 1)))
    means = np.array([np.mean(c, axis=0) for c in colors.values()])
    assert np.ptp(means, axis=0).max() < 30
    assert min(np.std(c, axis=0).min() for c in colors.values()) > 30


@pytest.mark.parametrize("name", OUTLINES)
def test_outlines_reach_one(name):
    angle = np.linspace(0, 2 * np.pi, 3601)
    radius = OUTLINES[name](angle)
    assert radius.max() == pytest.approx(1.0)
    assert radius.min() > 0.3


def test_crowd_set_is_crowded(tmp_path):
    samples = load_shapes(replace(CROWD, images=(("val", 60),)), "val", tmp_path)
    counts = [sum(not a["iscrowd"] for a in s["annotations"]) for s in samples]
    assert np.median(counts) >= 15
    assert max(counts) <= 56
    assert {a["category_id"] for s in samples for a in s["annotations"]} == {0}
    ignored = [a for s in samples for a in s["annotations"] if a["iscrowd"]]
    assert len(ignored) >= 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_names": ("circle", "blob")}, "blob"),
        ({"objects": (0, 3)}, "objects"),
        ({"sizes": (0.5, 0.2)}, "sizes"),
        ({"height": 8}, "32 pixels"),
    ],
)
def test_wrong_specs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ShapesSpec(**change)


def test_registered_names():
    for name in ("shapes_train", "shapes_val", "shapes_crowd_train", "shapes_crowd_val"):
        assert name in DatasetCatalog
    assert MetadataCatalog.get("shapes_val").thing_classes == list(STANDARD.class_names)
    assert MetadataCatalog.get("shapes_crowd_val").evaluator_type == "crowdhuman"


def test_perfect_predictions_score_100(tmp_path):
    spec = replace(SMALL, name="shapes_for_test")
    register_shapes(spec, tmp_path)
    samples = DatasetCatalog.get("shapes_for_test_val")
    evaluator = COCOEvaluator(
        "shapes_for_test_val", ("bbox",), False, output_dir=str(tmp_path / "out")
    )
    evaluator.reset()
    for sample in samples:
        boxes = torch.tensor([a["bbox"] for a in sample["annotations"]]).reshape(-1, 4)
        instances = Instances((sample["height"], sample["width"]))
        instances.pred_boxes = Boxes(torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1))
        labels = [a["category_id"] for a in sample["annotations"]]
        instances.pred_classes = torch.tensor(labels, dtype=torch.int64)
        instances.scores = torch.ones(len(labels))
        evaluator.process([sample], [{"instances": instances}])
    results = evaluator.evaluate()["bbox"]
    assert results["AP"] == pytest.approx(100.0)
    for name in spec.class_names:
        assert results[f"AP-{name}"] == pytest.approx(100.0)


def test_annotation_file_is_complete(tmp_path):
    data = load_json(make_shapes(SMALL, "val", tmp_path) / ANNOTATION_FILE)
    assert set(data) == {"info", "images", "annotations", "categories"}
    assert min(a["id"] for a in data["annotations"]) == 1
