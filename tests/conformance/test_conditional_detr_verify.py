"""The reference tensors through `tools/verify.py`, and backbones against torchvision's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision
import verify
from detectron2.layers import ShapeSpec

from asag import get_asag_cfg
from asag.checkpoint.mapping import NameTable
from asag.checkpoint.resnet import torchvision_rules
from asag.modeling.backbone import build_dc5_resnet_backbone


def test_every_reference_case_agrees(golden_dir: Path, capsys: pytest.CaptureFixture) -> None:
    status = verify.main([str(golden_dir / "conditional_detr"), "--quiet"])
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert "8 cases" in printed


@pytest.mark.parametrize(
    ("name", "key", "where"),
    [
        ("cond_tiny32", "transformer.decoder.layers.1.ca_kpos_proj.weight", "stage1.attention"),
        ("detr_tiny32_prenorm", "transformer.encoder.norm.bias", "memory"),
        ("cond_slim_resnet50", "backbone.0.body.layer4.0.conv2.weight", "feature"),
    ],
)
def test_a_wrong_weight_is_noticed(
    golden_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    name: str,
    key: str,
    where: str,
) -> None:
    case = torch.load(golden_dir / "conditional_detr" / f"{name}.pt", weights_only=True)
    case["state_dict"][key] *= 1.05
    (tmp_path / "conditional_detr").mkdir()
    torch.save(case, tmp_path / "conditional_detr" / "changed.pt")
    assert verify.main([str(tmp_path), "--quiet"]) == 1
    assert f"changed  {where}" in capsys.readouterr().out


def test_a_file_of_another_kind_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "conditional_detr").mkdir()
    torch.save({"something": torch.zeros(1)}, tmp_path / "conditional_detr" / "else.pt")
    assert verify.main([str(tmp_path), "--quiet"]) == 1
    assert "UNKNOWN CASE" in capsys.readouterr().out


@pytest.mark.parametrize(("depth", "dilated"), [(50, False), (50, True), (101, True)])
def test_backbones_are_torchvisions(depth: int, dilated: bool) -> None:
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, f"resnet{depth}")(
        replace_stride_with_dilation=[False, False, dilated]
    ).eval()
    cfg = get_asag_cfg()
    cfg.MODEL.RESNETS.DEPTH = depth
    cfg.MODEL.RESNETS.RES5_DILATION = 1 + dilated
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res5"]
    ours = build_dc5_resnet_backbone(cfg, ShapeSpec(channels=3)).eval()
    state = {
        name: value
        for name, value in theirs.state_dict().items()
        if not name.startswith("fc.") and not name.endswith("num_batches_tracked")
    }
    table = NameTable(source="torchvision", rules=torchvision_rules("", ""))
    ours.load_state_dict(table.to_ours(state), strict=True)
    x = torch.randn(1, 3, 65, 97)
    with torch.no_grad():
        for name, module in theirs.named_children():
            if name == "avgpool":
                break
            x = module(x) if name != "conv1" else module(first := x)
        actual = ours(first)["res5"]
    assert torch.allclose(actual, x, rtol=1e-3, atol=1e-3 * float(x.abs().max()))
