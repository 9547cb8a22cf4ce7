"""Weights bring the arithmetic of their source along: into models, runs and other files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import convert_checkpoint
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from engine_support import register_tiny_shapes, tiny_cfg
from torch import nn

from asag import load_config
from asag.checkpoint.layouts import LAYOUTS, OURS
from asag.checkpoint.loading import PublishedCheckpointer, load_weights
from asag.checkpoint.reading import read_checkpoint
from asag.checkpoint.settings import model_settings
from asag.engine import Trainer
from asag.export.detector import ExportableDetector

TINY = str(Path(__file__).resolve().parents[2] / "configs/SparseRCNN/sparse_rcnn_tiny.yaml")
MIN_SCALE, MAX_SCALE = "MODEL.DECODER.MIN_BOX_SCALE", "MODEL.DECODER.MAX_BOX_SCALE"
CLIP = "MODEL.CLIP_BOXES"
THEIRS = {MIN_SCALE: 0.016, MAX_SCALE: 62.5, CLIP: False}
DEFAULTS = {MIN_SCALE: 0.0, MAX_SCALE: 6250.0, CLIP: True}
WORDS = [str(word) for pair in THEIRS.items() for word in pair]


def tiny(*options: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build_model(load_config(TINY, ["MODEL.DEVICE", "cpu", *options])).eval()


def publish(model: nn.Module, layout: str, file: Path) -> Path:
    torch.save({"state_dict": LAYOUTS[layout].to_theirs(model.state_dict())}, file)
    return file


def values(cfg: CfgNode) -> dict[str, Any]:
    decoder = cfg.MODEL.DECODER
    found = (decoder.MIN_BOX_SCALE, decoder.MAX_BOX_SCALE, cfg.MODEL.CLIP_BOXES)
    return dict(zip((MIN_SCALE, MAX_SCALE, CLIP), found, strict=True))


@pytest.fixture
def mmdet(tmp_path: Path) -> Path:
    return publish(tiny(), "mmdet-sparse-rcnn", tmp_path / "mmdet.pth")


def test_the_loader_sets_what_the_configuration_does_not(
    mmdet: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny()
    assert model_settings(model) == DEFAULTS
    load_weights(model, str(mmdet))
    assert model_settings(model) == THEIRS
    assert "MODEL.DECODER.MAX_BOX_SCALE 62.5 (was 6250.0)" in caplog.text
    assert {x.max_box_scale for x in model.roi_heads.stages} == {62.5}
    caplog.clear()
    configured = tiny(*WORDS)
    assert model_settings(configured) == THEIRS
    load_weights(configured, str(mmdet))
    assert "other values" not in caplog.text
    load_weights(configured, str(publish(tiny(), "authors-sparse-rcnn", tmp_path / "a.pth")))
    assert model_settings(configured) == DEFAULTS


def test_own_weights_leave_the_choice_to_the_configuration(tmp_path: Path) -> None:
    torch.save({"model": tiny().state_dict()}, tmp_path / "own.pth")
    model = tiny(*WORDS)
    load_weights(model, str(tmp_path / "own.pth"))
    assert model_settings(model) == THEIRS


@pytest.mark.parametrize("entry", ["text", None, {"MODEL.CLIP_BOXES": "no", "OTHER": 1}])
def test_entries_of_others_by_the_same_name_are_passed_over(entry: object, tmp_path: Path) -> None:
    torch.save({"model": tiny().state_dict(), "settings": entry}, tmp_path / "x.pth")
    model = tiny()
    load_weights(model, str(tmp_path / "x.pth"))
    assert model_settings(model) == DEFAULTS


@pytest.mark.parametrize("head", [[], ["rpn_head.rpn_conv.weight", "roi_head.bbox_head.fc.bias"]])
def test_a_backbone_of_another_detector_changes_nothing(head: list[str], tmp_path: Path) -> None:
    state = {k: v for k, v in tiny().state_dict().items() if k.startswith("backbone.")}
    state = LAYOUTS["mmdet-sparse-rcnn"].to_theirs(state) | {k: torch.ones(1) for k in head}
    torch.save({"state_dict": state}, tmp_path / "x.pth")
    model = tiny()
    PublishedCheckpointer(model).load(str(tmp_path / "x.pth"))
    assert model_settings(model) == DEFAULTS


class TestDetections:
    """Detections of boxes that the last stage would stretch by more than allowed."""

    @pytest.fixture
    def wild(self) -> nn.Module:
        model = tiny()
        for stage in model.roi_heads.stages:
            nn.init.zeros_(stage.box_deltas.weight)
            stage.box_deltas.bias.data = torch.tensor([0.0, 0.0, 6.0, 6.0])
        return model

    @torch.no_grad()
    def test_sizes_are_bounded_and_boxes_leave_the_image(self, wild: nn.Module) -> None:
        image = {"image": torch.zeros(3, 128, 160, dtype=torch.uint8), "height": 64, "width": 80}
        clipped = wild([image])[0]["instances"].pred_boxes.tensor
        assert clipped.amin() >= 0 and clipped[:, 2].max() == 80 and clipped[:, 3].max() == 64
        wild.clip_boxes = False
        free = wild([image])[0]["instances"].pred_boxes.tensor
        assert len(free) == len(clipped) and free.amin() < -1000
        largest = free[:, 2:] - free[:, :2]
        for stage in wild.roi_heads.stages:
            stage.max_box_scale = 62.5
        bounded = wild([image])[0]["instances"].pred_boxes.tensor
        ratio = largest / (bounded[:, 2:] - bounded[:, :2])
        expected = (torch.tensor(6.0).exp() / 62.5) ** len(wild.roi_heads.stages)
        assert torch.allclose(ratio, expected.expand_as(ratio), rtol=1e-3)

    @torch.no_grad()
    def test_an_exported_detector_does_the_same(self, wild: nn.Module) -> None:
        images = torch.zeros(1, 3, 128, 160)
        for clip in (True, False):
            wild.clip_boxes = clip
            (found,) = wild([{"image": images[0].byte()}])
            boxes, _, _, valid = ExportableDetector(wild, (128, 160))(images)
            assert torch.allclose(boxes[valid], found["instances"].pred_boxes.tensor, rtol=1e-4)


class TestRuns:
    def trainer(self, folder: Path, weights: str | Path, *, resume: bool = False) -> Trainer:
        register_tiny_shapes()
        trainer = Trainer(tiny_cfg(folder, MODEL__WEIGHTS=weights, SOLVER__MAX_ITER=2))
        trainer.resume_or_load(resume=resume)
        return trainer

    @pytest.fixture
    def weights(self, tmp_path: Path) -> Path:
        model = build_model(tiny_cfg(tmp_path))
        return publish(model, "mmdet-sparse-rcnn", tmp_path / "mmdet.pth")

    def test_a_run_keeps_the_arithmetic_of_its_start(
        self, weights: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        trainer = self.trainer(tmp_path / "run", weights)
        assert values(trainer.cfg) == THEIRS
        assert values(CfgNode.load_cfg(trainer._trainer.guard.config)) == THEIRS
        trainer.train()
        final = tmp_path / "run/model_final.pth"
        assert torch.load(final, weights_only=True)["settings"] == THEIRS
        other = build_model(tiny_cfg(tmp_path))
        load_weights(other, str(final))
        assert model_settings(other) == THEIRS
        caplog.clear()
        weights.unlink()  # the checkpoint of the run is enough
        resumed = self.trainer(tmp_path / "run", weights, resume=True)
        assert values(resumed.cfg) == THEIRS == model_settings(resumed.model)
        assert "changed since the checkpoint" not in caplog.text

    def test_a_run_from_the_start_says_nothing_of_it(self, tmp_path: Path) -> None:
        trainer = self.trainer(tmp_path / "run", "")
        trainer.save_weights("x")
        assert "settings" not in torch.load(tmp_path / "run/x.pth", weights_only=True)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_converted_weights_keep_it(mmdet: Path, suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"ours{suffix}"
    assert convert_checkpoint.main([str(mmdet), str(file), "--to", OURS]) == 0
    assert read_checkpoint(file)["settings"] == THEIRS
    model = tiny(seed=1)
    load_weights(model, str(file))
    assert model_settings(model) == THEIRS


def test_layouts_without_a_place_for_it_are_noted(
    mmdet: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    target = tmp_path / "authors.pth"
    arguments = [str(mmdet), str(target), "--to", "authors-sparse-rcnn"]
    assert convert_checkpoint.main(arguments) == 0
    said = capsys.readouterr().out
    assert "these weights need MODEL.DECODER.MIN_BOX_SCALE 0.016" in said
    assert "the Sparse R-CNN release computes otherwise" in said
    assert "settings" not in torch.load(target, weights_only=True)
    assert convert_checkpoint.main([str(target), str(tmp_path / "b.pth"), "--to", OURS]) == 0
    assert "need" not in capsys.readouterr().out
