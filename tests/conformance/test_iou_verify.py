"""The reference suite of IoU-enhanced Sparse R-CNN notices what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import verify

NAMES = {
    "tiny_s2_onecls": [
        "head.head_series.0.self_attn.proj_qkv.weight",
        "head.head_series.0.inst_interact.proj_cls1.weight",
        "head.head_series.0.inst_interact.norm3_reg.bias",
        "head.head_series.1.norm2_cls.weight",
        "head.head_series.1.linear2_reg.weight",
    ],
    "iou_esa": ["proj_qkv.bias", "out_proj.weight"],
    "dcw_dynamic_conv": ["proj_reg2.bias", "norm4_cls.bias"],
}


@pytest.mark.parametrize(("file", "key"), [(file, key) for file in NAMES for key in NAMES[file]])
def test_perturbed_weight_is_caught(
    file: str, key: str, golden_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    case = torch.load(golden_dir / "iou_sparse_rcnn" / f"{file}.pt", weights_only=True)
    weight = case["weights"][key]
    weight[0] += 0.2 * weight.abs().max() + 0.2
    folder = tmp_path / "iou_sparse_rcnn"
    folder.mkdir()
    torch.save(case, folder / "case.pt")
    assert verify.main([str(folder), "--quiet"]) == 1
    assert "FAIL" in capsys.readouterr().out


def test_missing_weight_is_caught(
    golden_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    case = torch.load(golden_dir / "iou_sparse_rcnn" / "iou_esa.pt", weights_only=True)
    del case["weights"]["out_proj.bias"]
    folder = tmp_path / "iou_sparse_rcnn"
    folder.mkdir()
    torch.save(case, folder / "case.pt")
    assert verify.main([str(folder), "--quiet"]) == 1
    assert "out_proj.bias" in capsys.readouterr().out
