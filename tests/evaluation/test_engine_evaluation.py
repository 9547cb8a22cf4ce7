"""Evaluation: both implementations of COCO's metrics agree; evaluators, pictures, progress."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from engine_support import register_tiny_shapes, tiny_cfg
from PIL import Image
from pycocotools.coco import COCO

from asag.engine import Trainer
from asag.engine.hooks import BestResult, Curves, box_ap
from asag.engine.writers import ConsolePrinter
from asag.evaluation import build_evaluator
from asag.evaluation.coco import CocoBoxEvaluator, ap50_by_class, choose_backend, evaluate_boxes
from asag.visualization.pictures import save_pictures, spread

IMAGES, CLASSES = 40, 5


def random_truth(rng: np.random.Generator) -> COCO:
    coco = COCO()
    boxes = rng.uniform(0, 300, (400, 2)), rng.uniform(2, 200, (400, 2))
    coco.dataset = {
        "images": [{"id": i, "width": 500, "height": 500} for i in range(IMAGES)],
        "categories": [{"id": 10 * k + 3, "name": str(k)} for k in range(CLASSES)],
        "annotations": [
            {
                "id": i + 1,
                "image_id": int(rng.integers(IMAGES - 3)),  # the last images are empty
                "category_id": int(10 * rng.integers(CLASSES - 1) + 3),  # the last class is unused
                "bbox": [*xy.tolist(), *wh.tolist()],
                "area": float(wh.prod()),
                "iscrowd": int(rng.random() < 0.05),
            }
            for i, (xy, wh) in enumerate(zip(*boxes, strict=True))
        ],
    }
    coco.createIndex()
    return coco


def random_results(gt: COCO, rng: np.random.Generator) -> list[dict]:
    """Noisy copies of the ground truth, false positives, and more than 100 in one image."""
    results = []
    for annotation in gt.dataset["annotations"]:
        for noise in (2.0, 20.0):
            box = np.array(annotation["bbox"]) + rng.normal(0, noise, 4)
            results.append(
                {
                    "image_id": annotation["image_id"],
                    "category_id": annotation["category_id"],
                    "bbox": [*box[:2].tolist(), *np.maximum(box[2:], 1).tolist()],
                    "score": float(np.round(rng.random(), 2)),  # with ties
                }
            )
    for _ in range(300):
        box = [*rng.uniform(0, 300, 2).tolist(), *rng.uniform(2, 200, 2).tolist()]
        image = 0 if rng.random() < 0.5 else int(rng.integers(IMAGES))
        label = int(10 * rng.integers(CLASSES) + 3) if image else 3
        score = float(rng.random())
        results.append({"image_id": image, "category_id": label, "bbox": box, "score": score})
    return results


@pytest.mark.parametrize("seed", range(3))
def test_fast_evaluation_gives_the_same_twelve_numbers(seed):
    pytest.importorskip("faster_coco_eval")
    rng = np.random.default_rng(seed)
    gt = random_truth(rng)
    results = random_results(gt, rng)
    slow = evaluate_boxes(gt, results, backend="pycocotools")
    fast = evaluate_boxes(gt, results, backend="faster-coco-eval")
    assert 0.05 < slow.stats[0] < 0.95
    np.testing.assert_allclose(fast.stats[:12], slow.stats[:12], rtol=0, atol=1e-12)
    np.testing.assert_allclose(fast.eval["precision"], slow.eval["precision"], atol=1e-12)


def test_backend_choice(monkeypatch):
    with pytest.raises(ValueError, match="backend is 'cuda'; choose one of: auto"):
        choose_backend("cuda")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert choose_backend() == "pycocotools"
    with pytest.raises(ValueError, match="not installed"):
        choose_backend("faster-coco-eval")


@pytest.mark.parametrize("backend", ["pycocotools", "auto"])
def test_perfect_detections_give_full_ap(tmp_path, backend):
    register_tiny_shapes()
    evaluator = CocoBoxEvaluator(
        "engine_shapes_val", distributed=False, output_dir=str(tmp_path), backend=backend
    )
    evaluator.reset()
    for entry in DatasetCatalog.get("engine_shapes_val"):
        found = Instances((entry["height"], entry["width"]))
        boxes = np.array([a["bbox"] for a in entry["annotations"]]).reshape(-1, 4)
        found.pred_boxes = Boxes(np.concatenate((boxes[:, :2], boxes[:, :2] + boxes[:, 2:]), 1))
        found.scores = Boxes(boxes).tensor.new_ones(len(boxes))
        found.pred_classes = (
            Boxes(boxes).tensor.new_tensor([a["category_id"] for a in entry["annotations"]]).long()
        )
        evaluator.process([entry], [{"instances": found}])
    results = evaluator.evaluate()["bbox"]
    assert results["AP"] == results["AP50"] == pytest.approx(100)
    assert results["AP-circle"] == pytest.approx(100)
    written = json.loads((tmp_path / "coco_instances_results.json").read_text())
    ground_truth = COCO(MetadataCatalog.get("engine_shapes_val").json_file)
    first_class_only = [x for x in written if x["category_id"] == 1]
    evaluation = evaluate_boxes(ground_truth, first_class_only, backend="pycocotools")
    assert ap50_by_class(evaluation) == [pytest.approx(100), 0]
    assert {r["category_id"] for r in written} <= {1, 2}, "ids of the file, not of the model"


def test_evaluator_follows_the_metadata(tmp_path):
    register_tiny_shapes()
    assert isinstance(build_evaluator("engine_shapes_val", str(tmp_path)), CocoBoxEvaluator)
    MetadataCatalog.get("engine_without_evaluator").thing_classes = ["circle"]
    with pytest.raises(ValueError, match="'engine_without_evaluator' has evaluator_type None"):
        build_evaluator("engine_without_evaluator", str(tmp_path))


def test_training_evaluates_logs_and_keeps_the_best(tmp_path):
    register_tiny_shapes()
    cfg = tiny_cfg(
        tmp_path, DATASETS__TEST="('engine_shapes_val',)", TEST__EVAL_PERIOD=2, SOLVER__MAX_ITER=5
    )
    trainer = Trainer(cfg)
    results = trainer.train()
    assert set(results["bbox"]) >= {"AP", "AP50", "AP-circle", "AP-square"}
    history = trainer.storage.history("bbox/AP").values()
    assert [iteration for _, iteration in history] == [1, 3, 4]
    best = BestResult.read(tmp_path)
    assert best.ap == max(value for value, _ in history)
    assert (tmp_path / "model_best.pth").is_file() and (tmp_path / "model_final.pth").is_file()
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert lines[-1]["iteration"] == 4 and {"total_loss", "lr", "bbox/AP"} <= set(lines[-1])
    assert list(tmp_path.glob("events.out.tfevents.*"))


def test_curves_follow_the_evaluations(tmp_path, monkeypatch):
    (tmp_path / "metrics.json").write_text('{"iteration": 0}')
    drawn = []
    monkeypatch.setattr("asag.engine.hooks.save_curves", lambda folder: drawn.append(str(folder)))
    trainer = SimpleNamespace(cfg=SimpleNamespace(OUTPUT_DIR=tmp_path), iter=0, max_iter=60)
    for period, expected in ((30, [40]), (20, [20, 40]), (0, [])):
        hook, seen = Curves(period, 20), []
        hook.trainer = trainer
        for iteration in range(trainer.max_iter):
            trainer.iter = iteration
            drawn.clear()
            hook.after_step()
            seen += [iteration + 1] * len(drawn)
        assert seen == expected  # once the numbers are written; the end is not the hook's


def test_box_ap_of_several_data_sets():
    assert box_ap({"bbox": {"AP": 12.0}}) == 12.0
    assert box_ap({"a": {"bbox": {"AP": 1.0}}, "b": {"bbox": {"AP": 2.0}}}) == 1.0
    assert box_ap({"bbox": {"AP": float("nan")}}) is None
    assert box_ap({}) is None


def test_pictures(tmp_path):
    pytest.importorskip("asag.visualization.detections")
    register_tiny_shapes()
    cfg = tiny_cfg(tmp_path, TEST__NUM_PICTURES=4)
    model = build_model(cfg).train()
    paths = save_pictures(cfg, model, "engine_shapes_val", tmp_path / "pictures")
    assert len(paths) == 4 and model.training
    with Image.open(paths[0]) as picture:
        assert picture.width >= 2 * 80 and picture.height >= 64


def test_pictures_without_the_drawing_packages(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "asag.visualization.detections", None)
    with caplog.at_level("WARNING", logger="asag"):
        assert save_pictures(tiny_cfg(tmp_path), None, "engine_shapes_val", tmp_path) == []
    assert "no pictures" in caplog.text and "TEST.NUM_PICTURES" in caplog.text


def test_spread():
    assert list(spread(200, 4)) == [0, 50, 100, 150]
    assert list(spread(3, 8)) == [0, 1, 2]
    assert list(spread(0, 8)) == []
    assert list(spread(5, 0)) == []


def test_console_line(caplog):
    printer = ConsolePrinter(max_iter=100, iters_per_epoch=10)
    with EventStorage(24) as storage, caplog.at_level("INFO", logger="asag"):
        storage.put_scalars(total_loss=6.0, loss_ce=1.5, loss_ce_0=9.0, loss_giou=0.5, lr=0.001)
        storage.put_scalars(time=2.0, data_time=0.25)
        printer.write()
        printer.write()
    (line,) = [record.getMessage() for record in caplog.records]
    assert "25/100 (epoch 2.50)  loss 6 (ce 1.5, giou 0.5)  lr 0.001" in line
    assert "2.000 s/iter (data 0.250)  eta 0:02:30" in line and "GiB" in line
