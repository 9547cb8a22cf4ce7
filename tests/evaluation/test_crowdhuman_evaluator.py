"""The CrowdHuman evaluator inside Detectron2's loop: instances in, percentages and a file out."""

import dataclasses
import json
import uuid

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils import comm

from asag.data.shapes import CROWD, register_shapes
from asag.evaluation import CrowdHumanEvaluator, crowdhuman_metrics_from_coco
from asag.evaluation.crowdhuman import DETECTIONS_FILE


def dataset_dicts():
    """Four images: two with objects, one with objects in both modes, one without annotations."""
    rng = np.random.default_rng(3)
    entries = []
    for image_id, count in enumerate((6, 9, 4, 0), start=1):
        annotations = []
        for j in range(count):
            x, y = rng.uniform(0, 80, 2)
            w, h = rng.uniform(10, 40, 2)
            xywh = image_id == 3 and j % 2
            annotations.append(
                {
                    "bbox": [x, y, w, h] if xywh else [x, y, x + w, y + h],
                    "bbox_mode": BoxMode.XYWH_ABS if xywh else BoxMode.XYXY_ABS,
                    "category_id": 0,
                    "iscrowd": int(j % 4 == 3),
                }
            )
        entries.append(
            {
                "file_name": f"{image_id}.jpg",
                "image_id": image_id,
                "height": 100,
                "width": 110,
                "annotations": annotations,
            }
        )
    return entries


@pytest.fixture
def register():
    """Registers dataset dicts under a fresh name and forgets them afterwards."""
    names = []

    def add(entries, **metadata):
        name = f"crowd_{uuid.uuid4().hex}"
        DatasetCatalog.register(name, lambda: entries)
        MetadataCatalog.get(name).set(**({"thing_classes": ["person"]} | metadata))
        names.append(name)
        return name

    yield add
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def xyxy(annotation):
    return BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)


def instances(entry, boxes, scores):
    found = Instances((entry["height"], entry["width"]))
    found.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    found.scores = torch.tensor(scores, dtype=torch.float32)
    found.pred_classes = torch.zeros(len(scores), dtype=torch.long)
    return found


def detect(entry, seed=0):
    """Jittered copies of the objects, more than 100 of them, and one box anywhere."""
    rng = np.random.default_rng([seed, entry["image_id"]])
    boxes = [[5.0, 5.0, 30.0, 30.0]]
    for annotation in entry["annotations"]:
        boxes += (np.array(xyxy(annotation)) + rng.normal(0, 2, (25, 4))).tolist()
    return instances(entry, boxes, rng.random(len(boxes)).tolist())


def as_coco(entries):
    return {
        "images": [
            {"id": e["image_id"], **{k: e[k] for k in ("height", "width")}} for e in entries
        ],
        "annotations": [
            {
                "image_id": e["image_id"],
                "bbox": BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYWH_ABS),
                "iscrowd": a["iscrowd"],
            }
            for e in entries
            for a in e["annotations"]
        ],
    }


def test_percentages_and_written_detections_agree(register, tmp_path):
    entries = dataset_dicts()
    name = register(entries, thing_dataset_id_to_contiguous_id={1: 0})
    evaluator = CrowdHumanEvaluator(name, output_dir=tmp_path / "inference")
    evaluator.reset()
    for start in (0, 2):
        batch = entries[start : start + 2]
        evaluator.process(batch, [{"instances": detect(e)} for e in batch])
    results = evaluator.evaluate()

    assert list(results) == ["bbox"]
    assert list(results["bbox"]) == ["AP", "mMR", "Recall"]
    written = json.loads((tmp_path / "inference" / DETECTIONS_FILE).read_text())
    assert len(written) == sum(len(detect(e)) for e in entries)  # far more than 100 an image
    assert {entry["category_id"] for entry in written} == {1}
    again = crowdhuman_metrics_from_coco(as_coco(entries), written)
    np.testing.assert_allclose(
        list(results["bbox"].values()), [100 * v for v in again[:3]], rtol=0, atol=1e-9
    )
    assert 0 < results["bbox"]["AP"] < 100
    assert list((tmp_path / "inference").iterdir()) == [tmp_path / "inference" / DETECTIONS_FILE]


def test_perfect_detections_find_every_real_box(register):
    entries = dataset_dicts()
    evaluator = CrowdHumanEvaluator(register(entries))
    for entry in entries:
        boxes = [xyxy(a) for a in entry["annotations"]]
        output = instances(entry, boxes, np.linspace(0.9, 0.5, len(boxes)).tolist())
        evaluator.process([entry], [{"instances": output}])
    bbox = evaluator.evaluate()["bbox"]
    assert bbox["Recall"] == 100.0
    assert bbox["AP"] > 90
    assert bbox["mMR"] < 1e-6


def test_without_any_detection(register, tmp_path):
    entries = dataset_dicts()
    evaluator = CrowdHumanEvaluator(register(entries), output_dir=tmp_path)
    evaluator.process(entries, [{"instances": instances(e, [], [])} for e in entries])
    assert evaluator.evaluate()["bbox"] == {"AP": 0.0, "mMR": 100.0, "Recall": 0.0}
    assert json.loads((tmp_path / DETECTIONS_FILE).read_text()) == []


def test_unprocessed_images_count_as_empty_and_are_reported(register, caplog):
    entries = dataset_dicts()
    name = register(entries)
    part, full = CrowdHumanEvaluator(name), CrowdHumanEvaluator(name)
    part.process(entries[:1], [{"instances": detect(entries[0])}])
    full.process(entries[:1], [{"instances": detect(entries[0])}])
    full.process(entries[1:], [{"instances": instances(e, [], [])} for e in entries[1:]])
    with caplog.at_level("WARNING", logger="asag.evaluation.crowdhuman"):
        assert part.evaluate() == full.evaluate()
    assert "3 of 4 images were not processed" in caplog.text


def test_generated_crowd_is_evaluated(tmp_path):
    spec = dataclasses.replace(CROWD, name="crowd_of_a_test", images=(("val", 4),), ignore=1.0)
    name = "crowd_of_a_test_val"
    register_shapes(spec, tmp_path)
    try:
        evaluator = CrowdHumanEvaluator(name)
        entries = DatasetCatalog.get(name)
        evaluator.process(entries, [{"instances": detect(e)} for e in entries])
        bbox = evaluator.evaluate()["bbox"]
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    assert any(a["iscrowd"] for e in entries for a in e["annotations"])
    assert bbox["Recall"] > 50


def test_reset_forgets(register):
    entries = dataset_dicts()
    evaluator = CrowdHumanEvaluator(register(entries))
    evaluator.process(entries, [{"instances": detect(e)} for e in entries])
    evaluator.reset()
    assert evaluator.evaluate()["bbox"]["Recall"] == 0.0


def test_image_of_another_data_set_is_refused(register):
    entries = dataset_dicts()
    evaluator = CrowdHumanEvaluator(register(entries))
    stranger = entries[0] | {"image_id": 77}
    with pytest.raises(ValueError, match="image_id 77 is not in the evaluated data set"):
        evaluator.process([stranger], [{"instances": detect(entries[0])}])


@pytest.mark.parametrize("what", ["box", "score"])
def test_non_finite_detections_are_refused(register, what):
    entries = dataset_dicts()
    evaluator = CrowdHumanEvaluator(register(entries))
    nan = float("nan")
    output = instances(
        entries[0], [[0, 0, nan if what == "box" else 9, 9]], [nan if what == "score" else 0.5]
    )
    with pytest.raises(ValueError, match="image_id 1: a detected box or score is NaN"):
        evaluator.process(entries[:1], [{"instances": output}])


def test_several_classes_are_refused(register):
    name = register(dataset_dicts(), thing_classes=["person", "dog"])
    with pytest.raises(ValueError, match=r"one class.*has 2; use the COCO evaluator"):
        CrowdHumanEvaluator(name)


def test_data_set_without_real_boxes_is_refused(register):
    entries = dataset_dicts()
    for entry in entries:
        for annotation in entry["annotations"]:
            annotation["iscrowd"] = 1
    with pytest.raises(ValueError, match="no real"):
        CrowdHumanEvaluator(register(entries))


def test_unknown_box_mode_is_refused(register):
    entries = dataset_dicts()
    entries[1]["annotations"][0]["bbox_mode"] = BoxMode.XYXY_REL
    with pytest.raises(ValueError, match=r"2\.jpg: boxes in mode"):
        CrowdHumanEvaluator(register(entries))


def test_missing_image_size_is_named(register):
    entries = dataset_dicts()
    del entries[1]["width"]
    with pytest.raises(ValueError, match=r"2\.jpg has no height and width"):
        CrowdHumanEvaluator(register(entries))


def _evaluate_share(rank, world_size, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size
    )
    try:
        entries = dataset_dicts()
        DatasetCatalog.register("crowd_shared", lambda: entries)
        MetadataCatalog.get("crowd_shared").set(thing_classes=["person"])
        evaluator = CrowdHumanEvaluator("crowd_shared", output_dir=folder)
        mine = entries[rank::world_size]
        evaluator.process(mine, [{"instances": detect(e)} for e in mine])
        results = evaluator.evaluate()
        (folder / f"{rank}.json").write_text(json.dumps(results))
        comm.synchronize()
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed support")
def test_two_processes_give_the_result_of_one(register, tmp_path):
    entries = dataset_dicts()
    alone = CrowdHumanEvaluator(register(entries), distributed=False)
    alone.process(entries, [{"instances": detect(e)} for e in entries])
    mp.spawn(_evaluate_share, args=(2, tmp_path), nprocs=2)
    assert json.loads((tmp_path / "0.json").read_text()) == alone.evaluate()
    assert json.loads((tmp_path / "1.json").read_text()) == {}
    assert len(json.loads((tmp_path / DETECTIONS_FILE).read_text())) == sum(
        len(detect(e)) for e in entries
    )
