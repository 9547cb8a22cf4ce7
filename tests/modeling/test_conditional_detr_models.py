"""DETR and Conditional DETR as configurations: sizes, one step, batches, checkpoints."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from asag import load_config
from asag.checkpoint import CONDITIONAL_DETR, DETR
from asag.checkpoint.detr import UNUSED_CATEGORIES
from asag.checkpoint.loading import PublishedCheckpointer
from asag.structures import ImageSizes, Predictions

ROOT = Path(__file__).resolve().parents[2]
CONDITIONAL, PLAIN = ROOT / "configs" / "ConditionalDETR", ROOT / "configs" / "DETR"
ABLATIONS = ROOT / "projects" / "ConditionalDETR" / "ablations"
TINY = CONDITIONAL / "conditional_detr_tiny.yaml"
TINY_DETR = PLAIN / "detr_tiny.yaml"
DIM = 16

# Whatever a configuration is about, small enough for a step on a CPU.
SMALL: list[Any] = [
    *("MODEL.WEIGHTS", ""),
    *("MODEL.SLIM_RESNET.WIDTH", 8),
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", 4),
    *("MODEL.RESNETS.WIDTH_PER_GROUP", 4),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", 8),
    *("MODEL.ENCODER.NUM_LAYERS", 1),
    *("MODEL.DECODER.NUM_STAGES", 2),
    *("MODEL.DECODER.HIDDEN_DIM", DIM),
    *("MODEL.DECODER.NUM_HEADS", 2),
    *("MODEL.DECODER.FFN_DIM", 24),
    *("MODEL.PROPOSAL_GENERATOR.NUM_QUERIES", 7),
    *("TEST.DETECTIONS_PER_IMAGE", 7),
]


def configs() -> list[Path]:
    leaves = [
        *CONDITIONAL.glob("conditional*.yaml"),
        *PLAIN.glob("detr*.yaml"),
        *ABLATIONS.glob("*.yaml"),
    ]
    assert len(leaves) > 30
    return sorted(leaves)


def build(path: Path, *options: Any) -> nn.Module:
    torch.manual_seed(0)
    return build_model(load_config(str(path), ["MODEL.DEVICE", "cpu", *map(str, options)]))


def count(path: Path, *options: Any) -> int:
    """Parameters of a model that exists in name only."""
    cfg = load_config(str(path), ["MODEL.DEVICE", "meta", *map(str, options)])
    with torch.device("meta"):
        return sum(p.numel() for p in build_model(cfg).parameters())


def sample(height: int, width: int, objects: int, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    instances = Instances((height, width))
    corner = torch.rand(objects, 2, generator=generator) * 30
    instances.gt_boxes = Boxes(torch.cat((corner, corner + 20), dim=1))
    instances.gt_classes = torch.randint(5, (objects,), generator=generator)
    image = torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8)
    return {"image": image, "instances": instances, "image_id": seed}


@torch.no_grad()
def raw(model: nn.Module, inputs: list[dict[str, Any]]) -> Predictions:
    images = model.preprocess_images(inputs)
    return model.forward_stages(images.tensor, ImageSizes.from_images(images))[0]


def randomize(model: nn.Module) -> nn.Module:
    """Makes what starts at zero or one count."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
        for m in model.modules():
            if hasattr(m, "running_mean"):
                m.running_mean.normal_(std=0.2)
                m.running_var.uniform_(0.5, 1.5)
    return model


@pytest.mark.parametrize("path", configs(), ids=lambda p: p.stem)
def test_every_configuration_trains_a_step(path: Path) -> None:
    model = build(path, *SMALL).train()
    losses = model([sample(64, 90, 3), sample(80, 70, 0, seed=1)])
    assert set(losses) == {
        f"loss_{kind}{stage}" for kind in ("ce", "bbox", "giou") for stage in ("", "_0")
    }
    sum(losses.values()).backward()
    # Workers that wait for a gradient which never comes would hang.
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad is not None and p.grad.isfinite().all(), name


@pytest.mark.parametrize("kind", ["csq", "csq_c", "csq_t", "csq_p", "csq_i"])
def test_a_single_stage_leaves_no_parameter_without_gradient(kind: str) -> None:
    options = ("MODEL.DECODER.NUM_STAGES", 1, "MODEL.DECODER.SPATIAL_QUERY", kind)
    model = build(TINY, *SMALL, *options).train()
    sum(model([sample(64, 90, 3)]).values()).backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_sizes_of_the_published_models() -> None:
    figures = json.loads((ROOT / "projects/ConditionalDETR/reference_figures.json").read_text())
    for path in ("conditional_detr_r50_50ep", "conditional_detr_dc5_r101_108ep"):
        key = f"configs/ConditionalDETR/{path}.yaml"
        assert count(ROOT / key) == figures[key]["parameters"]
    # With a column for each of COCO's category numbers, as published.
    columns = ("MODEL.ROI_HEADS.NUM_CLASSES", 91)
    assert count(CONDITIONAL / "conditional_detr_r50_50ep.yaml", *columns) == 43_418_401
    assert count(PLAIN / "detr_r50_50ep.yaml", *columns) == 41_524_768


# Parameters of an FFN with one hidden layer, d -> d -> outputs.
def ffn(outputs: int, d: int = 256) -> int:
    return d * d + d + d * outputs + outputs


D, HEADS, QUERIES = 256, 8, 300
DIFFERENCES = {
    "reference_predicted": 0,
    "reference_learned": QUERIES * 2 - ffn(2),
    "reference_origin": -ffn(2),
    "spatial_csq": 0,
    "spatial_csq_i": 0,
    "spatial_csq_t": 0,
    "spatial_csq_p": -ffn(D),
    "spatial_csq_c": -ffn(D),
    "projection_diagonal": 0,
    "projection_identity": -ffn(D),
    "projection_single": ffn(1) - ffn(D),
    "projection_block": ffn(D * D // HEADS) - ffn(D),
    "projection_full": ffn(D * D) - ffn(D),
    "parts_or_fl_csq": 0,
}
DETR_DIFFERENCES = {
    "parts_none": 0,
    "parts_or": ffn(2),
    "parts_fl": 200 * D - (D + 1),
    "parts_or_fl": ffn(2) + 200 * D - (D + 1),
    "detr_iou_esa": 0,
    # Two masks and projections and a second norm and feed-forward block in each of six stages.
    "detr_dcw": 6
    * (2 * (2 * 32 * D + 32 + D) + 2 * (D * D + D) + 2 * D + 2 * 2048 * D + 2048 + 3 * D),
}
DETR_DIFFERENCES["detr_iou_esa_dcw"] = DETR_DIFFERENCES["detr_dcw"]


def test_every_ablation_has_an_expected_size() -> None:
    assert {p.stem for p in ABLATIONS.glob("*.yaml")} == {*DIFFERENCES, *DETR_DIFFERENCES}


@pytest.mark.parametrize("name", [*DIFFERENCES, *DETR_DIFFERENCES])
def test_ablations_have_the_parameters_of_their_definition(name: str) -> None:
    conditional = name in DIFFERENCES
    base = (
        CONDITIONAL / "conditional_detr_r50_50ep.yaml"
        if conditional
        else PLAIN / "detr_r50_50ep.yaml"
    )
    difference = (DIFFERENCES if conditional else DETR_DIFFERENCES)[name]
    assert count(ABLATIONS / f"{name}.yaml") - count(base) == difference


def test_what_the_paper_counts_for_channel_weighting() -> None:
    assert round(DETR_DIFFERENCES["detr_dcw"] / 1e6) == 7


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("path", [TINY, TINY_DETR, ABLATIONS / "detr_iou_esa_dcw.yaml"])
def test_a_batch_gives_what_each_image_gives(path: Path, training: bool) -> None:
    model = randomize(build(path, *SMALL)).train(training)
    for m in model.modules():
        if isinstance(m, nn.Dropout | nn.BatchNorm2d) or hasattr(m, "dropout"):
            m.train(False)
    inputs = [sample(97, 130, 0), sample(120, 85, 0, seed=1), sample(33, 41, 0, seed=2)]
    together = raw(model, inputs)
    for b, x in enumerate(inputs):
        alone = raw(model, [x])
        scale = torch.tensor(x["image"].shape[:0:-1]).repeat(2)
        boxes = (together.boxes_xyxy[:, b] - alone.boxes_xyxy[:, 0]) / scale
        assert boxes.abs().max() < 1e-5
        assert (together.logits[:, b] - alone.logits[:, 0]).abs().max() < 1e-5


def test_without_exact_padding_neighbors_leave_a_trace() -> None:
    inputs = [sample(97, 130, 0), sample(120, 85, 0, seed=1)]
    model = randomize(build(TINY, *SMALL, "MODEL.EXACT_PADDING", False)).eval()
    together, alone = raw(model, inputs), raw(model, inputs[:1])
    assert not torch.allclose(together.logits[:, :1], alone.logits, atol=1e-4)


@pytest.mark.parametrize("path", [TINY, TINY_DETR])
def test_invalid_queries_change_nothing(path: Path) -> None:
    model = randomize(build(path, *SMALL)).eval()
    images = model.preprocess_images([sample(64, 64, 0), sample(60, 90, 0, seed=1)])
    sizes = ImageSizes.from_images(images)
    with torch.no_grad():
        features = model.neck(model.backbone(images.tensor), sizes)
        queries, _ = model.proposal_generator(features, sizes)
        full = model.roi_heads(features, queries, sizes)
        extra = 3
        queries.content = torch.cat((queries.content, torch.randn(2, extra, DIM)), dim=1)
        queries.position = torch.cat((queries.position, torch.randn(1, extra, DIM)), dim=1)
        if queries.points_xy is not None:
            queries.points_xy = torch.cat((queries.points_xy, torch.rand(1, extra, 2)), dim=1)
        queries.valid = torch.arange(7 + extra).expand(2, -1) < 7
        queries.all_valid = False
        padded = model.roi_heads(features, queries, sizes)
    assert torch.allclose(padded.logits[:, :, :7], full.logits, atol=1e-5)
    assert torch.allclose(padded.boxes_xyxy[:, :, :7], full.boxes_xyxy, atol=1e-3)
    assert padded.logits.isfinite().all()


def test_boxes_start_at_the_reference_points() -> None:
    model = build(TINY, *SMALL).eval()
    predictions = raw(model, [sample(64, 100, 0)])
    points = model.proposal_generator.point_coordinates() * torch.tensor([100.0, 64.0])
    boxes = predictions.boxes_xyxy
    center, size = (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]
    assert torch.allclose(center, points.expand_as(center), atol=1e-3)
    assert torch.allclose(size, torch.tensor([50.0, 32.0]).expand_as(size), atol=1e-3)
    assert predictions.logits.sigmoid().mean() < 0.05


@pytest.mark.parametrize(
    ("options", "issue"),
    [
        (("MODEL.DECODER.PRE_NORM", True), r"MODEL\.DECODER\.PRE_NORM"),
        (("MODEL.ENCODER.IN_FEATURE", "res9"), r"MODEL\.ENCODER\.IN_FEATURE is 'res9'"),
        (("MODEL.ENCODER.NUM_LAYERS", -1), r"MODEL\.ENCODER\.NUM_LAYERS is -1"),
        (("MODEL.ROI_HEADS.IN_FEATURES", ("res5",)), r"MODEL\.ROI_HEADS\.IN_FEATURES"),
        (("MODEL.PROPOSAL_GENERATOR.REFERENCE_POINTS", "none"), "REFERENCE_POINTS"),
        (("MODEL.PROPOSAL_GENERATOR.NUM_QUERIES", 0), r"NUM_QUERIES is 0"),
        (("MODEL.DECODER.SELF_ATTENTION", "iou"), r"MODEL\.DECODER\.SELF_ATTENTION"),
        (("MODEL.DECODER.NUM_STAGES", 0), r"MODEL\.DECODER\.NUM_STAGES is 0"),
        (("MODEL.INFERENCE_DTYPE", "int8"), r"MODEL\.INFERENCE_DTYPE"),
    ],
)
def test_impossible_configurations_name_their_key(options: tuple, issue: str) -> None:
    free = ("MODEL.META_ARCHITECTURE", "SparseDetector")
    with pytest.raises(ValueError, match=issue):
        build(TINY, *SMALL, *free, *options)


def test_named_architectures_insist_on_their_components() -> None:
    with pytest.raises(ValueError, match="SparseDetector"):
        build(TINY, *SMALL, "MODEL.ROI_HEADS.NAME", "DETRHeads")


def published(path: Path, classes: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model on a ResNet with random weights, and the same weights in the authors' layout."""
    columns = ("MODEL.ROI_HEADS.NUM_CLASSES", classes)
    model = randomize(build(path, *SMALL, *columns))
    table = CONDITIONAL_DETR if "conditional" in path.stem else DETR
    return model, table.to_theirs(model.state_dict())


@pytest.mark.parametrize(
    "path", [CONDITIONAL / "conditional_detr_dc5_r50_50ep.yaml", PLAIN / "detr_r50_50ep.yaml"]
)
def test_published_checkpoints_load_by_their_own_names(path: Path, tmp_path: Path) -> None:
    theirs_model, state = published(path, 91)
    assert "transformer.decoder.layers.1.norm3.weight" in state
    file = tmp_path / "published.pth"
    torch.save({"model": state, "args": argparse.Namespace(lr=1e-4), "epoch": 49}, file)
    same, reduced = (build(path, *SMALL, "MODEL.ROI_HEADS.NUM_CLASSES", n) for n in (91, 80))
    for model in (same, reduced):
        PublishedCheckpointer(model).load(str(file))
        model.eval()
    inputs = [sample(64, 80, 0)]
    expected = raw(theirs_model.eval(), inputs)
    assert torch.equal(raw(same, inputs).logits, expected.logits)
    used = [i for i in range(expected.logits.shape[-1]) if i not in UNUSED_CATEGORIES]
    assert len(used) in (80, 81)
    assert torch.allclose(raw(reduced, inputs).logits, expected.logits[..., used], atol=1e-6)


def test_packing_keeps_the_order_and_misses_nothing() -> None:
    model, state = published(CONDITIONAL / "conditional_detr_r50_50ep.yaml", 80)
    for name, value in CONDITIONAL_DETR.to_ours(state).items():
        assert torch.equal(value, model.state_dict()[name]), name
    prefix = "transformer.decoder.layers.1."
    packed = model.roi_heads.stages[1].self_attention.in_proj.weight
    assert torch.equal(state[f"{prefix}sa_kcontent_proj.weight"], packed[DIM : 2 * DIM])
    del state[f"{prefix}sa_kcontent_proj.weight"]
    with pytest.raises(KeyError, match=r"slice\(s\) \[1\]"):
        CONDITIONAL_DETR.to_ours(state)


def test_published_names_are_those_of_the_release(shared_dir: Path) -> None:
    lines = (shared_dir / "spec/conditional_detr_state_dict.txt").read_text().splitlines()
    listed = {x.split(" [")[0] for x in lines if " [" in x and x[:5] in ("trans", "class", "bbox_")}
    cfg = load_config(str(CONDITIONAL / "conditional_detr_r50_50ep.yaml"), ["MODEL.DEVICE", "meta"])
    with torch.device("meta"):
        state = build_model(cfg).state_dict()
    names = {k for k in CONDITIONAL_DETR.to_theirs(state) if not k.startswith("backbone")}
    assert {k for k in names if k.startswith("transformer.decoder")} <= listed
    assert len(names) == 299


def test_initial_weights_are_the_authors() -> None:
    model = build(TINY, "MODEL.DECODER.HIDDEN_DIM", 64)
    bound = (6 / 128) ** 0.5  # Xavier, one square matrix
    stage = model.roi_heads.stages[1]
    for matrix in (
        *stage.self_attention.in_proj.weight.split(64),
        *stage.self_attention.position_proj.weight.split(64),
        stage.cross_attention.content_query.weight,
        stage.cross_attention.spatial_key.weight,
    ):
        assert 0.97 * bound < matrix.abs().max() <= bound
    assert (stage.self_attention.in_proj.bias != 0).any()
    assert (stage.self_attention.out_proj.bias == 0).all()
    packed = (6 / 256) ** 0.5  # Xavier, three matrices counting as one
    stage = build(TINY_DETR, "MODEL.DECODER.HIDDEN_DIM", 64).roi_heads.stages[1]
    for attention in (stage.self_attention, stage.cross_attention):
        assert 0.97 * packed < attention.in_proj.weight.abs().max() <= packed
        assert (attention.in_proj.bias == 0).all()
