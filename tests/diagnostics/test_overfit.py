"""The overfit check passes sound detectors and names the failing component of others."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog
from engine_support import CONFIG, register_tiny_shapes, tiny_cfg, tiny_options

from asag import load_config
from asag.diagnostics.overfit import (
    OverfitResult,
    check_overfit,
    choose_images,
    overfit_config,
    overfit_samples,
)
from asag.diagnostics.overfit_findings import data_findings, model_findings
from asag.engine import Trainer
from train_net import main

ASAG = CONFIG.parents[1] / "ASAG/asag_tiny.yaml"
STEPS = 240
LEARNABLE = {
    "SOLVER__BASE_LR": 0.004,
    "MODEL__PROPOSAL_GENERATOR__BOX_INIT": "grid",
    "MODEL__PROPOSAL_GENERATOR__NUM_QUERIES": 9,
    "MODEL__FPN__OUT_CHANNELS": 32,
    "MODEL__DECODER__HIDDEN_DIM": 32,
    "MODEL__DECODER__FFN_DIM": 64,
    "MODEL__DECODER__DYNAMIC_DIM": 8,
    "SOLVER__IMS_PER_BATCH": 3,
}


def setting(tmp_path, **changes):
    register_tiny_shapes()
    torch.manual_seed(1)
    cfg = overfit_config(tiny_cfg(tmp_path, **LEARNABLE | changes), STEPS)
    model = Trainer.build_model(cfg)
    return cfg, model, overfit_samples(cfg, DatasetCatalog.get("engine_shapes_train"))


def components(result: OverfitResult) -> list[str]:
    return [finding.split(":")[0] for finding in result.findings]


def freeze(model: torch.nn.Module, word: str) -> None:
    """Predictors at zero, whose answer does not depend on anything, and which do not learn."""
    frozen = [p for name, p in model.named_parameters() if f"{word}.weight" in name]
    assert frozen, word
    for parameter in frozen:
        torch.nn.init.zeros_(parameter.requires_grad_(False))


@pytest.mark.parametrize(
    ("word", "component", "start"),
    [("class_logits", "classification", "grid"), ("box_deltas", "box", "image")],
)
def test_frozen_component_is_named(tmp_path, word, component, start):
    cfg, model, samples = setting(tmp_path, MODEL__PROPOSAL_GENERATOR__BOX_INIT=start)
    freeze(model, word)
    if component == "box":  # proposals are boxes that learn, too
        model.proposal_generator.boxes_cxcywh.requires_grad_(False)
    result = check_overfit(cfg, model, samples, steps=60)
    assert not result.passed
    assert components(result)[0] == component
    assert f"\n  {component}: " in result.report() and "FAILED" in result.report()


def test_optimizer_that_does_nothing(tmp_path):
    cfg, model, samples = setting(tmp_path)
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SOLVER.BASE_LR = 0.0
    result = check_overfit(cfg, model, samples, steps=2)
    assert not result.passed and components(result)[0] == "optimizer"
    assert result.first == pytest.approx(result.last)


def test_divergence(tmp_path):
    cfg, model, samples = setting(
        tmp_path,
        SOLVER__OPTIMIZER="SGD",
        SOLVER__BASE_LR=1e30,
        SOLVER__CLIP_GRADIENTS__ENABLED=False,
    )
    result = check_overfit(cfg, model, samples, steps=10)
    assert not result.passed and components(result) == ["optimizer"]
    assert "diverged" in result.findings[0] and result.steps < 10


def test_too_few_queries(tmp_path):
    cfg, model, _ = setting(tmp_path, MODEL__PROPOSAL_GENERATOR__NUM_QUERIES=1)
    full = [x for x in DatasetCatalog.get("engine_shapes_train") if len(x["annotations"]) == 3]
    samples = overfit_samples(cfg, full)
    result = check_overfit(cfg, model, samples, steps=1)
    (matching,) = [x for x in result.findings if x.startswith("matching: ")]
    assert f"{2 * len(samples)} of {3 * len(samples)} objects have no query" in matching


def test_asag_from_an_untrained_model(tmp_path):
    """A generator with losses of its own and as many queries as the image asks for."""
    register_tiny_shapes()
    torch.manual_seed(0)
    options = ["MODEL.DEVICE", "cpu", "INPUT.MIN_SIZE_TEST", "64", "SOLVER.IMS_PER_BATCH", "2"]
    cfg = overfit_config(load_config(str(ASAG), options), 8)
    assert cfg.MODEL.ASAG.GT_WARMUP_ITERS == 2
    model = Trainer.build_model(cfg)
    samples = overfit_samples(cfg, DatasetCatalog.get("engine_shapes_train"))
    findings = model_findings(model, samples)
    assert findings and {x.split(":")[0] for x in findings} <= {"matching", "box", "classification"}


def test_data_that_cannot_be_learned(tmp_path):
    cfg, model, samples = setting(tmp_path)
    assert data_findings(samples) == []
    twin = samples[0] | {"file_name": "twin.png"}
    assert "twin.png shows the same as" in data_findings([samples[0], twin])[0]
    gray = samples[0] | {"image": torch.full_like(samples[0]["image"], 7), "file_name": "gray.png"}
    assert "gray.png is of one color" in data_findings([gray])[0]
    double = copy.deepcopy(samples[0])
    double["instances"] = type(double["instances"]).cat([double["instances"]] * 2)
    assert "the very same box" in data_findings([double])[0]

    empty = [x | {"annotations": []} for x in DatasetCatalog.get("engine_shapes_train")]
    assert overfit_samples(cfg, empty) == []
    result = check_overfit(cfg, model, [], steps=5)
    assert not result.passed and result.steps == 0 and components(result) == ["data"]


def test_choice_of_images():
    def image(*labels: int, crowd: int = 0) -> dict:
        return {"annotations": [{"category_id": k, "iscrowd": crowd} for k in labels]}

    dicts = [image(), image(0, 0), image(0), image(1, 1, 1), image(0), image(2, crowd=1)]
    assert choose_images(dicts, 2) == [2, 3]
    assert choose_images(dicts, 9) == [2, 3, 4, 1]


def test_command_line(tmp_path, monkeypatch, capsys):
    """The real program: exit codes 0 and 1, and nothing left behind."""
    register_tiny_shapes()
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    monkeypatch.chdir(tmp_path)
    for steps, code in ((STEPS, 0), (1, 1)):
        argv = ["--config-file", str(CONFIG), "--overfit-check", "--overfit-steps", str(steps)]
        assert main([*argv, *tiny_options(tmp_path / "out", **LEARNABLE)]) == code
        printed = capsys.readouterr().out
        assert "3 images with" in printed and "learning rate 0.004" in printed
        assert ("overfit check passed" in printed) == (code == 0)
        assert ("overfit check FAILED" in printed) == (code == 1)
    assert not list(scratch.iterdir()) and [x.name for x in Path(tmp_path).iterdir()] == ["scratch"]
