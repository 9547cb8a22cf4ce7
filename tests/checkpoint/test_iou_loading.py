"""Published weights load through the checkpointer, whoever named them."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from torch import nn

from asag import load_config
from asag.checkpoint import IOU_SPARSE_RCNN, SPARSE_RCNN
from asag.checkpoint.loading import PublishedCheckpointer, to_library_names
from asag.checkpoint.swin import SWIN_IMAGENET

ROOT = Path(__file__).resolve().parents[2]
CASES = {
    "SparseRCNN/sparse_rcnn_tiny.yaml": SPARSE_RCNN,
    "IoUEnhancedSparseRCNN/iou_sparse_rcnn_tiny.yaml": IOU_SPARSE_RCNN,
}


def tiny(name: str, seed: int, *options: str) -> nn.Module:
    torch.manual_seed(seed)
    return build_model(load_config(str(ROOT / "configs" / name), ["MODEL.DEVICE", "cpu", *options]))


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("name", CASES)
def test_authors_checkpoint_loads_completely(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, target = tiny(name, 1), tiny(name, 2)
    path = tmp_path / "released.pth"
    torch.save({"model": CASES[name].to_theirs(source.state_dict())}, path)
    assert not equal(source.state_dict(), target.state_dict())
    with caplog.at_level(logging.WARNING):
        PublishedCheckpointer(target).load(str(path))
    assert equal(source.state_dict(), target.state_dict())
    assert "not found" not in caplog.text and "Skip" not in caplog.text


def test_own_checkpoint_keeps_its_names(tmp_path: Path) -> None:
    name = "IoUEnhancedSparseRCNN/iou_sparse_rcnn_tiny.yaml"
    source, target = tiny(name, 1), tiny(name, 2)
    assert to_library_names(source.state_dict()).keys() == source.state_dict().keys()
    torch.save(source.state_dict(), tmp_path / "own.pth")
    PublishedCheckpointer(target).load(str(tmp_path / "own.pth"))
    assert equal(source.state_dict(), target.state_dict())


def test_swin_release_fills_the_backbone(tmp_path: Path) -> None:
    options = [
        *("MODEL.BACKBONE.NAME", "build_swin_fpn_backbone"),
        *("MODEL.SWIN.EMBED_DIM", "12"),
        *("MODEL.SWIN.DEPTHS", "(1, 1, 1, 1)"),
    ]
    name = "IoUEnhancedSparseRCNN/iou_sparse_rcnn_tiny.yaml"
    source, target = tiny(name, 1, *options), tiny(name, 2, *options)
    body = {
        k: v
        for k, v in source.state_dict().items()
        if k.startswith("backbone.bottom_up.features.") and not k.endswith("index")
    }
    assert len(body) > 50
    released = SWIN_IMAGENET.to_theirs(body)
    released |= {"norm.weight": torch.ones(96), "head.weight": torch.zeros(5, 96)}
    torch.save({"model": released}, tmp_path / "swin.pth")
    before = {k: v.clone() for k, v in target.state_dict().items() if k not in body}
    PublishedCheckpointer(target).load(str(tmp_path / "swin.pth"))
    after = target.state_dict()
    assert equal(body, {k: after[k] for k in body})
    assert equal(before, {k: after[k] for k in before})
