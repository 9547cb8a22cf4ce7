"""The explaining figure: its numbers follow from the model, and it is drawn."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from PIL import Image

from asag import load_config

ROOT = Path(__file__).resolve().parents[2]
TINY = str(ROOT / "configs/IoUEnhancedSparseRCNN/iou_sparse_rcnn_tiny.yaml")
OPTIONS = ["MODEL.DEVICE", "cpu", "MODEL.PROPOSAL_GENERATOR.NUM_QUERIES", "9"]
PLAIN = ["MODEL.META_ARCHITECTURE", "SparseDetector"]


@pytest.fixture(scope="module")
def figure() -> Iterator[ModuleType]:
    path = ROOT / "projects/IoUEnhancedSparseRCNN/explain_figure.py"
    spec = importlib.util.spec_from_file_location("explain_figure", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def model_with(*options: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = build_model(load_config(TINY, [*OPTIONS, *options])).eval()
    with torch.no_grad():  # four boxes in one corner, five in the opposite one
        boxes = model.proposal_generator.boxes_cxcywh
        boxes.copy_(torch.tensor([0.2, 0.2, 0.3, 0.3]).expand(9, 4))
        boxes[4:, :2] = 0.8
    return model


def test_numbers_follow_from_the_model(figure: ModuleType) -> None:
    model, image = model_with(), torch.rand(3, 64, 96) * 255
    seen = figure.explain(model, image, stage=0, query=2)
    assert torch.equal(seen.overlap > 0, torch.arange(9) < 4)
    for weights in (seen.plain, seen.enhanced):
        assert float(weights.sum()) == pytest.approx(1, abs=1e-5)
    assert seen.enhanced[4:].sum() == 0
    assert seen.wasted == pytest.approx(float(seen.plain[4:].sum()))
    # Equal boxes leave the ratios of the scores: per head, hence near for the mean of the heads.
    assert (seen.enhanced[:4] > seen.plain[:4]).all()
    assert set(seen.masks) == {"cls", "reg"}
    channels = model.roi_heads.stages[0].class_logits.in_features
    assert seen.masks["cls"].shape == (channels,) and seen.strength["reg"].shape == (7, 7)
    assert not model.roi_heads.stages[0].attention._forward_hooks


def test_picture_of_a_model_without_masks(figure: ModuleType) -> None:
    model = model_with(*PLAIN, "MODEL.DECODER.DCW", "False")
    seen = figure.explain(model, torch.rand(3, 64, 96) * 255)
    assert seen.masks == {}
    assert len(figure.draw(seen, np.zeros((64, 96, 3), dtype=np.uint8)).axes) == 2


@pytest.mark.parametrize(
    ("changes", "message"), [({"stage": 7}, "no stage 7"), ({"query": 9}, "no query 9")]
)
def test_wrong_indices_are_named(figure: ModuleType, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        figure.explain(model_with(), torch.rand(3, 64, 96), **changes)


def test_command_line_writes_a_picture(
    figure: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    picture, output = tmp_path / "in.png", tmp_path / "out.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8)).save(picture)
    arguments = ["--config", TINY, "--image", str(picture), "--output", str(output)]
    assert figure.main([*arguments, *OPTIONS]) == 0
    assert min(Image.open(output).size) > 500
    assert figure.main([*arguments, *OPTIONS, *PLAIN, "MODEL.DECODER.SELF_ATTENTION", "msa"]) == 1
    assert "SELF_ATTENTION 'iou_esa'" in capsys.readouterr().err
    arguments[3] = "no.png"
    assert figure.main([*arguments, *OPTIONS]) == 1
    assert "no.png" in capsys.readouterr().err
