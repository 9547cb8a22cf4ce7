"""Configuration: unknown keys, wrong values, numbers of the right type."""

from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model

from asag import get_asag_cfg, load_config

ROOT = Path(__file__).resolve().parents[1]
TINY = str(ROOT / "configs/SparseRCNN/sparse_rcnn_tiny.yaml")
CONFIGS = sorted(p for p in ROOT.glob("configs/*/*.yaml") if not p.name.startswith("Base"))


def build(*options):
    return build_model(load_config(TINY, ["MODEL.DEVICE", "cpu", *options]))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_configuration_loads(path):
    cfg = load_config(str(path))
    assert cfg.MODEL.META_ARCHITECTURE != "GeneralizedRCNN"
    assert isinstance(cfg.SOLVER.EPOCHS, float)


def test_an_unknown_key_of_a_file_is_named_with_its_neighbours(tmp_path):
    path = tmp_path / "typo.yaml"
    path.write_text(f'_BASE_: "{TINY}"\nMODEL:\n  DECODER:\n    NUM_STAGE: 3\n')
    with pytest.raises(KeyError, match=r"MODEL\.DECODER\.NUM_STAGE in .*typo.*DECODER\.NUM_STAGES"):
        load_config(str(path))


def test_an_unknown_key_of_the_command_line_is_named():
    with pytest.raises(KeyError, match=r"SOLVER\.EPOCH in the command line.*SOLVER\.EPOCHS"):
        load_config(TINY, ["SOLVER.EPOCH", "3"])


def test_overrides_come_in_pairs():
    with pytest.raises(ValueError, match="KEY VALUE"):
        load_config(TINY, ["SOLVER.EPOCHS"])


def test_whole_numbers_become_floats(tmp_path):
    path = tmp_path / "whole.yaml"
    path.write_text(f'_BASE_: "{TINY}"\nMODEL:\n  MATCHER:\n    L1_COST: 7\n')
    cfg = load_config(str(path), ["SOLVER.EPOCHS", "12", "MODEL.DECODER.DROPOUT", "0"])
    for value, expected in (
        (cfg.MODEL.MATCHER.L1_COST, 7.0),
        (cfg.SOLVER.EPOCHS, 12.0),
        (cfg.MODEL.DECODER.DROPOUT, 0.0),
    ):
        assert type(value) is float and value == expected


@pytest.mark.parametrize(
    "key, value",
    [("MODEL.DECODER.NUM_STAGES", "six"), ("MODEL.DECODER.NUM_STAGES", "2.5"),
     ("SOLVER.EPOCHS", "long"), ("MODEL.COMPILE", "3")],
)  # fmt: skip
def test_values_of_the_wrong_type_are_refused_by_name(key, value):
    with pytest.raises(ValueError, match=key.rsplit(".", 1)[-1]):
        load_config(TINY, [key, value])


def test_later_values_win_and_the_defaults_stay():
    options = ["MODEL.DECODER.NUM_STAGES", "2", "MODEL.DECODER.NUM_STAGES", "4"]
    assert load_config(TINY, options).MODEL.DECODER.NUM_STAGES == 4
    assert get_asag_cfg().MODEL.DECODER.NUM_STAGES == 6


@pytest.mark.parametrize(
    "key, value",
    [
        ("MODEL.PROPOSAL_GENERATOR.NAME", "RPN"),
        ("MODEL.ROI_HEADS.NAME", "StandardROIHeads"),
        ("MODEL.MATCHER.NAME", "Greedy"),
        ("MODEL.CRITERION.NAME", "Hinge"),
        ("MODEL.CRITERION.CLASS_LOSS", "hinge"),
        ("MODEL.CRITERION.L1_FORMAT", "xywh"),
        ("MODEL.CRITERION.NORMALISER", "images"),
        ("MODEL.DECODER.ACTIVATION", "swish"),
        ("MODEL.DECODER.SELF_ATTENTION", "linear"),
        ("MODEL.DECODER.NUM_STAGES", "0"),
        ("MODEL.DECODER.NUM_HEADS", "7"),
        ("MODEL.DECODER.HIDDEN_DIM", "32"),
        ("MODEL.ROI_HEADS.IN_FEATURES", "['p2','p9']"),
        ("MODEL.ROI_HEADS.IN_FEATURES", "['p2','p4']"),
        ("MODEL.SLIM_RESNET.NORM", "LN"),
        ("MODEL.SLIM_RESNET.BLOCKS", "(1,1,1)"),
    ],
)
def test_wrong_values_fail_at_build_time_and_name_their_key(key, value):
    with pytest.raises(ValueError, match=key.replace(".", r"\.")):
        build(key, value)


def test_a_free_combination_needs_the_free_architecture():
    softmax = ["MODEL.CRITERION.CLASS_LOSS", "softmax"]
    assert build(*softmax).roi_heads.stages[0].class_logits.out_features == 6
    with pytest.raises(ValueError, match="SparseDetector"):
        build("MODEL.DECODER.SELF_ATTENTION", "none")


@pytest.mark.parametrize("norm", ["BN", "GN"])
def test_slim_backbone_learns_in_every_norm(norm):
    model = build("MODEL.SLIM_RESNET.NORM", norm, "MODEL.SLIM_RESNET.BLOCKS", "(1,2,1,1)")
    features = model.backbone(torch.randn(1, 3, 64, 64))
    sum(x.sum() for x in features.values()).backward()
    body = model.backbone.bottom_up
    assert all(p.grad is not None for p in body.parameters())
    assert [features[f"p{i}"].shape[-1] for i in range(2, 7)] == [16, 8, 4, 2, 1]
