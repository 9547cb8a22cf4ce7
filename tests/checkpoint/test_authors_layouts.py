"""Names and shapes of the authors' checkpoints, whole: none missing, none unexpected, both ways."""

from __future__ import annotations

import argparse
import logging
import re
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model

from asag import load_config
from asag.checkpoint.layouts import LAYOUTS, recognize
from asag.checkpoint.loading import PublishedCheckpointer, to_library_names

ROOT = Path(__file__).resolve().parents[2]
# A line of a listing: a name, then its shape in any kind of brackets.
_ENTRY = re.compile(r"(?P<name>[\w.]+)\s+[\[(](?P<shape>[\d, ]*)[\])]")
COLUMNS = ["MODEL.ROI_HEADS.NUM_CLASSES", "91"]
CASES = {
    "ASAG-A": ("authors-asag-a", "configs/ASAG/asag_a_r50_100_1x.yaml", []),
    "ASAG-S": ("authors-asag-s", "configs/ASAG/asag_s_r50_100_1x.yaml", []),
    "Conditional DETR": (
        "authors-conditional-detr",
        "configs/ConditionalDETR/conditional_detr_r50_50ep.yaml",
        COLUMNS,
    ),
    "DETR": ("authors-detr", "configs/DETR/detr_r50_50ep.yaml", COLUMNS),
    "Sparse R-CNN": (
        "authors-sparse-rcnn",
        "configs/SparseRCNN/sparse_rcnn_r50_100pro_3x.yaml",
        [],
    ),
    "IoU-enhanced": (
        "authors-iou-sparse-rcnn",
        "configs/IoUEnhancedSparseRCNN/iou_sparse_rcnn_r50_100pro_3x.yaml",
        [],
    ),
}
TOTALS = {"ASAG-A": 498, "ASAG-S": 510, "Conditional DETR": 564, "DETR": 458}
LISTINGS = {
    "authors-asag-a": "asag_state_dict.txt",
    "authors-asag-s": "asag_state_dict.txt",
    "authors-conditional-detr": "conditional_detr_state_dict.txt",
    "authors-detr": "conditional_detr_state_dict.txt",
    "authors-sparse-rcnn": "sparse_rcnn_state_dict.txt",
    "authors-iou-sparse-rcnn": "iou_sparse_rcnn_state_dict.txt",
}

Shapes = dict[str, tuple[int, ...]]


def entries(lines: list[str]) -> Shapes:
    found = (_ENTRY.match(line) for line in lines)
    return {
        x["name"]: tuple(int(n) for n in x["shape"].split(",") if n.strip()) for x in found if x
    }


def resnet50(prefix: str) -> Shapes:
    """torchvision's names, without the classifier and the counters of batches."""
    from torchvision.models import resnet50 as build

    with torch.device("meta"):
        state = build().state_dict()
    kept = (x for x in state if not x.startswith("fc.") and not x.endswith("num_batches_tracked"))
    return {f"{prefix}{x}": tuple(state[x].shape) for x in kept}


def contract(case: str, folder: Path) -> Shapes:
    """Everything in a published file: the listings spell out one of several equal parts."""
    layout = CASES[case][0]
    lines = (folder / LISTINGS[layout]).read_text().splitlines()
    if layout in ("authors-sparse-rcnn", "authors-iou-sparse-rcnn"):
        listed = entries(lines)
        return {
            name.replace("head_series.0", f"head_series.{s}"): shape
            for name, shape in listed.items()
            for s in range(6)
        }
    marks = {
        "ASAG-A": ("## ASAG-A", "## ASAG-S"),
        "ASAG-S": ("## ASAG-S", None),
        "Conditional DETR": ("=== Conditional", "=== DETR"),
        "DETR": ("=== DETR", None),
    }[case]
    starts = {m: next(i for i, x in enumerate(lines) if x.startswith(m)) for m in marks if m}
    listed = entries(lines[starts[marks[0]] : starts[marks[1]] if marks[1] else None])
    if layout.startswith("authors-asag"):
        shared = next(i for i, x in enumerate(lines) if x.startswith("## Shared"))
        end = next(i for i, x in enumerate(lines) if x.startswith("## ASAG-A"))
        listed |= entries(lines[shared:end])
    return resnet50("backbone.0.body.") | listed


def model_shapes(case: str) -> Shapes:
    _, config, options = CASES[case]
    cfg = load_config(str(ROOT / config), ["MODEL.DEVICE", "meta", *options])
    with torch.device("meta"):
        return {k: tuple(v.shape) for k, v in build_model(cfg).state_dict().items()}


@pytest.mark.parametrize("case", CASES)
def test_published_files_and_models_hold_the_same(case: str, shared_dir: Path) -> None:
    theirs = contract(case, shared_dir / "spec")
    assert len(theirs) == TOTALS.get(case, len(theirs)) and len(theirs) > 400
    assert recognize(theirs) == CASES[case][0]
    table = LAYOUTS[CASES[case][0]]
    with torch.device("meta"):
        empty = {name: torch.empty(shape) for name, shape in theirs.items()}
    ours = table.to_ours(empty)
    wanted = {k: v for k, v in model_shapes(case).items() if k not in table.ours_only}
    assert {k: tuple(v.shape) for k, v in ours.items()} == wanted
    back = {k: tuple(v.shape) for k, v in table.to_theirs(ours).items()}
    assert back == theirs


@pytest.mark.parametrize("case", CASES)
def test_whole_files_load(case: str, shared_dir: Path, tmp_path: Path, caplog) -> None:
    """With numbers in them, and what authors leave beside: those of frozen norms arrive as they
    are."""
    layout, config, options = CASES[case]
    torch.manual_seed(0)
    state = {k: torch.rand(v) for k, v in contract(case, shared_dir / "spec").items()}
    file = tmp_path / "published.pth"
    torch.save({"model": state, "epoch": 1, "args": argparse.Namespace(lr=1e-4)}, file)
    cfg = load_config(str(ROOT / config), ["MODEL.DEVICE", "meta", *options])
    with torch.device("meta"):  # a random start would only take time
        model = build_model(cfg)
    model = model.to_empty(device="cpu")
    with caplog.at_level(logging.INFO):
        PublishedCheckpointer(model).load(str(file))
    file.unlink()
    assert f"({LAYOUTS[layout].source})" in caplog.text
    assert "nothing fresh, nothing left out" in caplog.text
    expected, loaded = to_library_names(state), model.state_dict()
    assert expected.keys() == loaded.keys() - set(LAYOUTS[layout].ours_only)
    assert all(torch.equal(expected[k], loaded[k]) for k in expected)
