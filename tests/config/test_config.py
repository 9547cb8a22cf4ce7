"""Configuration: unknown keys, wrong values, numbers of the right type."""

import math
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model

from asag import get_asag_cfg, load_config
from asag.config.rules import RULES, Each, OneOf, check_config
from asag.modeling.layers.feed_forward import ACTIVATIONS
from asag.modeling.layers.roi_align import LEVEL_EPS
from asag.modeling.meta_arch import INFERENCE_DTYPES
from asag.modeling.roi_heads.asag.heads import STAGES
from train_net import main

ROOT = Path(__file__).resolve().parents[2]
TINY = str(ROOT / "configs/SparseRCNN/sparse_rcnn_tiny.yaml")
CONFIGS = sorted(p for p in ROOT.glob("configs/*/*.yaml") if not p.name.startswith("Base"))


def build(*options):
    return build_model(load_config(TINY, ["MODEL.DEVICE", "cpu", *options]))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_configuration_loads(path):
    cfg = load_config(str(path))
    assert cfg.MODEL.META_ARCHITECTURE != "GeneralizedRCNN"
    assert isinstance(cfg.SOLVER.EPOCHS, float)


def test_an_unknown_key_of_a_file_is_named_with_its_neighbors(tmp_path):
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
        ("MODEL.CRITERION.NORMALIZER", "images"),
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
    model = build(
        "MODEL.SLIM_RESNET.WIDTH",
        "32",
        "MODEL.SLIM_RESNET.NORM",
        norm,
        "MODEL.SLIM_RESNET.BLOCKS",
        "(1,2,1,1)",
    )
    features = model.backbone(torch.randn(1, 3, 64, 64))
    sum(x.sum() for x in features.values()).backward()
    body = model.backbone.bottom_up
    assert all(p.grad is not None for p in body.parameters())
    assert [features[f"p{i}"].shape[-1] for i in range(2, 7)] == [16, 8, 4, 2, 1]


def numeric_keys():
    """Keys of the library whose values are numbers or lists of numbers: new ones, and Detectron2's
    with another default."""
    theirs = dict(leaves(get_cfg()))
    for key, value in leaves(get_asag_cfg()):
        numbers = value if isinstance(value, list | tuple) else [value]
        textual = any(isinstance(x, str | bool) for x in numbers)
        if (key not in theirs or theirs[key] != value) and not textual:
            yield key


def leaves(node, prefix=""):
    for name, value in node.items():
        if isinstance(value, CfgNode):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def just_outside(rule):
    """Values that the rule must refuse."""
    if isinstance(rule, Each):
        size = rule.length or max(rule.least, 1)
        wrong = [(x,) * size for x in just_outside(rule.item)]
        good = rule.item.choices[0] if isinstance(rule.item, OneOf) else 1
        if rule.length or math.isfinite(rule.most):
            wrong.append((good,) * (int(rule.length or rule.most) + 1))
        return [*wrong, ()] if rule.least else wrong
    if isinstance(rule, OneOf):
        return ["no-such-choice", "", 1, None]
    values = [math.nan, math.inf, "three", True]
    if math.isfinite(rule.low):
        values += [rule.low if rule.without_low else rule.low - 1e-3, int(rule.low) - 1]
    if math.isfinite(rule.high):
        values += [rule.high if rule.without_high else rule.high + 1e-3, int(rule.high) + 1]
    if rule.whole:
        values.append(max(rule.low, 1) + 0.5)
    return values


def with_value(cfg, key, value):
    *parents, leaf = key.split(".")
    node = cfg
    for name in parents:
        node = node[name]
    node[leaf] = value
    return cfg


def test_every_number_of_the_library_has_a_range():
    missing = sorted(set(numeric_keys()) - RULES.keys())
    assert missing == [], "add a line each to RULES in asag/config/rules.py"


def test_every_range_is_of_a_key_and_holds_its_default():
    check_config(get_asag_cfg())
    assert RULES.keys() <= dict(leaves(get_asag_cfg())).keys()


@pytest.mark.parametrize("key", RULES)
def test_values_out_of_range_are_refused_with_key_and_range(key):
    for value in just_outside(RULES[key]):
        cfg = with_value(get_asag_cfg(), key, value)
        with pytest.raises(ValueError) as caught:
            check_config(cfg)
        assert str(caught.value) == f"{key} is {value!r}; it must be {RULES[key].text}"


def test_every_name_of_the_library_has_a_rule_or_a_registry():
    """Texts are choices, except for names of components, feature maps, files and projects."""
    free = {"MODEL.NECK.NAME", "MODEL.MATCHER.NAME", "MODEL.CRITERION.NAME", "LOGGING.WANDB"}
    free |= {"MODEL.ENCODER.IN_FEATURE", "MODEL.TIMM.NAME", "MODEL.TIMM.WEIGHTS"}
    theirs = dict(leaves(get_cfg()))
    ours = {
        key for key, value in leaves(get_asag_cfg()) if isinstance(value, str) and key not in theirs
    }
    assert ours - RULES.keys() == free - theirs.keys()


def test_choices_are_those_of_the_components():
    choices = {
        "MODEL.DECODER.STAGE": STAGES,
        "MODEL.DECODER.ACTIVATION": ACTIVATIONS,
        "MODEL.ROI_BOX_HEAD.POOLER_TYPE": LEVEL_EPS,
        "MODEL.INFERENCE_DTYPE": INFERENCE_DTYPES,
    }
    for key, table in choices.items():
        assert set(RULES[key].choices) == set(table), key


@pytest.mark.parametrize("key", RULES)
def test_bounds_that_belong_to_a_range_pass(key):
    rule = RULES[key]
    numbers = rule.item if isinstance(rule, Each) else rule
    if isinstance(numbers, OneOf):
        for choice in numbers.choices:
            value = (choice,) if isinstance(rule, Each) else choice
            check_config(with_value(get_asag_cfg(), key, value))
        return
    for bound, out in ((numbers.low, numbers.without_low), (numbers.high, numbers.without_high)):
        if math.isfinite(bound) and not out:
            value = type(bound)(bound)
            listed = (value,) * (rule.length or 1) if isinstance(rule, Each) else value
            check_config(with_value(get_asag_cfg(), key, listed))


@pytest.mark.parametrize(
    "key, value",
    [
        ("MODEL.PROPOSAL_GENERATOR.NUM_QUERIES", "0"),
        ("MODEL.ROI_HEADS.NUM_CLASSES", "0"),
        ("MODEL.PIXEL_STD", "[58.0, 0.0, 57.0]"),
        ("MODEL.MATCHER.L1_COST", "-1"),
        ("MODEL.CRITERION.FOCAL_ALPHA", "2"),
        ("MODEL.DECODER.PRIOR_PROB", "0"),
        ("SOLVER.BASE_LR", "0"),
        ("INPUT.FORMAT", "XYZ"),
    ],
)
def test_no_model_is_built_from_a_value_out_of_range(key, value):
    with pytest.raises(ValueError, match=rf"{key} is .*; it must be "):
        build(key, value)


def test_all_wrong_values_are_named_at_once():
    options = ["MODEL.DECODER.FFN_DIM", "0", "TEST.DETECTIONS_PER_IMAGE", "0"]
    with pytest.raises(ValueError, match=r"FFN_DIM is 0.*\n.*DETECTIONS_PER_IMAGE is 0"):
        build(*options)


def test_a_configuration_without_the_keys_says_how_to_get_them():
    with pytest.raises(KeyError, match=r"add_asag_config"):
        check_config(get_cfg())


def test_the_command_line_checks_before_it_touches_data(tmp_path, capsys):
    folder = tmp_path / "absent"
    words = ["--data", str(folder), "OUTPUT_DIR", str(tmp_path / "out"), "SOLVER.EPOCHS", "-1"]
    assert main(words) == 2
    assert "SOLVER.EPOCHS is -1.0; it must be 0 or more" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
