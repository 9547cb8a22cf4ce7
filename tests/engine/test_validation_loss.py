"""Validation losses: the right numbers, and no trace of having looked."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog
from engine_support import losses, register_tiny_shapes, tiny_cfg

from asag import load_config
from asag.data import SparseDetectionMapper
from asag.engine import Trainer
from asag.engine.rng import rng_state
from asag.engine.validation import validation_losses

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
VAL = {"DATASETS__TEST": "('engine_shapes_val',)"}
DROPOUT = {
    "MODEL__DECODER__DROPOUT": 0.5,
    "MODEL__SLIM_RESNET__NORM": "BN",
    "MODEL__SLIM_RESNET__WIDTH": 8,
}


def setting(folder, seed: int = 3, **changes):
    """A configuration, and a model whose norms have other statistics than they started with."""
    register_tiny_shapes()
    cfg = tiny_cfg(folder, **VAL | DROPOUT | changes)
    torch.manual_seed(seed)
    model = Trainer.build_model(cfg)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    return cfg, model.train()


def samples(cfg) -> list[dict]:
    mapper = SparseDetectionMapper.without_augmentation(cfg)
    return [mapper(x) for x in DatasetCatalog.get("engine_shapes_val")]


def reference(cfg, model) -> dict[str, float]:
    """All images in one batch, through a copy without dropout and with frozen statistics."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
        elif isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    found = {name: value.item() for name, value in model(samples(cfg)).items()}
    return found | {"total_loss": sum(found.values())}


@pytest.mark.parametrize("batch", [1, 4, 6])
def test_equals_one_batch_of_all_images_whatever_the_batch_size(tmp_path, batch):
    cfg, model = setting(tmp_path, SOLVER__IMS_PER_BATCH=batch)
    found, expected = validation_losses(cfg, model), reference(cfg, model)
    assert found.keys() == expected.keys() and "loss_giou_0" in found
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-4), name


def test_images_without_objects_count_as_background(tmp_path):
    cfg, model = setting(tmp_path, SOLVER__IMS_PER_BATCH=1)
    dicts = [copy.deepcopy(x) for x in DatasetCatalog.get("engine_shapes_val")]
    without = validation_losses(cfg, model, dicts[1:])
    dicts[0]["annotations"] = []
    found = validation_losses(cfg, model, dicts)
    assert found["loss_ce"] > without["loss_ce"]
    assert found["loss_giou"] == pytest.approx(without["loss_giou"], rel=1e-5)
    with pytest.raises(ValueError, match="no images"):
        validation_losses(cfg, model, [])


TINY = [
    "SparseRCNN/sparse_rcnn_tiny.yaml",
    "DynamicSparseRCNN/dynamic_sparse_rcnn_tiny.yaml",
    "ConditionalDETR/conditional_detr_tiny.yaml",
    "ASAG/asag_tiny.yaml",
]


@pytest.mark.parametrize("name", TINY)
def test_leaves_no_trace(tmp_path, name):
    """Counters, annealed temperatures, statistics, modes, gradients, random numbers."""
    register_tiny_shapes()
    options = ["MODEL.DEVICE", "cpu", "MODEL.DECODER.DROPOUT", "0.2"]
    options += ["DATASETS.TEST", "('engine_shapes_val',)", "DATALOADER.NUM_WORKERS", "0"]
    options += ["INPUT.MIN_SIZE_TEST", "64", "SOLVER.IMS_PER_BATCH", "2"]
    cfg = load_config(str(CONFIGS / name), options)
    model = Trainer.build_model(cfg).train()
    model.backbone.eval()  # modes are put back one by one
    sum(model(samples(cfg)[:2]).values()).backward()
    state = {k: v.clone() for k, v in (*model.named_parameters(), *model.named_buffers())}
    gradients = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    modes = [module.training for module in model.modules()]
    before = rng_state()

    found = validation_losses(cfg, model)

    after = dict((*model.named_parameters(), *model.named_buffers()))
    assert all(torch.equal(after[k], v) for k, v in state.items())
    assert all(torch.equal(dict(model.named_parameters())[k].grad, g) for k, g in gradients.items())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(rng_state()["torch"], before["torch"])
    assert rng_state()["python"] == before["python"]
    assert validation_losses(cfg, model) == found, "the same weights, the same losses"
    names = set(Trainer.build_model(cfg)(samples(cfg)[:2]))
    assert set(found) == names | {"total_loss"}, "every loss of the training has its counterpart"


def test_an_error_puts_everything_back(tmp_path):
    cfg, model = setting(tmp_path, MODEL__ROI_HEADS__NUM_CLASSES=1)
    modes = [module.training for module in model.modules()]
    with pytest.raises(ValueError, match="has the label 1"):
        validation_losses(cfg, model)
    assert [module.training for module in model.modules()] == modes


def test_training_is_the_same_with_and_without(tmp_path):
    register_tiny_shapes()
    runs = {}
    for measured in (False, True):
        changes = VAL | DROPOUT | {"TEST__LOSS": measured, "TEST__EVAL_PERIOD": 2}
        torch.manual_seed(0)
        run = Trainer(tiny_cfg(tmp_path / str(measured), **changes))
        run.train()
        runs[measured] = losses(run)
    assert runs[True] == runs[False]
    lines = (tmp_path / "True/metrics.json").read_text().splitlines()
    written = [json.loads(line) for line in lines]
    assert "val_loss/total_loss" in written[-1] and "val_loss/loss_ce" in written[-1]


def test_averaged_weights_are_measured(tmp_path):
    register_tiny_shapes()
    changes = {"SOLVER__EMA__ENABLED": True, "SOLVER__MAX_ITER": 3}
    run = Trainer(tiny_cfg(tmp_path, **VAL | DROPOUT | changes))
    run.train()
    raw = validation_losses(run.cfg, run.checkpointer.model)
    with run.ema.applied():
        average = validation_losses(run.cfg, run.checkpointer.model)
    assert run.validate() == average != raw
