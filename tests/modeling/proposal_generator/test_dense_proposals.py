"""Queries from a region proposal network: what they hold, what trains them, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import study
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from asag import load_config
from asag.modeling.proposal_generator import DenseProposals
from asag.structures import ImageSizes, Queries, Targets

ROOT = Path(__file__).resolve().parents[3]

RECIPES = ROOT / "configs/ASAG"
HW = ((96, 128), (90, 70))
STRIDES = {"p2": 4, "p3": 8, "p4": 16, "p5": 32, "p6": 64}
SMALL: dict[str, Any] = {
    "MODEL.DEVICE": "cpu",
    "MODEL.WEIGHTS": "",
    "MODEL.BACKBONE.NAME": "build_slim_resnet_fpn_backbone",
    "MODEL.SLIM_RESNET.WIDTH": 8,
    "MODEL.FPN.OUT_CHANNELS": 16,
    "MODEL.ROI_HEADS.NUM_CLASSES": 3,
    "MODEL.DECODER.HIDDEN_DIM": 16,
    "MODEL.DECODER.NUM_HEADS": 2,
    "MODEL.DECODER.FFN_DIM": 32,
    "MODEL.DECODER.DYNAMIC_DIM": 4,
    "MODEL.ASAG.FFN_DIM": 32,
    "MODEL.PROPOSAL_GENERATOR.NUM_QUERIES": 12,
}


def config(name: str = "dense_tiny", **changes: Any) -> CfgNode:
    """A configuration made small; `changes` has __ for the dots of a key."""
    options = SMALL | {key.replace("__", "."): value for key, value in changes.items()}
    words = [str(word) for pair in options.items() for word in pair]
    return load_config(str(RECIPES / f"{name}.yaml"), words)


def detector(name: str = "dense_tiny", **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    return build_model(config(name, **changes))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """In evaluation mode, with proposals that differ in place, size and score."""
    model = detector().eval()
    head = model.proposal_generator.rpn.rpn_head
    for layer, std in ((head.objectness_logits, 0.5), (head.anchor_deltas, 0.1)):
        nn.init.normal_(layer.weight, std=std)
    return model


def features(batch: int = 2, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(batch, 16, -(-96 // s), 128 // s, generator=g)
        for name, s in STRIDES.items()
    }


def sizes(hw: tuple[tuple[int, int], ...] = HW) -> ImageSizes:
    return ImageSizes.from_hw(hw, (96, 128))


def targets(counts: tuple[int, ...]) -> Targets:
    g = torch.Generator().manual_seed(0)
    low = [torch.rand(n, 2, generator=g) * 40 for n in counts]
    boxes = [torch.cat((x, x + 25), dim=1) for x in low]
    labels = [torch.arange(n) % 3 for n in counts]
    return Targets.from_lists(boxes, labels, sizes().whwh)


def inputs(counts: tuple[int, ...] = (3, 2)) -> list[dict[str, Any]]:
    gt, g = targets(counts), torch.Generator().manual_seed(1)
    samples = []
    for b, (hw, count) in enumerate(zip(HW, counts, strict=True)):
        instances = Instances(hw)
        instances.gt_boxes = Boxes(gt.boxes_xyxy[b, :count])
        instances.gt_classes = gt.labels[b, :count]
        image = torch.rand(3, *hw, generator=g) * 255
        samples.append({"image": image, "instances": instances})
    return samples


class FixedProposals(nn.Module):
    """Stands for the network: `counts` boxes of growing size an image."""

    def __init__(self, *counts: int) -> None:
        super().__init__()
        self.counts = counts

    def forward(
        self, images: ImageList, features: Any, gt: Any
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        found = []
        for hw, count in zip(images.image_sizes, self.counts, strict=True):
            side = 10.0 + torch.arange(count)[:, None]
            boxes = torch.cat((torch.ones(count, 2), 1 + side, 1 + side), dim=1)
            found.append(Instances(hw, proposal_boxes=Boxes(boxes)))
        return found, {}


def with_proposals(model: nn.Module, *counts: int) -> DenseProposals:
    whole = model.proposal_generator
    return DenseProposals(
        rpn=FixedProposals(*counts),
        block=whole.block,
        block_features=whole.block_features,
        num_queries=whole.num_queries,
    ).eval()


# What the queries hold


@torch.no_grad()
def test_queries_are_the_best_proposals(model: nn.Module) -> None:
    generator, maps = model.proposal_generator, features()
    queries, losses = generator(maps, sizes())
    assert losses == {} and queries.content.shape == (2, 12, 16)
    assert queries.valid.all() and queries.all_valid and queries.mask is None
    boxes, counts, _ = generator.propose(maps, sizes())
    proposals, _ = generator.rpn(ImageList(torch.zeros(2, 3, 96, 128), list(HW)), maps)
    for b, found in enumerate(proposals):
        assert (found.objectness_logits.diff() <= 0).all(), "the best come first"
        assert torch.equal(boxes[b], found.proposal_boxes.tensor[:12])
        assert (boxes[b] <= sizes().whwh[b]).all() and counts[b] == 12


@torch.no_grad()
def test_the_block_starts_from_the_proposals(model: nn.Module) -> None:
    """Its regression starts at zero: the queries' boxes are the proposals."""
    boxes, _, _ = model.proposal_generator.propose(features(), sizes())
    queries, _ = model.proposal_generator(features(), sizes())
    torch.testing.assert_close(queries.boxes_xyxy, boxes, rtol=0, atol=1e-2)
    assert torch.equal(queries.boxes_xyxy, queries.proposal_boxes_xyxy)
    assert queries.proposal_logits.shape == (2, 12, 3)


@torch.no_grad()
def test_missing_proposals_are_padding(model: nn.Module) -> None:
    boxes, counts, _ = with_proposals(model, 20, 5).propose(features(), sizes())
    queries, _ = with_proposals(model, 20, 5)(features(), sizes())
    assert counts == [12, 5] and not queries.all_valid
    assert queries.valid.sum(dim=1).tolist() == [12, 5] and queries.valid[1, :5].all()
    assert torch.equal(boxes[1, :5, 2], 11.0 + torch.arange(5))
    assert torch.equal(boxes[1, 5:], torch.tensor([0.0, 0, 70, 90]).expand(7, 4))


@torch.no_grad()
def test_padding_changes_nothing_for_the_others(model: nn.Module) -> None:
    maps = {name: x[1:] for name, x in features().items()}
    padded, _ = with_proposals(model, 5)(maps, sizes(HW[1:]))
    exact = with_proposals(model, 5)
    exact.num_queries = 5
    exact, _ = exact(maps, sizes(HW[1:]))
    assert exact.all_valid and not padded.all_valid
    for name in ("content", "proposal_logits", "boxes_xyxy"):
        found, expected = getattr(padded, name)[:, :5], getattr(exact, name)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_an_image_without_proposals_keeps_one_query(model: nn.Module) -> None:
    queries, _ = with_proposals(model, 0, 3)(features(), sizes())
    assert queries.valid.sum(dim=1).tolist() == [1, 3]
    whole = torch.tensor([0.0, 0, 128, 96])
    torch.testing.assert_close(queries.boxes_xyxy[0, 0], whole, rtol=0, atol=1e-2)
    assert queries.content.isfinite().all()


@torch.no_grad()
def test_evaluation_is_deterministic_and_the_same_in_a_batch(model: nn.Module) -> None:
    generator, equal = model.proposal_generator, (HW[0], HW[0])
    together, again = (generator(features(), sizes(equal))[0] for _ in range(2))
    assert torch.equal(together.content, again.content)
    for b in range(2):
        single = {name: x[b : b + 1] for name, x in features().items()}
        alone, _ = generator(single, sizes(equal[:1]))
        for x, y in zip(fields(alone), fields(together), strict=True):
            torch.testing.assert_close(x[0], y[b], rtol=1e-3, atol=1e-3)


def fields(queries: Queries) -> tuple[Tensor, Tensor, Tensor]:
    return queries.content, queries.boxes_xyxy, queries.proposal_logits


# Training


@pytest.mark.parametrize("counts", [(3, 2), (3, 0), (0, 0)], ids=["objects", "one", "none"])
def test_losses_of_network_block_and_stage(counts: tuple[int, ...]) -> None:
    model = detector()
    losses = model(inputs(counts))
    kinds = {f"loss_{kind}{stage}" for kind in ("ce", "bbox", "giou") for stage in ("_0", "")}
    assert set(losses) == {"loss_rpn_cls", "loss_rpn_loc"} | kinds
    assert all(x.isfinite() for x in losses.values())
    assert bool(losses["loss_rpn_loc"] > 0) == (counts != (0, 0))
    sum(losses.values()).backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_network_and_block_learn_from_their_own_losses() -> None:
    model = detector()
    losses = model(inputs())
    network = model.proposal_generator.rpn.rpn_head
    content = model.proposal_generator.block.project
    own = [name for name in losses if "rpn" in name]
    others = [name for name in losses if "rpn" not in name]
    sum(losses[name] for name in others).backward(retain_graph=True)
    assert all(p.grad is None for p in network.parameters()), "boxes carry no gradient"
    assert content.weight.grad.abs().sum() > 0
    before = content.weight.grad.clone()
    sum(losses[name] for name in own).backward()
    assert all(p.grad.abs().sum() > 0 for p in network.parameters())
    assert torch.equal(content.weight.grad, before)


def test_the_network_learns_where_objects_are() -> None:
    generator = detector().proposal_generator
    optimizer = torch.optim.AdamW(generator.rpn.parameters(), lr=0.02)
    history = []
    for _ in range(12):
        _, losses = generator(features(), sizes(), targets((3, 2)))
        total = losses["loss_rpn_cls"] + losses["loss_rpn_loc"]
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        history.append(float(total.detach()))
    assert sum(history[-3:]) < 0.8 * sum(history[:3])


def test_the_network_counts_its_anchors_in_the_storage_of_a_trainer() -> None:
    generator = detector().proposal_generator
    with EventStorage() as storage:
        generator(features(), sizes(), targets((3, 2)))
    assert storage.latest()["rpn/num_pos_anchors"][0] > 0


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_half_precision(model: nn.Module, training: bool) -> None:
    model = detector() if training else model
    with torch.autocast("cpu", torch.bfloat16):
        found = model(inputs())
    values = found.values() if training else [x["instances"].scores for x in found]
    assert all(x.isfinite().all() for x in values)


def test_training_needs_targets() -> None:
    with pytest.raises(ValueError, match="needs targets"):
        detector().proposal_generator(features(), sizes())


# Configurations


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("MODEL.RPN.IN_FEATURES", {"MODEL__RPN__IN_FEATURES": "['p2','p9']"}),
        ("MODEL.ANCHOR_GENERATOR.SIZES", {"MODEL__ANCHOR_GENERATOR__SIZES": "[[8],[16]]"}),
        ("MODEL.RPN.POST_NMS_TOPK_TEST", {"MODEL__RPN__POST_NMS_TOPK_TEST": 5}),
        ("MODEL.RPN.POST_NMS_TOPK_TRAIN", {"MODEL__RPN__POST_NMS_TOPK_TRAIN": 5}),
        ("MODEL.DECODER.HIDDEN_DIM", {"MODEL__DECODER__HIDDEN_DIM": 32}),
    ],
)
def test_wrong_values_name_their_key(key: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=key.replace(".", r"\.")):
        detector(**changes)


@pytest.mark.parametrize(
    ("name", "changes", "predictions"),
    [
        ("dense_tiny", {}, 2),
        ("dense_tiny", {"MODEL__DECODER__NUM_STAGES": 2}, 3),
        ("dense_tiny", {"MODEL__DECODER__SELF_ATTENTION": "iou_esa"}, 2),
        ("dense_tiny", {"MODEL__MATCHER__NAME": "OptimalTransportMatcher"}, 2),
        ("dense_tiny", {"MODEL__CRITERION__NAME": "QueryWeightingCriterion"}, 2),
        ("dense_tiny", {"MODEL__CRITERION__CLASS_LOSS": "softmax"}, 2),
        (
            "dense_tiny",
            {"MODEL__ROI_HEADS__NAME": "ParallelHeads", "MODEL__DECODER__STAGE": "adamixer"},
            2,
        ),
        ("dense_r50_100_3x", {}, 2),
        ("sparse_rcnn_6_tiny", {}, 6),
        ("adamixer_6_tiny", {}, 6),
    ],
)
def test_configurations_train_and_answer(
    name: str, changes: dict[str, Any], predictions: int
) -> None:
    model = detector(name, **changes)
    losses = model(inputs((2, 0)))
    assert sum(key.startswith("loss_giou") for key in losses) == predictions
    sum(losses.values()).backward()
    idle = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert idle == []
    with torch.no_grad():
        for output in model.eval()(inputs()):
            assert output["instances"].scores.isfinite().all()


def test_variants_of_the_study_share_what_is_not_compared(tmp_path: Path) -> None:
    runs = study.plan_runs(study.read_study(ROOT / "projects/ASAG/small.study"), tmp_path)
    runs = [run for run in runs if run.data == "shapes" and run.seed == 1]
    assert len(runs) == 6
    first, *others = (
        load_config(run.command[1], [*run.command[2:], "OUTPUT_DIR", "same"]) for run in runs
    )
    for cfg in others:
        for part in ("BACKBONE", "SLIM_RESNET", "FPN"):
            assert cfg.MODEL[part] == first.MODEL[part]
        assert (cfg.INPUT, cfg.SOLVER, cfg.DATASETS) == (first.INPUT, first.SOLVER, first.DATASETS)
        if cfg.MODEL.META_ARCHITECTURE == "SparseDetector":
            assert cfg.MODEL.PROPOSAL_GENERATOR.NUM_QUERIES == first.MODEL.ASAG.MAX_ANCHORS
