"""Checkpoints in MMDetection's layouts: names, what is ignored, class names, arithmetic."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import verify
from detectron2.modeling import build_model
from torch import Tensor

from asag import load_config
from asag.checkpoint.layouts import LAYOUTS, recognize
from asag.checkpoint.loading import load_weights
from asag.checkpoint.reading import read_checkpoint

ROOT = Path(__file__).resolve().parents[2]
R101 = ["MODEL.RESNETS.DEPTH", "101"]
CONTRACTS = {
    "sparse_rcnn_r50": ("sparse-rcnn", "SparseRCNN/sparse_rcnn_r50_100pro_3x.yaml", []),
    "sparse_rcnn_r101": ("sparse-rcnn", "SparseRCNN/sparse_rcnn_r50_100pro_3x.yaml", R101),
    "conditional_detr_r50": (
        "conditional-detr",
        "ConditionalDETR/conditional_detr_r50_50ep.yaml",
        [],
    ),
    "detr_r50": ("detr", "DETR/detr_r50_500ep.yaml", []),
    "detr_r50_v2": ("detr", "DETR/detr_r50_500ep.yaml", []),
}
BEFORE_2_12 = (
    (".attentions.0.", ".self_attn."),
    (".attentions.1.", ".multihead_attn."),
    (".ffns.0.", ".ffn."),
    (".decoder.post_norm.", ".decoder.norm."),
)
NAMES = ("ring", "disc", "star", "bar", "cross")


def contract(path: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a published file."""
    rows = (x.split("\t") for x in path.read_text().splitlines() if x and not x.startswith("#"))
    return {name: () if s == "-" else tuple(map(int, s.split("x"))) for name, s, _ in rows}


def before_2_12(name: str) -> str:
    """The oldest spelling of a name of 2.12."""
    for new, old in BEFORE_2_12:
        name = name.replace(new, old)
    return name


@pytest.mark.parametrize("case", CONTRACTS)
def test_full_size_files_hold_what_the_models_hold(case: str, golden_dir: Path) -> None:
    """Every key is read, nothing is missing, all shapes fit, and no other layout is meant."""
    layout, config, options = CONTRACTS[case]
    theirs = contract(golden_dir / f"mmdet/{case}_state_dict.txt")
    table = LAYOUTS[f"mmdet-{layout}"]
    assert recognize(theirs) == f"mmdet-{layout}"
    cfg = load_config(str(ROOT / "configs" / config), ["MODEL.DEVICE", "meta", *options])
    with torch.device("meta"):
        state = {name: torch.empty(shape) for name, shape in theirs.items()}
        wanted = {k: v.shape for k, v in build_model(cfg).state_dict().items()}
    ours = {k: v.shape for k, v in table.to_ours(state).items() if "num_batches" not in k}
    assert ours == wanted
    if case == "detr_r50_v2":
        oldest = {before_2_12(name): value for name, value in state.items()}
        assert oldest.keys() != state.keys() and recognize(oldest) == "mmdet-detr"
        assert {k: v.shape for k, v in table.to_ours(oldest).items() if "num_b" not in k} == wanted


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    folder = tmp_path / "mmdet"
    folder.mkdir()
    return folder


def test_true_width_from_weights_made_anew(
    golden_dir: Path, suite: Path, capsys: pytest.CaptureFixture
) -> None:
    source = golden_dir / "mmdet"
    file = suite / "conditional_detr_wide.pth"
    command = [sys.executable, source / "make_full.py", file.stem, "--out", file]
    subprocess.run([str(x) for x in command], check=True, capture_output=True)
    shutil.copy(source / "conditional_detr_wide_ref.pt", suite)
    assert verify.main([str(suite)]) == 0
    assert "1 cases: 22 comparisons ok, 0 failed" in capsys.readouterr().out


def test_the_oldest_names_and_stray_entries_change_nothing(
    golden_dir: Path, suite: Path, capsys: pytest.CaptureFixture
) -> None:
    source = golden_dir / "mmdet"
    loaded = torch.load(source / "detr_tiny_v2.pth", weights_only=True)
    state = {before_2_12(name): value for name, value in loaded["state_dict"].items()}
    state |= {f"data_preprocessor.{x}": torch.ones(3, 1, 1) for x in ("mean", "std")}
    old = {"_use_new_zipfile_serialization": False}
    torch.save({"meta": loaded["meta"], "state_dict": state}, suite / "detr_tiny_v1.pth", **old)
    shutil.copy(source / "detr_tiny_ref.pt", suite)
    assert verify.main([str(suite)]) == 0
    out = capsys.readouterr().out
    assert "detr_tiny_v1.batch.stage_logits" in out and "22 comparisons ok, 0 failed" in out


@pytest.mark.parametrize(
    "key",
    [
        "rpn_head.init_proposal_bboxes.weight",
        "roi_head.bbox_head.1.instance_interactive_conv.norm_out.bias",
        "roi_head.bbox_head.2.fc_reg.bias",
    ],
)
def test_a_changed_weight_is_noticed(
    key: str, golden_dir: Path, suite: Path, capsys: pytest.CaptureFixture
) -> None:
    source = golden_dir / "mmdet"
    loaded = torch.load(source / "sparse_rcnn_tiny.pth", weights_only=True)
    loaded["state_dict"][key].view(-1)[0] += 0.2
    torch.save(loaded, suite / "sparse_rcnn_tiny.pth")
    shutil.copy(source / "sparse_rcnn_tiny_ref.pt", suite)
    assert verify.main([str(suite), "--quiet"]) == 1
    assert "stage_boxes" in capsys.readouterr().out


def test_a_case_without_weights_is_left_out_and_proves_nothing(
    golden_dir: Path, suite: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copy(golden_dir / "mmdet/detr_tiny_ref.pt", suite)
    assert verify.main([str(suite)]) == 1
    assert "LEFT OUT: there is no detr_tiny.pth beside it" in capsys.readouterr().out


def theirs(layout: str, config: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Random weights of a small model, under this library's names and under MMDetection's."""
    torch.manual_seed(0)
    model = build_model(load_config(str(ROOT / "configs" / config), ["MODEL.DEVICE", "cpu"]))
    ours = {
        k: torch.randn_like(v) if v.is_floating_point() else v
        for k, v in model.state_dict().items()
    }
    return ours, LAYOUTS[layout].to_theirs(ours)


@pytest.mark.parametrize(
    "meta",
    [
        {"CLASSES": NAMES},
        {"dataset_meta": {"CLASSES": NAMES, "PALETTE": [(1, 2, 3)]}},
        {"dataset_meta": {"classes": list(NAMES)}},
    ],
    ids=["2.x", "3.0.0rc2", "3.x"],
)
def test_class_names_of_every_version_are_read(meta: dict, tmp_path: Path) -> None:
    _, state = theirs("mmdet-detr", "DETR/detr_tiny.yaml")
    file = tmp_path / "x.pth"
    torch.save({"meta": meta, "state_dict": state}, file, _use_new_zipfile_serialization=False)
    assert read_checkpoint(file)["class_names"] == list(NAMES)


@pytest.mark.parametrize("meta", [{}, "text", {"CLASSES": None}, {"CLASSES": [1, 2]}])
def test_files_need_not_name_their_classes(meta: object, tmp_path: Path) -> None:
    torch.save({"meta": meta, "state_dict": {"x": torch.ones(1)}}, tmp_path / "x.pth")
    assert "class_names" not in read_checkpoint(tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("layout", "config"),
    [
        ("mmdet-sparse-rcnn", "SparseRCNN/sparse_rcnn_tiny.yaml"),
        ("mmdet-detr", "DETR/detr_tiny.yaml"),
        ("mmdet-conditional-detr", "ConditionalDETR/conditional_detr_tiny.yaml"),
        ("detrex-detr", "DETR/detr_tiny.yaml"),
        ("detrex-conditional-detr", "ConditionalDETR/conditional_detr_tiny.yaml"),
    ],
)
def test_files_load_whole_with_what_stands_beside(
    layout: str, config: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ours, state = theirs(layout, config)
    state |= {"data_preprocessor.mean": torch.ones(3, 1, 1)} if "mmdet" in layout else {}
    state |= {"criterion.empty_weight": torch.ones(81)} if "detrex" in layout else {}
    torch.save({"meta": {"epoch": 3}, "state_dict": state}, tmp_path / "x.pth")
    model = build_model(load_config(str(ROOT / "configs" / config), ["MODEL.DEVICE", "cpu"]))
    with caplog.at_level("INFO"):
        load_weights(model, str(tmp_path / "x.pth"))
    assert "nothing fresh, nothing left out" in caplog.text
    assert all(torch.equal(v, ours[k]) for k, v in model.state_dict().items())
