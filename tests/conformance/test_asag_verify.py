"""The reference suite of ASAG notices what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import verify


def bump(value: torch.Tensor) -> None:
    """Changes the first row of a tensor by more than any tolerance."""
    value.view(-1)[0] += 0.2 * float(value.abs().max()) + 0.2


def weight(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda case: bump(case["state_dict"][name])


def inner(*keys: Any) -> Callable[[dict[str, Any]], None]:
    """Changes what lies below the first case."""

    def change(case: dict[str, Any]) -> None:
        value = next(iter(case["cases"].values()))
        for key in keys[:-1]:
            value = value[key]
        if isinstance(value[keys[-1]], torch.Tensor) and value[keys[-1]].dtype != torch.bool:
            value[keys[-1]] = value[keys[-1]].clone()
            bump(value[keys[-1]].view(-1)) if value[keys[-1]].is_floating_point() else value[
                keys[-1]
            ].view(-1)[:1].add_(1)
        elif isinstance(value[keys[-1]], torch.Tensor):
            value[keys[-1]] = ~value[keys[-1]]
        else:
            value[keys[-1]] += 1

    return change


CHANGES: dict[str, list[Callable[[dict[str, Any]], None]]] = {
    "anchor_generator": [
        weight("compress.2.0.weight"),
        weight("layernorm.1.bias"),
        weight("proj_patch.layers.1.weight"),
    ],
    "proposal_head": [
        weight("iof_tau"),
        weight("tokens_norm3.bias"),
        weight("fc_reg.bias"),
        weight("roi.weight"),
    ],
    "decoder_a": [
        weight("decoder_embedding.weight"),
        weight("bbox_head.1.iof_tau"),
        weight("bbox_head.0.sampling_n_mixing.sampling_offset_generator.0.bias"),
    ],
    "decoder_s": [
        weight("head_series.1.inst_interact.norm2.bias"),
        weight("head_series.0.bboxes_delta.bias"),
    ],
    "decoder_d": [
        weight("layer.cross_attn.sampling_offsets.bias"),
        weight("layer.norm1.bias"),
        weight("bbox_embed.layers.2.bias"),
    ],
    "end_to_end_s": [weight("neck.layer_blocks.1.0.bias"), weight("rpn.tokens_norm1.bias")],
    "losses": [
        inner("expected_true_flip", "losses_unweighted", "loss_ce_rpn"),
        inner("expected_released_flip", "grads", "anchor_P4"),
        inner("expected_true_flip", "matching", "anchor_p5", 0, "pred"),
        inner("expected_true_flip", "losses_unweighted", "loss_giou_anchor"),
    ],
    "denoising": [
        inner("expected", "attn_mask_per_image"),
        inner("expected", "all_boxes_cxcywh_px"),
    ],
    "training_patches": [inner("expected", "crop_pos_xy"), inner("expected", "forward_anchors")],
    "query_weighting": [lambda case: bump(case["w_neg"])],
    "patch_targets": [lambda case: bump(case["expected"]["p5"][0]["boxes"])],
}


@pytest.mark.parametrize(
    ("file", "number"),
    [(file, i) for file, changes in CHANGES.items() for i in range(len(changes))],
)
def test_changes_are_caught(
    file: str, number: int, golden_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    case = torch.load(golden_dir / "asag" / f"{file}.pt", weights_only=True)
    CHANGES[file][number](case)
    folder = tmp_path / "asag"
    folder.mkdir()
    torch.save(case, folder / "case.pt")
    assert verify.main([str(folder), "--quiet"]) == 1
    assert "FAIL" in capsys.readouterr().out


def test_unknown_cases_are_complained_about(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "asag"
    folder.mkdir()
    torch.save({"something": torch.zeros(1)}, folder / "case.pt")
    assert verify.main([str(folder)]) == 1
    assert "UNKNOWN CASE" in capsys.readouterr().out
