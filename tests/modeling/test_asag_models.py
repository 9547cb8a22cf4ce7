"""ASAG as configurations: sizes of the paper, training steps, combinations, two processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from asag import load_config
from asag.checkpoint.asag import keep_copy
from asag.engine.launch import launch
from asag.engine.optimizer import parameter_groups

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "configs" / "ASAG"
ABLATIONS = ROOT / "projects" / "ASAG" / "ablations"
TINY = RECIPES / "asag_tiny.yaml"

# Whatever a configuration is about, small enough for a step on a CPU.
SMALL: dict[str, Any] = {
    "MODEL.DEVICE": "cpu",
    "MODEL.WEIGHTS": "",
    "MODEL.SLIM_RESNET.WIDTH": 8,
    "MODEL.FPN.OUT_CHANNELS": 16,
    "MODEL.PROPOSAL_GENERATOR.NUM_QUERIES": 7,
    "MODEL.DECODER.HIDDEN_DIM": 16,
    "MODEL.DECODER.NUM_HEADS": 2,
    "MODEL.DECODER.FFN_DIM": 32,
    "MODEL.DECODER.DYNAMIC_DIM": 4,
    "MODEL.DECODER.MIXER_IN_POINTS": 4,
    "MODEL.DECODER.MIXER_OUT_POINTS": 4,
    "MODEL.DEFORMABLE_ENCODER.NUM_LAYERS": 1,
    "MODEL.ASAG.COMPRESSED_DIM": 1,
    "MODEL.ASAG.FIXED_ANCHORS": 6,
    "MODEL.ASAG.PATCH_ANCHORS": 4,
    "MODEL.ASAG.MIN_ANCHORS": 3,
    "MODEL.ASAG.FFN_DIM": 32,
    "MODEL.ASAG.GT_WARMUP_ITERS": 1,
}


def load(path: Path, **changes: Any) -> CfgNode:
    """A configuration; `changes` has __ for the dots of a key."""
    pairs = {key.replace("__", "."): value for key, value in changes.items()}
    return load_config(str(path), [str(word) for pair in pairs.items() for word in pair])


def small(path: Path, **changes: Any) -> nn.Module:
    options = {key.replace(".", "__"): value for key, value in SMALL.items()}
    cfg = load(path, **(options | changes))
    if "fpn" in cfg.MODEL.BACKBONE.NAME:
        cfg.MODEL.BACKBONE.NAME = "build_slim_resnet_fpn_backbone"
    else:
        cfg.MODEL.BACKBONE.NAME = "build_slim_resnet"
    return build_model(cfg)


def parameters(path: Path, **changes: Any) -> int:
    """Parameters of a model that exists in name only."""
    cfg = load(path, MODEL__DEVICE="meta", **changes)
    with torch.device("meta"):
        return sum(p.numel() for p in build_model(cfg).parameters())


def inputs(num_classes: int = 1, empty: bool = False) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    result = []
    for i, (height, width) in enumerate(((96, 128), (128, 64))):
        objects = Instances((height, width))
        count = 0 if empty or i else 3
        corner = torch.rand(count, 2, generator=generator) * 40
        side = 5 + torch.rand(count, 2, generator=generator) * 20
        objects.gt_boxes = Boxes(torch.cat((corner, corner + side), dim=1))
        objects.gt_classes = torch.arange(count) % num_classes
        image = torch.rand(3, height, width, generator=generator) * 255
        result.append({"image": image, "instances": objects, "height": height, "width": width})
    return result


def configs() -> list[Path]:
    leaves = [*RECIPES.glob("asag_*.yaml"), *ABLATIONS.glob("[!B]*.yaml")]
    assert len(leaves) > 50
    return sorted(leaves)


@pytest.mark.parametrize("path", configs(), ids=lambda p: p.stem)
def test_every_configuration_trains_two_steps_and_answers(path: Path) -> None:
    torch.manual_seed(0)
    model = small(path)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(2):  # ground-truth patches first, then probing
        losses = model(inputs())
        optimizer.zero_grad()
        sum(losses.values()).backward()
        idle = [k for k, v in model.named_parameters() if v.requires_grad and v.grad is None]
        assert idle == []
        assert all(v.grad.isfinite().all() for v in model.parameters() if v.grad is not None)
        optimizer.step()
    model.eval()
    with torch.no_grad():
        for x, output in zip(inputs(), model(inputs()), strict=True):
            assert output["instances"].image_size == tuple(x["image"].shape[1:])
            assert output["instances"].scores.isfinite().all()


@pytest.mark.parametrize("empty", [False, True], ids=["objects", "empty"])
@pytest.mark.parametrize("stage", ["dynamic_conv", "adamixer"])
def test_losses_and_their_names(stage: str, empty: bool) -> None:
    model = small(TINY, MODEL__DECODER__STAGE=stage, MODEL__DECODER__NUM_AUXILIARY=2)
    losses = model(inputs(empty=empty))
    kinds = ("ce", "bbox", "giou")
    stages = ("_anchor", "_0", "_1", "_2", "")  # anchors, proposals, auxiliary copies, main copy
    assert set(losses) == {f"loss_{kind}{stage}" for kind in kinds for stage in stages}
    assert all(x.isfinite() for x in losses.values())


# Sizes


SIZES = {
    "asag_a_r50_100_1x": (111_805_026, 56_273_358),
    "asag_s_r50_100_3x": (90_705_474, 50_998_470),
    "asag_a_r50_300_3x": (112_455_676, 56_924_008),
    "asag_s_r50_300_3x": (91_356_124, 51_649_120),
    "asag_a_r101_300_3x": (131_447_804, 75_916_136),
}


@pytest.mark.parametrize("name", SIZES)
def test_parameters_are_those_of_the_published_models(name: str) -> None:
    path = RECIPES / f"{name}.yaml"
    training, deployed = SIZES[name]
    assert parameters(path) == training
    assert parameters(path, MODEL__DECODER__NUM_AUXILIARY=0) == deployed


def test_what_is_trained_and_how_fast() -> None:
    cfg = load(RECIPES / "asag_a_r50_100_1x.yaml", MODEL__DEVICE="meta")
    with torch.device("meta"):
        model = build_model(cfg)
    resnet = model.backbone.bottom_up
    assert sum(p.numel() for p in resnet.parameters()) == 23_508_032
    assert sum(p.numel() for p in resnet.parameters() if p.requires_grad) == 23_282_688
    groups = parameter_groups(
        model.named_parameters(), base_lr=2e-4, weight_decay=1e-4, backbone_multiplier=0.1
    )
    slow, fast = sorted(groups, key=lambda group: group["lr"])
    assert (slow["lr"], fast["lr"]) == pytest.approx((2e-5, 2e-4))
    assert sum(p.numel() for p in slow["params"]) == 23_282_688  # the pyramid learns like the rest


# Copies


def test_auxiliary_copies_vanish_when_they_are_not_needed() -> None:
    torch.manual_seed(0)
    model = small(TINY, MODEL__DECODER__NUM_AUXILIARY=3).eval()
    calls: list[int] = []
    for i, stage in enumerate(model.roi_heads.stages):
        stage.register_forward_hook(lambda *_, i=i: calls.append(i))
    with torch.no_grad():
        model(inputs())
        assert calls == [3]
        model.train()
        model(inputs())
    assert calls[1:] == [0, 1, 2, 3]


@pytest.mark.parametrize("copy", [0, 2, 3])
def test_a_kept_copy_is_the_deployed_model(copy: int) -> None:
    torch.manual_seed(0)
    trained = small(TINY, MODEL__DECODER__NUM_AUXILIARY=3, MODEL__DECODER__MAIN_COPY=copy).eval()
    deployed = small(TINY, MODEL__DECODER__NUM_AUXILIARY=0).eval()
    deployed.load_state_dict(keep_copy(trained.state_dict(), copy))
    with torch.no_grad():
        pairs = zip(trained(inputs()), deployed(inputs()), strict=True)
        for expected, found in pairs:
            assert torch.equal(expected["instances"].scores, found["instances"].scores)
            boxes = (x["instances"].pred_boxes.tensor for x in (expected, found))
            assert torch.equal(*boxes)
    with pytest.raises(ValueError, match="no copy 4"):
        keep_copy(trained.state_dict(), 4)


# Combinations


@pytest.mark.parametrize(
    "changes",
    [
        {"MODEL__DECODER__SELF_ATTENTION": "iou_esa"},
        {"MODEL__DECODER__DCW": True},
        {"MODEL__MATCHER__NAME": "OptimalTransportMatcher"},
        {
            "MODEL__MATCHER__NAME": "OptimalTransportMatcher",
            "MODEL__MATCHER__OT__SOLVER": "sinkhorn",
        },
        {"MODEL__ROI_HEADS__NAME": "DynamicConvHeads", "MODEL__DECODER__NUM_STAGES": 2},
        {"MODEL__PROPOSAL_GENERATOR__NAME": "LearnedProposals"},
        {"MODEL__PROPOSAL_GENERATOR__NAME": "DynamicProposals"},
        {"MODEL__ASAG__NUM_DENOISING": 12, "MODEL__DECODER__SELF_ATTENTION": "iou_esa"},
        {"MODEL__ASAG__NUM_DENOISING": 12, "MODEL__ROI_HEADS__NAME": "DynamicConvHeads"},
    ],
    ids=lambda x: "+".join(str(v) for v in x.values()),
)
def test_combinations_learn(changes: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = small(TINY, MODEL__META_ARCHITECTURE="SparseDetector", **changes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    history = []
    for _ in range(12):
        loss = sum(v for k, v in model(inputs()).items() if "dn" not in k)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(float(loss.detach()))
    assert sum(history[-3:]) < 0.9 * sum(history[:3])


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("MODEL.DECODER.SELF_ATTENTION", {"MODEL__DECODER__SELF_ATTENTION": "iou_esa"}),
        ("MODEL.MATCHER.NAME", {"MODEL__MATCHER__NAME": "OptimalTransportMatcher"}),
        ("MODEL.DECODER.STAGE", {"MODEL__DECODER__STAGE": "conv"}),
        ("MODEL.DECODER.MAIN_COPY", {"MODEL__DECODER__MAIN_COPY": 7}),
        ("MODEL.DECODER.NUM_AUXILIARY", {"MODEL__DECODER__NUM_AUXILIARY": -1}),
        ("MODEL.ASAG.IN_FEATURES", {"MODEL__ASAG__IN_FEATURES": "['p2', 'p3', 'p4']"}),
        ("MODEL.ASAG.IN_FEATURES", {"MODEL__ASAG__IN_FEATURES": "['p3', 'p4', 'p7']"}),
        ("MODEL.ROI_HEADS.IN_FEATURES", {"MODEL__ROI_HEADS__IN_FEATURES": "['p2', 'p9']"}),
        ("MODEL.DECODER.HIDDEN_DIM", {"MODEL__DECODER__HIDDEN_DIM": 32}),
        ("MODEL.ROI_BOX_HEAD.POOLER_TYPE", {"MODEL__ROI_BOX_HEAD__POOLER_TYPE": "ROIPool"}),
        ("MODEL.ASAG.ANCHOR_CAPACITY", {"MODEL__ASAG__PATCH_CAPACITY": 4}),
        ("MODEL.CRITERION.CLASS_LOSS", {"MODEL__CRITERION__CLASS_LOSS": "softmax"}),
    ],
)
def test_wrong_values_name_their_key(key: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=key.replace(".", r"\.")):
        small(TINY, **changes)


def test_trained_norms_need_fixed_statistics() -> None:
    with pytest.raises(ValueError, match=r"MODEL\.RESNETS\.NORM"):
        build_model(load(RECIPES / "asag_s_r50_100_1x.yaml", MODEL__RESNETS__NORM="BN"))


# Batches, precision, resuming


@pytest.mark.parametrize("capacity", [0, 12])
def test_an_image_gets_in_a_batch_what_it_gets_alone(capacity: int) -> None:
    torch.manual_seed(0)
    model = small(
        TINY,
        MODEL__ASAG__PATCH_CAPACITY=capacity,
        MODEL__ASAG__ANCHOR_CAPACITY=4 * capacity,
        MODEL__ASAG__MIN_SIDE=0.0,
    ).eval()
    # The norms of the backbone see padding as pixels; the comparison is about what follows them.
    batch = inputs()
    batch[1]["image"] = torch.rand(3, 96, 128) * 255
    with torch.no_grad():
        together = [x["instances"] for x in model(batch)]
        for x, expected in zip(batch, together, strict=True):
            found = model([x])[0]["instances"]
            assert len(found) == len(expected)
            torch.testing.assert_close(found.scores, expected.scores, atol=1e-5, rtol=1e-4)


def test_half_precision_trains() -> None:
    model = small(TINY)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(inputs())
    sum(losses.values()).backward()
    assert all(x.isfinite() and x.dtype == torch.float32 for x in losses.values())


def test_warmup_is_counted_and_saved() -> None:
    model = small(TINY, MODEL__ASAG__GT_WARMUP_ITERS=2)
    seen: list[bool] = []
    generator = model.proposal_generator.generator
    generator.register_forward_hook(
        lambda _, args, output: seen.append(
            any((x.kind == 0).logical_and(x.valid).any() for x in output.probed)
        )
    )
    for _ in range(3):
        model(inputs())
    assert seen[:2] == [False, False]
    assert int(model.state_dict()["proposal_generator.steps"]) == 3
    model.eval()(inputs())
    assert int(model.proposal_generator.steps) == 3


def test_published_weights_are_past_the_warmup() -> None:
    model = small(TINY, MODEL__ASAG__GT_WARMUP_ITERS=5)
    state = model.state_dict()
    del state["proposal_generator.steps"]
    model.load_state_dict(state)
    assert int(model.proposal_generator.steps) == 5


# Two processes


def work(folder: str) -> int:
    """One of two processes: rank 1 has neither objects nor anything to probe."""
    torch.manual_seed(0)
    model = small(
        TINY,
        MODEL__ASAG__MIN_TRAIN_PATCHES=0,
        MODEL__ASAG__GT_WARMUP_ITERS=0,
        MODEL__ASAG__ETA_L=0.0,
        MODEL__ASAG__ETA_H=1.0,
    )
    rank = comm.get_rank()
    generator = model.proposal_generator.generator
    if rank == 1:
        generator.rules = type(generator.rules)(eta_l=0.9, eta_h=0.9, min_anchors=3)
    probed: list[int] = []
    generator.register_forward_hook(
        lambda _, args, output: probed.append(sum(int(x.valid.sum()) for x in output.probed))
    )
    parallel = DistributedDataParallel(model)  # without find_unused_parameters
    for _ in range(3):  # an idle parameter of one step makes the next one raise
        losses = parallel(inputs(empty=rank == 1))
        sum(losses.values()).backward()
    gradients = [float(p.grad.abs().sum()) for p in model.parameters() if p.grad is not None]
    report = {
        "gradients": gradients,
        "probed": probed,
        "finite": bool(torch.tensor(gradients).isfinite().all()),
    }
    (Path(folder) / f"rank{rank}.json").write_text(json.dumps(report))
    return 0


def test_a_process_may_have_nothing_to_probe(tmp_path: Path) -> None:
    assert launch(work, (str(tmp_path),), processes=2) == 0
    first, second = (json.loads((tmp_path / f"rank{i}.json").read_text()) for i in (0, 1))
    assert min(first["probed"]) > 0 and max(second["probed"]) == 0
    assert first["finite"] and first["gradients"] == pytest.approx(second["gradients"], rel=1e-4)
