"""Files that hold more or less than a layout says: nothing of them is lost, nothing goes unsaid."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
import torchvision
from detectron2.modeling import build_model
from torch import nn

from asag import load_config
from asag.checkpoint.layouts import LAYOUTS
from asag.checkpoint.loading import PublishedCheckpointer, detector_layout, source_of
from asag.checkpoint.report import BATCH_COUNTER, LoadReport

ROOT = Path(__file__).resolve().parents[2]
TINY = {
    "authors-sparse-rcnn": "SparseRCNN/sparse_rcnn_tiny.yaml",
    "authors-iou-sparse-rcnn": "IoUEnhancedSparseRCNN/iou_sparse_rcnn_tiny.yaml",
    "authors-detr": "DETR/detr_tiny.yaml",
    "authors-conditional-detr": "ConditionalDETR/conditional_detr_tiny.yaml",
    "authors-asag-a": "ASAG/asag_a_tiny.yaml",
    "authors-asag-s": "ASAG/asag_tiny.yaml",
}
STRANGERS = {"criterion.empty_weight": torch.ones(3), "mask_head.lay1.bias": torch.zeros(2)}
SWIN = {"embed_dim": 8, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 2, 4]}


def build(config: str, *options: object, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    given = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", *map(str, options)]
    return build_model(load_config(str(ROOT / "configs" / config), given)).eval()


def load(model: nn.Module, state: dict, path: Path, caplog: pytest.LogCaptureFixture) -> tuple:
    """Level and text of the report."""
    torch.save(state, path)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        PublishedCheckpointer(model).load(str(path))
    (record,) = [x for x in caplog.records if "tensors loaded" in x.message]
    return record.levelno, record.message


@pytest.mark.parametrize("layout", TINY)
def test_strangers_do_not_hide_the_layout(layout: str, tmp_path: Path, caplog) -> None:
    trained, model = build(TINY[layout], seed=1), build(TINY[layout])
    published = LAYOUTS[layout].to_theirs(trained.state_dict())
    level, text = load(model, published | STRANGERS, tmp_path / "x.pth", caplog)
    expected, found = trained.state_dict(), model.state_dict()
    compared = [k for k in published if not k.endswith(BATCH_COUNTER)]
    assert len(compared) > 100
    skipped = (*LAYOUTS[layout].ours_only, BATCH_COUNTER)
    for name, value in expected.items():
        assert name.endswith(skipped) or torch.equal(found[name], value), name
    assert level == logging.WARNING
    assert LAYOUTS[layout].source in text and "0 start fresh" in text
    assert "2 of the file left out" in text and "left out: criterion.empty_weight, mask_he" in text


def test_a_few_known_names_make_no_layout() -> None:
    names = ["backbone.a", "class_embed.bias", "head.x", "head.y", "head.z"]
    assert detector_layout(names) == (None, names)
    assert detector_layout(["x", "y"]) == (None, ["x", "y"])
    assert source_of(["x", "y"]) == "of no known layout"


def test_a_missing_part_of_a_matrix_is_named_with_its_file(tmp_path: Path) -> None:
    layout = "authors-conditional-detr"
    model = build(TINY[layout])
    published = LAYOUTS[layout].to_theirs(model.state_dict())
    del published["transformer.decoder.layers.1.sa_kcontent_proj.weight"]
    torch.save(published, tmp_path / "cut.pth")
    message = r"cut\.pth: incomplete: roi_heads\.stages\.1\.self_attention.*lacks slice\(s\) \[1\]"
    with pytest.raises(ValueError, match=message):
        PublishedCheckpointer(model).load(str(tmp_path / "cut.pth"))


def test_what_a_swin_transformer_computes_itself_is_not_fresh(tmp_path: Path, caplog) -> None:
    config = "IoUEnhancedSparseRCNN/iou_sparse_rcnn_swin_t_100pro_3x.yaml"
    options = ["MODEL.SWIN.EMBED_DIM", 8, "MODEL.SWIN.DEPTHS", (2, 2, 2, 2)]
    options += ["MODEL.SWIN.NUM_HEADS", (1, 2, 2, 4), "MODEL.DECODER.NUM_STAGES", 1]
    swin = torchvision.models.SwinTransformer([4, 4], window_size=[7, 7], **SWIN)
    level, text = load(build(config, *options), swin.state_dict(), tmp_path / "swin.pth", caplog)
    assert level == logging.INFO and "an image classifier, a Swin Transformer" in text
    row = next(x for x in text.splitlines() if x.startswith("backbone.bottom_up"))
    assert row.split()[2] == "8"  # a norm behind each of the four stages


def report(loaded: set[str], fresh: set[str]) -> LoadReport:
    return LoadReport("x.pth", "some release", loaded, len(loaded), fresh, [], [])


def test_a_shallower_network_is_no_usual_start() -> None:
    stem, block = "backbone.bottom_up.stem.conv1.weight", "backbone.bottom_up.res4.{}.conv1.weight"
    head = "roi_heads.stages.0.norm.weight"
    whole = report({stem, block.format(0), block.format(1)}, {head})
    assert whole.backbone_only and not whole.interrupted
    shallow = report({stem, block.format(0)}, {head, block.format(1), block.format(2)})
    assert not shallow.backbone_only
    assert "though others of their kind were loaded: backbone.bottom_up.res4.1." in str(shallow)
