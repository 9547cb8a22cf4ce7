"""Dynamic Sparse R-CNN and its combinations as configurations: sizes, steps, what steps log."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from model_support import count, load, small, training_inputs
from torch import Tensor, nn
from torchvision.ops import generalized_box_iou

from asag.checkpoint import SPARSE_RCNN
from asag.checkpoint.loading import PublishedCheckpointer
from asag.engine.optimizer import build_clipper, build_optimizer
from asag.engine.step import TrainStep
from asag.modeling.matching import OptimalTransportMatcher
from asag.modeling.proposal_generator import DynamicProposals
from asag.modeling.roi_heads import ChannelWeightedInteraction, IoUEnhancedSelfAttention
from asag.structures import ImageSizes

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "configs" / "DynamicSparseRCNN"
COMBINED = ROOT / "configs" / "Combined"
ABLATIONS = ROOT / "projects" / "DynamicSparseRCNN" / "ablations"
TINY = RECIPES / "dynamic_sparse_rcnn_tiny.yaml"
PLAIN = ROOT / "configs" / "SparseRCNN" / "sparse_rcnn_tiny.yaml"

NETWORK = 1_351_500 + 1_801_200 + 13_824 + 1_536
METRICS = {"ot_units_per_object", "ot_marginal_error", "ot_misplaced"}

# What each row of the paper's Tables 2 to 5 changes, as far as the row says so.
DPG, OT = "MODEL.PROPOSAL_GENERATOR.DPG.", "MODEL.MATCHER.OT."
GENERATOR, MATCHER = "MODEL.PROPOSAL_GENERATOR.NAME", "MODEL.MATCHER.NAME"
HUNGARIAN = {MATCHER: "HungarianMatcher"}
LEARNED = {GENERATOR: "LearnedProposals"}
TRANSPORT = {MATCHER: "OptimalTransportMatcher"}
EXPERTS = {GENERATOR: "DynamicProposals"}
BOTH_COSTS, ONE_COST = {OT + "REG_COST": ("l1", "giou")}, {OT + "REG_COST": ("giou",)}
GROWING, CONSTANT = {OT + "UNIT_INCREASE": True}, {OT + "UNIT_INCREASE": False}
DYNAMIC = {OT + "FIXED_K": 0, OT + "Q": 8}
ROWS: dict[str, dict[str, Any]] = {
    "table2_baseline": HUNGARIAN | LEARNED,
    "table2_dpg": HUNGARIAN | EXPERTS | {DPG + "STAIRCASE": True},
    "table2_dpg_without_staircase": HUNGARIAN | EXPERTS | {DPG + "STAIRCASE": False},
    "table2_dpg_dla": TRANSPORT | EXPERTS | DYNAMIC | BOTH_COSTS | GROWING,
    "table2_dpg_dla_without_increase": TRANSPORT | EXPERTS | DYNAMIC | BOTH_COSTS | CONSTANT,
    "table3_dynamic": TRANSPORT | LEARNED | DYNAMIC | ONE_COST | CONSTANT,
    "table3_two_losses": TRANSPORT | LEARNED | DYNAMIC | BOTH_COSTS | CONSTANT,
    "table3_two_losses_increase": TRANSPORT | LEARNED | DYNAMIC | BOTH_COSTS | GROWING,
    **{
        f"table3_fixed_k{k}": TRANSPORT | LEARNED | ONE_COST | CONSTANT | {OT + "FIXED_K": k}
        for k in (1, 2, 3)
    },
    **{
        f"table4_q{q}": TRANSPORT | EXPERTS | BOTH_COSTS | GROWING | {OT + "Q": q}
        for q in range(4, 10)
    },
    **{f"table5_experts{e}": HUNGARIAN | EXPERTS | {DPG + "NUM_EXPERTS": e} for e in (3, 4, 5)},
}


def configs() -> list[Path]:
    leaves = [
        *RECIPES.glob("dynamic_*.yaml"),
        *COMBINED.glob("*.yaml"),
        *ABLATIONS.glob("*.yaml"),
    ]
    return sorted(leaves)


def value(cfg: CfgNode, key: str) -> Any:
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def step_of(model: nn.Module, cfg: CfgNode, **values: Any) -> TrainStep:
    optimizer = build_optimizer(cfg, model, clip_in_step=False)
    return TrainStep(model, optimizer, clip=build_clipper(cfg), **values)


def spread_boxes(boxes_cxcywh: Tensor) -> None:
    """Boxes that differ, as those of a trained detector do."""
    generator = torch.Generator().manual_seed(3)
    shape = (*boxes_cxcywh.shape[:-1], 2)
    centers = 0.2 + 0.6 * torch.rand(shape, generator=generator)
    sides = 0.1 + 0.4 * torch.rand(shape, generator=generator)
    with torch.no_grad():
        boxes_cxcywh.copy_(torch.cat((centers, sides), dim=-1))


def predict(model: nn.Module, inputs: list[dict[str, Any]]) -> Any:
    images = model.preprocess_images(inputs)
    with torch.no_grad():
        return model.forward_stages(images.tensor, ImageSizes.from_images(images))[0]


@pytest.mark.parametrize("path", configs(), ids=lambda p: p.stem)
def test_every_configuration_trains_a_step_and_answers(path: Path) -> None:
    torch.manual_seed(0)
    cfg, model = load(path, "MODEL.DEVICE", "cpu"), small(path)
    inputs = training_inputs(cfg.MODEL.ROI_HEADS.NUM_CLASSES)
    with EventStorage() as storage:
        logged = step_of(model, cfg)(inputs)
    terms = {f"loss_{kind}{stage}" for kind in ("ce", "bbox", "giou") for stage in ("", "_0")}
    transport = isinstance(model.matcher, OptimalTransportMatcher)
    assert set(logged) == terms | {"total_loss", "grad_norm"}
    assert set(storage.histories()) == (METRICS if transport else set())
    assert all(x.isfinite() for x in logged.values())
    idle = [k for k, v in model.named_parameters() if v.requires_grad and v.grad is None]
    assert idle == []
    # Duplicates are removed where several queries may answer for one object, and only there.
    assert model.nms_threshold == (0.7 if transport else 0)
    assert model.criterion.normalizer == ("positives" if transport else "objects")
    model.eval()
    with torch.no_grad():
        for x, output in zip(inputs, model(inputs), strict=True):
            assert output["instances"].image_size == tuple(x["image"].shape[1:])
            assert output["instances"].scores.isfinite().all()


def test_every_row_of_the_tables_has_its_file() -> None:
    assert {p.stem for p in ABLATIONS.glob("*.yaml")} == set(ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_row_of_the_tables_changes_what_it_says(name: str) -> None:
    cfg = load(ABLATIONS / f"{name}.yaml")
    assert {key: value(cfg, key) for key in ROWS[name]} == ROWS[name]
    assert cfg.MODEL.PROPOSAL_GENERATOR.NUM_QUERIES == 300 and cfg.INPUT.CROP.ENABLED
    assert cfg.TEST.DETECTIONS_PER_IMAGE == 300 and cfg.MODEL.DECODER.NUM_STAGES == 6


def test_parameters_of_the_full_models() -> None:
    experts = 4 * 300 * (256 + 4)
    learned = 300 * (256 + 4)
    baseline = count(ABLATIONS / "table2_baseline.yaml")
    assert count(RECIPES / "dynamic_sparse_rcnn_r50_300pro_3x.yaml") == 109_691_828
    assert baseline + NETWORK + experts - learned == 109_691_828
    deeper = count(RECIPES / "dynamic_sparse_rcnn_r101_300pro_3x.yaml") - 109_691_828
    assert deeper == (count(ROOT / "configs/SparseRCNN/sparse_rcnn_r101_300pro_3x.yaml") - baseline)
    # Labels by optimal transport add nothing, the staircase its three depth-wise convolutions.
    assert count(ABLATIONS / "table3_dynamic.yaml") == baseline
    flat = count(ABLATIONS / "table2_dpg_without_staircase.yaml")
    assert count(ABLATIONS / "table2_dpg.yaml") - flat == 13_824 + 1_536


def test_reference_figures() -> None:
    """The figures that the analysis tool compares with, and how the paper's two come about."""
    path = ROOT / "projects/DynamicSparseRCNN/reference_figures.json"
    figures = json.loads(path.read_text())
    assert {name: count(ROOT / name) for name in figures} == {
        name: x["parameters"] for name, x in figures.items()
    }
    cfg = load(RECIPES / "dynamic_sparse_rcnn_r50_300pro_3x.yaml", "MODEL.DEVICE", "meta")
    with torch.device("meta"):
        model = build_model(cfg)
    attention = sum(
        p.numel() for stage in model.roi_heads.stages for p in stage.attention.parameters()
    )
    head = sum(p.numel() for p in model.roi_heads.parameters()) - attention
    assert round(head / 1e6, 1) == 77.8
    assert round((head + NETWORK) / 1e6, 1) == 81.0


def test_parameters_of_the_combinations() -> None:
    plain = count(ABLATIONS / "table2_baseline.yaml")
    weighting = count(ROOT / "configs/IoUEnhancedSparseRCNN/iou_sparse_rcnn_r50_300pro_3x.yaml")
    experts = 109_691_828 - plain
    assert count(COMBINED / "iou_dla_r50_300pro_3x.yaml") == weighting
    assert count(COMBINED / "iou_dpg_r50_300pro_3x.yaml") == weighting + experts
    assert count(COMBINED / "iou_dpg_dla_r50_300pro_3x.yaml") == weighting + experts


@pytest.mark.parametrize(
    ("name", "generator", "matcher"),
    [
        ("iou_dla_r50_300pro_3x", False, True),
        ("iou_dpg_r50_300pro_3x", True, False),
        ("iou_dpg_dla_r50_300pro_3x", True, True),
        ("iou_dpg_dla_tiny", True, True),
    ],
)
def test_combinations_learn_a_batch(name: str, generator: bool, matcher: bool) -> None:
    path = COMBINED / f"{name}.yaml"
    torch.manual_seed(0)
    rate = ["SOLVER.BASE_LR", 1e-3]
    cfg, model = load(path, "MODEL.DEVICE", "cpu", *rate), small(path)
    assert isinstance(model.proposal_generator, DynamicProposals) == generator
    assert isinstance(model.matcher, OptimalTransportMatcher) == matcher
    for stage in model.roi_heads.stages:
        assert isinstance(stage.attention, IoUEnhancedSelfAttention)
        assert isinstance(stage.interaction, ChannelWeightedInteraction)
    step, inputs = step_of(model, cfg), training_inputs(cfg.MODEL.ROI_HEADS.NUM_CLASSES)
    losses = [float(step(inputs)["total_loss"]) for _ in range(15)]
    assert max(losses[-3:]) < 0.85 * min(losses[:3]), losses


def test_units_and_losses_of_each_stage_by_hand() -> None:
    """Every stage divides by its own positives: 1, 2 and 3 units for each of four objects."""
    torch.manual_seed(0)
    units = [OT + "FIXED_K", 3, OT + "UNIT_STEP", 1.0, "MODEL.DECODER.NUM_STAGES", 3]
    model = small(TINY, *units, "MODEL.PROPOSAL_GENERATOR.NUM_QUERIES", 20)
    spread_boxes(model.proposal_generator.expert_boxes_cxcywh)
    seen: dict[str, tuple] = {}
    model.criterion.register_forward_hook(lambda _, inputs, __: seen.update(inputs=inputs))
    losses = {name: float(x.detach()) for name, x in model(training_inputs(5)).items()}
    predictions, targets, assignment = seen["inputs"]
    for s in range(3):
        pairs = [(b, n, int(assignment[s, b, n])) for b in range(2) for n in range(20)]
        pairs = [(b, n, m) for b, n, m in pairs if m >= 0]
        assert len(pairs) == 4 * (s + 1)
        l1 = giou = 0.0
        for b, n, m in pairs:
            box, gt = predictions.boxes_xyxy[s, b, n].detach(), targets.boxes_xyxy[b, m]
            giou += 1 - float(generalized_box_iou(box[None], gt[None]))
            l1 += float(((box - gt) / targets.image_whwh[b]).abs().sum())
        suffix = "" if s == 2 else f"_{s}"
        assert losses[f"loss_giou{suffix}"] == pytest.approx(2 * giou / len(pairs), 1e-4)
        assert losses[f"loss_bbox{suffix}"] == pytest.approx(5 * l1 / len(pairs), 1e-4)
    assert float(model.matcher.metrics["ot_units_per_object"]) == pytest.approx(2)
    assert float(model.matcher.metrics["ot_misplaced"]) == 0


@pytest.mark.parametrize("published", [False, True], ids=["ours", "authors"])
def test_starts_as_the_sparse_rcnn_it_is_given(tmp_path: Path, published: bool) -> None:
    torch.manual_seed(0)
    plain = small(PLAIN).eval()
    spread_boxes(plain.proposal_generator.boxes_cxcywh)
    state = plain.state_dict()
    torch.save({"model": SPARSE_RCNN.to_theirs(state) if published else state}, tmp_path / "x.pth")
    dynamic = small(TINY).eval()
    inputs = [{"image": x["image"]} for x in training_inputs(5)]
    before = predict(dynamic, inputs).boxes_xyxy
    PublishedCheckpointer(dynamic).load(str(tmp_path / "x.pth"))
    ours, theirs = predict(dynamic, inputs), predict(plain, inputs)
    torch.testing.assert_close(ours.boxes_xyxy, theirs.boxes_xyxy, atol=1e-3, rtol=1e-5)
    torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-4, rtol=1e-5)
    assert (before - theirs.boxes_xyxy).abs().max() > 1
    dynamic.nms_threshold = 0.0  # the one detector removes duplicates, the other does not
    for one, other in zip(dynamic(inputs), plain(inputs), strict=True):
        one, other = one["instances"], other["instances"]
        torch.testing.assert_close(one.scores, other.scores, atol=1e-5, rtol=1e-4)
        assert torch.equal(one.pred_classes, other.pred_classes)


@pytest.mark.parametrize("path", [TINY, COMBINED / "iou_dpg_dla_tiny.yaml"], ids=lambda p: p.stem)
def test_mixed_precision_and_accumulation(path: Path) -> None:
    """Half-precision matrix products, two micro-batches a step; the temperature counts both."""
    torch.manual_seed(0)
    schedule = ["SOLVER.MAX_ITER", 4, "SOLVER.ACCUMULATE_STEPS", 2, DPG + "TAU_SHARE", 0.5]
    schedule += [DPG + "TAU_INIT", 9.0]
    cfg, model = load(path, "MODEL.DEVICE", "cpu", *schedule), small(path, *schedule)
    spread_boxes(model.proposal_generator.expert_boxes_cxcywh)
    boxes: list[Tensor] = []
    model.proposal_generator.register_forward_hook(
        lambda _, __, output: boxes.append(output[0].boxes_xyxy)
    )
    step = step_of(model, cfg, amp_dtype=torch.bfloat16, accumulate_steps=2)
    start = model.proposal_generator.weigh[0].weight.clone()
    temperatures = []
    for _ in range(3):
        logged = step(training_inputs(5))
        assert all(x.isfinite() for x in logged.values())
        temperatures.append(float(model.proposal_generator.temperature))
    # Forwards 2, 4 and 6, whose temperatures are 9 - 8 * min(forwards before / 4, 1).
    assert temperatures == pytest.approx([7, 3, 1])
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert not torch.equal(model.proposal_generator.weigh[0].weight, start)
    assert {x.dtype for x in boxes} == {torch.float32}


def test_architecture_insists_on_its_rooms() -> None:
    with pytest.raises(ValueError, match=r"MODEL.PROPOSAL_GENERATOR.NAME.*DynamicSparseRCNN"):
        small(TINY, GENERATOR, "LearnedProposals")
    with pytest.raises(ValueError, match=r"MODEL.MATCHER.NAME.*DynamicSparseRCNN"):
        small(TINY, MATCHER, "HungarianMatcher")
