"""Detectron2's own trainer, predictor, checkpointer, evaluator and loop work on every
meta-architecture, and with checkpoints of either trainer."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer, PeriodicCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.engine import DefaultPredictor, DefaultTrainer
from detectron2.evaluation import COCOEvaluator, inference_on_dataset, print_csv_format
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.solver import build_lr_scheduler
from detectron2.solver import build_optimizer as detectron2_optimizer
from detectron2.utils.events import EventStorage
from engine_support import register_tiny_shapes

from asag import Detector, add_asag_config
from asag.checkpoint.loading import load_weights
from asag.engine import (
    AtomicCheckpointer,
    Curves,
    Trainer,
    TrainingProgress,
    WeightAverage,
    build_optimizer,
)
from asag.modeling.meta_arch import SparseDetector

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
ITERATIONS, MORE = 12, 2
ARCHITECTURES = {
    "SparseRCNN": "SparseRCNN/sparse_rcnn_tiny.yaml",
    "DynamicSparseRCNN": "DynamicSparseRCNN/dynamic_sparse_rcnn_tiny.yaml",
    "IoUEnhancedSparseRCNN": "IoUEnhancedSparseRCNN/iou_sparse_rcnn_tiny.yaml",
    "ASAG": "ASAG/asag_tiny.yaml",
    "DETR": "DETR/detr_tiny.yaml",
    "ConditionalDETR": "ConditionalDETR/conditional_detr_tiny.yaml",
    "SparseDetector": "ASAG/dense_tiny.yaml",
}
OPTIONS: list[Any] = [
    *("MODEL.DEVICE", "cpu", "MODEL.ROI_HEADS.NUM_CLASSES", 2),
    *("DATASETS.TRAIN", ("engine_shapes_train",), "DATASETS.TEST", ("engine_shapes_val",)),
    *("DATALOADER.NUM_WORKERS", 0, "SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", ITERATIONS),
    *("INPUT.MIN_SIZE_TRAIN", (64,), "INPUT.MAX_SIZE_TRAIN", 80, "INPUT.MIN_SIZE_TEST", 64),
    *("INPUT.MAX_SIZE_TEST", 80, "TEST.EVAL_PERIOD", 0, "SEED", 7),
]


def plain_cfg(architecture: str, folder: Path, *options: Any) -> CfgNode:
    """A configuration made as a user of Detectron2 makes it."""
    register_tiny_shapes()
    cfg = get_cfg()
    add_asag_config(cfg)
    cfg.merge_from_file(str(CONFIGS / ARCHITECTURES[architecture]))
    cfg.merge_from_list([*OPTIONS, "OUTPUT_DIR", str(folder), *options])
    folder.mkdir(parents=True, exist_ok=True)
    return cfg


def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8)


def same_detections(a: Any, b: Any) -> bool:
    return all(
        torch.equal(getattr(a, name), getattr(b, name)) for name in ("scores", "pred_classes")
    ) and torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor)


def test_every_registered_architecture_is_here():
    registered = {name for name, kind in META_ARCH_REGISTRY if issubclass(kind, SparseDetector)}
    assert registered == set(ARCHITECTURES)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_default_trainer(architecture, tmp_path, caplog):
    cfg = plain_cfg(architecture, tmp_path)
    trainer = DefaultTrainer(cfg)
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.resume_or_load(resume=False)
    trainer.train()
    assert any(not torch.equal(v, before[k]) for k, v in trainer.model.state_dict().items())
    histories = trainer.storage.histories()
    losses = {name for name in histories if name.startswith("loss_")}
    assert {"loss_ce", "loss_bbox", "loss_giou"} <= losses and "total_loss" in histories
    logged = json.loads((tmp_path / "metrics.json").read_text().splitlines()[-1])
    assert logged.keys() >= losses
    if architecture == "DynamicSparseRCNN":
        assert "ot_units_per_object" in histories

    resumed = DefaultTrainer(plain_cfg(architecture, tmp_path, "SOLVER.MAX_ITER", 12 + MORE))
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == ITERATIONS
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, trainer.model.state_dict()[name]), name
    resumed.train()

    evaluator = COCOEvaluator("engine_shapes_val", output_dir=str(tmp_path / "inference"))
    loader = build_detection_test_loader(cfg, "engine_shapes_val")
    results = inference_on_dataset(resumed.model, loader, evaluator)
    assert "AP50" in results["bbox"]
    print_csv_format(results)
    assert set(DefaultTrainer.test(cfg, resumed.model, [evaluator])["bbox"]) == set(results["bbox"])

    cfg.MODEL.WEIGHTS = str(tmp_path / "model_final.pth")
    found = DefaultPredictor(cfg)(image())["instances"]
    assert found.image_size == (64, 80) and 0 < len(found) <= cfg.TEST.DETECTIONS_PER_IMAGE
    model = build_model(cfg).eval()
    DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    with torch.no_grad():  # the predictor takes BGR images
        rgb = torch.tensor(image()[:, :, ::-1].copy()).permute(2, 0, 1)
        (again,) = model([{"image": rgb, "height": 64, "width": 80}])
    assert same_detections(found, again["instances"])


def test_plain_training_loop(tmp_path):
    """As in Detectron2's tools/plain_train_net.py."""
    cfg = plain_cfg("SparseRCNN", tmp_path)
    model = build_model(cfg).train()
    optimizer = detectron2_optimizer(cfg, model)
    scheduler = build_lr_scheduler(cfg, optimizer)
    checkpointer = DetectionCheckpointer(
        model, cfg.OUTPUT_DIR, optimizer=optimizer, scheduler=scheduler
    )
    periodic = PeriodicCheckpointer(checkpointer, 4, max_iter=cfg.SOLVER.MAX_ITER)
    with EventStorage(0) as storage:
        for data, iteration in zip(
            build_detection_train_loader(cfg), range(cfg.SOLVER.MAX_ITER), strict=False
        ):
            storage.iter = iteration
            loss_dict = model(data)
            losses = sum(loss_dict.values())
            assert torch.isfinite(losses)
            storage.put_scalars(total_loss=losses.item())
            optimizer.zero_grad()
            losses.backward()
            optimizer.step()
            scheduler.step()
            periodic.step(iteration)
    fresh = build_model(cfg)
    start = DetectionCheckpointer(fresh, cfg.OUTPUT_DIR).resume_or_load("", resume=True)
    assert start["iteration"] == ITERATIONS - 1
    for name, value in fresh.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_checkpoint_of_our_trainer_under_detectron2(tmp_path):
    cfg = plain_cfg("SparseRCNN", tmp_path, "SOLVER.EPOCHS", 0.0, "TEST.REPORT", False)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    cfg.MODEL.WEIGHTS = str(tmp_path / "model_final.pth")
    found = DefaultPredictor(cfg)(image())["instances"]
    with torch.no_grad():
        rgb = torch.tensor(image()[:, :, ::-1].copy()).permute(2, 0, 1)
        (ours,) = trainer.model.eval()([{"image": rgb, "height": 64, "width": 80}])
    assert same_detections(found, ours["instances"])

    class OurOptimizer(DefaultTrainer):
        @classmethod
        def build_optimizer(cls, cfg, model):
            return build_optimizer(cfg, model)

    resumed = OurOptimizer(plain_cfg("SparseRCNN", tmp_path, "SOLVER.MAX_ITER", ITERATIONS + MORE))
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == ITERATIONS
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, trainer.model.state_dict()[name]), name
    resumed.train()


def test_checkpoint_of_default_trainer_under_ours(tmp_path):
    options = ("SOLVER.EPOCHS", 0.0, "TEST.REPORT", False)
    plain = DefaultTrainer(plain_cfg("SparseRCNN", tmp_path, *options))
    plain.train()
    cfg = plain_cfg("SparseRCNN", tmp_path / "ours", *options)
    cfg.MODEL.WEIGHTS = str(tmp_path / "model_final.pth")
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    model = build_model(cfg)
    load_weights(model, cfg.MODEL.WEIGHTS)
    for name, value in plain.model.state_dict().items():
        assert torch.equal(trainer.model.state_dict()[name], value), name
        assert torch.equal(model.state_dict()[name], value), name
    (tmp_path / "config.yaml").write_text(cfg.dump())
    assert len(Detector.from_pretrained(str(tmp_path)).predict(image(), threshold=0.0))


def test_resume_what_default_trainer_left(tmp_path, caplog):
    """Detectron2's main keeps the optimizer in a checkpoint, v0.5 does not."""

    class OurOptimizer(DefaultTrainer):
        @classmethod
        def build_optimizer(cls, cfg, model):
            return build_optimizer(cfg, model)

    options = ("SOLVER.EPOCHS", 0.0, "TEST.REPORT", False)
    plain = OurOptimizer(plain_cfg("SparseRCNN", tmp_path, *options))
    plain.train()
    more = ("SOLVER.MAX_ITER", ITERATIONS + MORE)
    trainer = Trainer(plain_cfg("SparseRCNN", tmp_path, *options, *more))
    if "_trainer" not in plain.state_dict():
        with pytest.raises(ValueError, match="has no state of the optimizer"):
            trainer.resume_or_load(resume=True)
        state = torch.load(tmp_path / "model_final.pth", weights_only=True)
        inner = {"iteration": ITERATIONS - 1, "optimizer": plain.optimizer.state_dict()}
        state["trainer"]["_trainer"] = inner
        torch.save(state, tmp_path / "model_final.pth")
        trainer = Trainer(plain_cfg("SparseRCNN", tmp_path, *options, *more))
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == ITERATIONS
    moments = [state["exp_avg"] for state in trainer.optimizer.state.values()]
    assert moments and any(moment.any() for moment in moments)
    trainer.train()


def test_atomic_checkpointer_in_default_trainer(tmp_path):
    class WithAtomicCheckpoints(DefaultTrainer):
        def build_hooks(self):
            self.checkpointer = AtomicCheckpointer(
                self.model, self.cfg.OUTPUT_DIR, **self.checkpointer.checkpointables
            )
            return super().build_hooks()

    cfg = plain_cfg("SparseRCNN", tmp_path, "SOLVER.CHECKPOINT_PERIOD", 5)
    trainer = WithAtomicCheckpoints(cfg)
    trainer.train()
    assert torch.load(tmp_path / "model_0000004.pth", weights_only=True)["iteration"] == 4
    resumed = WithAtomicCheckpoints(plain_cfg("SparseRCNN", tmp_path))
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == ITERATIONS


# Nothing of a model's behavior depends on our trainer.


def test_dynamic_proposals_anneal_under_default_trainer(tmp_path):
    share = ("MODEL.PROPOSAL_GENERATOR.DPG.TAU_SHARE", 0.5)
    trainer = DefaultTrainer(plain_cfg("DynamicSparseRCNN", tmp_path, *share))
    generator, seen = trainer.model.proposal_generator, []
    generator.register_forward_hook(lambda *_: seen.append(float(generator.temperature)))
    trainer.train()
    expected = [max(30 - 29 * step / 6, 1) for step in range(ITERATIONS)]
    assert seen == pytest.approx(expected)


def test_anchors_warm_up_under_default_trainer(tmp_path):
    trainer = DefaultTrainer(plain_cfg("ASAG", tmp_path, "MODEL.ASAG.GT_WARMUP_ITERS", 3))
    generator, probing = trainer.model.proposal_generator, []
    generator.generator.register_forward_pre_hook(
        lambda module, args: probing.append(bool(args[3]))
    )
    trainer.train()
    assert probing == [False] * 3 + [True] * (ITERATIONS - 3)


def test_hooks_and_weight_average_under_default_trainer(tmp_path):
    iterations = 22  # Detectron2's writers write every 20
    trainer = DefaultTrainer(plain_cfg("SparseRCNN", tmp_path, "SOLVER.MAX_ITER", iterations))
    bar, average = TrainingProgress(), WeightAverage(trainer.model, decay=0.5)
    average.follow(trainer.optimizer)
    trainer.register_hooks([bar, Curves(eval_period=10, log_period=10)])
    trainer.train()
    assert (tmp_path / "curves.png").stat().st_size
    assert bar._bar.n == iterations and "loss" in bar._bar.postfix
    assert average.updates == iterations
    latest = copy.deepcopy(trainer.model.state_dict())
    with average.applied():
        changed = trainer.model.state_dict()
        assert any(not torch.equal(changed[name], value) for name, value in latest.items())
