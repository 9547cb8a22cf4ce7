"""The IoU-enhanced detectors as configurations: sizes of the paper, one step, what cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.modeling import build_model
from model_support import DECODER, count, load, small, training_inputs

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "configs" / "IoUEnhancedSparseRCNN"
ABLATIONS = ROOT / "projects" / "IoUEnhancedSparseRCNN" / "ablations"
TINY = RECIPES / "iou_sparse_rcnn_tiny.yaml"


def configs() -> list[Path]:
    leaves = sorted(RECIPES.glob("iou_*.yaml")) + sorted(ABLATIONS.glob("*.yaml"))
    assert len(leaves) > 20
    return leaves


@pytest.mark.parametrize("path", configs(), ids=lambda p: p.stem)
def test_every_configuration_trains_a_step_and_answers(path: Path) -> None:
    torch.manual_seed(0)
    model = small(path)
    inputs = training_inputs(model.roi_heads.stages[0].class_logits.out_features)
    losses = model(inputs)
    assert set(losses) == {
        f"loss_{kind}{stage}" for kind in ("ce", "bbox", "giou") for stage in ("", "_0")
    }
    sum(losses.values()).backward()
    idle = [k for k, v in model.named_parameters() if v.requires_grad and v.grad is None]
    assert idle == []
    assert all(v.grad.isfinite().all() for v in model.parameters() if v.grad is not None)
    torch.optim.AdamW(model.parameters(), lr=1e-3).step()
    model.eval()
    with torch.no_grad():
        for x, output in zip(inputs, model(inputs), strict=True):
            assert output["instances"].image_size == tuple(x["image"].shape[1:])
            assert output["instances"].scores.isfinite().all()


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("iou_sparse_rcnn_r50_100pro_3x", 132_823_240),
        ("iou_sparse_rcnn_r50_300pro_3x", 132_875_240),
    ],
)
def test_size_of_the_published_models(name: str, parameters: int) -> None:
    assert count(RECIPES / f"{name}.yaml") == parameters


@pytest.mark.parametrize(("name", "millions"), [("r101_300pro_3x", 152), ("swin_t_300pro_3x", 136)])
def test_size_in_table_6(name: str, millions: int) -> None:
    assert round(count(RECIPES / f"iou_sparse_rcnn_{name}.yaml") / 1e6) == millions


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("plain", 106_237_768),
        ("attention_iou_esa", 106_237_768),  # "without adding any parameters"
        ("dcw", 132_823_240),
        ("disentangle_half", 95_353_672),
        ("disentangle_full", 97_000_264),  # 97.0M in Table 2
    ],
)
def test_size_of_the_ablations(name: str, parameters: int) -> None:
    assert count(ABLATIONS / f"coco_{name}.yaml") == parameters


def test_head_parameters_of_the_authors_checkpoint(shared_dir: Path) -> None:
    from asag.checkpoint import IOU_SPARSE_RCNN

    cfg = load(RECIPES / "iou_sparse_rcnn_r50_100pro_3x.yaml", "MODEL.DEVICE", "meta")
    with torch.device("meta"):
        ours = build_model(cfg).state_dict()
    listing = (shared_dir / "spec" / "iou_sparse_rcnn_state_dict.txt").read_text().splitlines()
    theirs = {}
    for line in listing:
        if line and not line.startswith("#"):
            name, shape = line.split(" ", 1)
            shape = tuple(int(x) for x in shape.strip("()").split(",") if x.strip())
            for s in range(6 if "head_series.0" in name else 1):
                theirs[name.replace("head_series.0", f"head_series.{s}")] = shape
    assert len(theirs) == 715
    renamed = IOU_SPARSE_RCNN.to_ours(theirs)
    assert renamed == {k: tuple(v.shape) for k, v in ours.items()}
    assert IOU_SPARSE_RCNN.to_theirs(renamed) == theirs


@pytest.mark.parametrize("name", ["attention_iou_esa_dcw", "attention_iou", "disentangle_full"])
def test_mixed_precision_trains_with_finite_gradients(name: str) -> None:
    torch.manual_seed(0)
    model = small(ABLATIONS / f"coco_{name}.yaml")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model(training_inputs(80))
    sum(losses.values()).backward()
    assert all(x.isfinite() for x in losses.values())
    assert all(p.grad.isfinite().all() for p in model.roi_heads.parameters())


def test_two_kinds_of_separation_exclude_each_other() -> None:
    options = ["MODEL.META_ARCHITECTURE", "SparseDetector", DECODER + "DISENTANGLE", "half"]
    with pytest.raises(ValueError, match=r"DCW.*DISENTANGLE.*'half'"):
        small(TINY, *options)


@pytest.mark.parametrize(
    ("key", "value"),
    [("SELF_ATTENTION", "msa"), ("DCW", False), ("DISENTANGLE", "full")],
)
def test_architecture_insists_on_its_components(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"MODEL.DECODER.{key}.*IoUEnhancedSparseRCNN"):
        small(TINY, DECODER + key, value)


@pytest.mark.parametrize("key", ["SELF_ATTENTION", "DISENTANGLE"])
def test_unknown_choices_are_listed(key: str) -> None:
    options = ["MODEL.META_ARCHITECTURE", "SparseDetector", DECODER + "DCW", False]
    with pytest.raises(ValueError, match=rf"MODEL.DECODER.{key} is 'other'; it must be one of"):
        small(TINY, *options, DECODER + key, "other")


def test_first_boxes_learn_through_attention_too() -> None:
    """The learned boxes get a gradient from the IoU matrix of the first stage (Eq. 3)."""
    torch.manual_seed(0)
    model = small(TINY, "MODEL.PROPOSAL_GENERATOR.BOX_INIT", "image")
    boxes = model.proposal_generator.boxes_cxcywh
    with torch.no_grad():  # no longer all equal to the image
        boxes[:, :2] += 0.2 * torch.rand(7, 2)
        boxes[:, 2:] -= 0.5 * torch.rand(7, 2)
    inputs = training_inputs(5)
    found = []
    for detach in (False, True):
        attention = model.roi_heads.stages[0].attention
        original = attention.mix_with_gradient

        def mix(q, k, v, prior, original=original, detach=detach):
            return original(q, k, v, prior.detach() if detach else prior)

        attention.mix_with_gradient = mix
        model.zero_grad()
        sum(model(inputs).values()).backward()
        attention.mix_with_gradient = original
        found.append(boxes.grad.clone())
    assert all(x.isfinite().all() and x.any() for x in found)
    assert not torch.allclose(*found, rtol=1e-4, atol=0)


def test_batched_answers_equal_single_ones() -> None:
    torch.manual_seed(0)
    model = small(TINY).eval()
    images = [{"image": torch.rand(3, 64, 96) * 255} for _ in range(2)]
    with torch.no_grad():
        together = model(images)
        for x, expected in zip(images, together, strict=True):
            alone = model([x])[0]["instances"]
            torch.testing.assert_close(alone.scores, expected["instances"].scores)
            torch.testing.assert_close(
                alone.pred_boxes.tensor, expected["instances"].pred_boxes.tensor, atol=1e-3, rtol=0
            )
