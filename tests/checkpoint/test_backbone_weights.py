"""ImageNet weights of residual networks load through MODEL.WEIGHTS, whoever named them."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.modeling import build_model
from torch import Tensor, nn
from torchvision.models import resnet50

from asag import load_config
from asag.checkpoint.loading import PublishedCheckpointer
from asag.checkpoint.mapping import NameTable
from asag.checkpoint.resnet import image_classifier_to_ours, torchvision_rules, transformers_rules

ROOT = Path(__file__).resolve().parents[2]
SMALL: list[Any] = [
    *("MODEL.DEVICE", "cpu"),
    *("MODEL.WEIGHTS", ""),
    *("MODEL.DECODER.NUM_STAGES", 1),
    *("MODEL.DECODER.HIDDEN_DIM", 64),
    *("MODEL.DECODER.FFN_DIM", 64),
    *("MODEL.ENCODER.NUM_LAYERS", 1),
]
CONFIGS = {
    "SparseRCNN/sparse_rcnn_r50_100pro_3x.yaml": "backbone.bottom_up.",
    "ASAG/asag_s_r50_100_1x.yaml": "backbone.bottom_up.",
    "DETR/detr_r50_50ep.yaml": "backbone.",
    "ConditionalDETR/conditional_detr_dc5_r50_50ep.yaml": "backbone.",
}


def build(name: str) -> nn.Module:
    options = [*SMALL, "MODEL.FPN.OUT_CHANNELS", 64] if name.startswith("Sparse") else SMALL
    if name.startswith("ASAG"):
        options = SMALL[:4]
    torch.manual_seed(1)
    return build_model(load_config(str(ROOT / "configs" / name), [str(x) for x in options]))


@pytest.fixture(scope="module")
def torchvision_state() -> dict[str, Tensor]:
    """As `torch.save(resnet50().state_dict())` leaves it: with the versions of its modules, and no
    value at zero or one."""
    torch.manual_seed(0)
    network = resnet50()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 1.5)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_()
    return network.state_dict()


def expected(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """By a table written for the eye: layer1.0.bn2.weight -> res2.0.conv2.norm.weight."""
    found = {}
    for name, value in state.items():
        if name.startswith("fc.") or name.endswith("num_batches_tracked"):
            continue
        head, *rest = name.split(".")
        if head.startswith("layer"):
            block, part, *rest = rest
            where = f"res{int(head[5]) + 1}.{block}."
        else:
            where, part = "stem.", head
        if part == "downsample":
            part, rest = ("shortcut", rest[1:]) if rest[0] == "0" else ("shortcut.norm", rest[1:])
        elif part.startswith("bn"):
            part = f"conv{part[2]}.norm"
        found[f"{prefix}{where}{part}.{'.'.join(rest)}"] = value
    return found


def check(model: nn.Module, prefix: str, state: dict[str, Tensor]) -> None:
    loaded = {k: v for k, v in model.state_dict().items() if ".stem." in k or ".res" in k}
    wanted = expected(state, prefix)
    assert loaded.keys() == wanted.keys() and len(wanted) == 265
    assert all(torch.equal(loaded[k], wanted[k]) for k in wanted)


@pytest.mark.parametrize("name", CONFIGS)
def test_torchvision(name: str, torchvision_state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(torchvision_state, tmp_path / "resnet50.pth")
    model = build(name)
    others = {k: v.clone() for k, v in model.roi_heads.state_dict().items()}
    PublishedCheckpointer(model).load(str(tmp_path / "resnet50.pth"))
    check(model, CONFIGS[name], torchvision_state)
    assert all(torch.equal(v, others[k]) for k, v in model.roi_heads.state_dict().items())


@pytest.mark.parametrize("name", ["SparseRCNN/sparse_rcnn_r50_100pro_3x.yaml", *list(CONFIGS)[2:3]])
def test_detectron2(name: str, torchvision_state: dict[str, Tensor], tmp_path: Path) -> None:
    """The file that every configuration names: pickled arrays that Detectron2 matches by name."""
    arrays = {k: v.numpy() for k, v in expected(torchvision_state, "").items()}
    file = {"model": arrays, "__author__": "torchvision", "matching_heuristics": True}
    with open(tmp_path / "R-50.pkl", "wb") as opened:
        pickle.dump(file, opened)
    model = build(name)
    PublishedCheckpointer(model).load(str(tmp_path / "R-50.pkl"))
    check(model, CONFIGS[name], torchvision_state)


def test_transformers_network_has_the_same_places(torchvision_state: dict[str, Tensor]) -> None:
    ours = expected(torchvision_state, "backbone.")
    table = NameTable(source="", rules=transformers_rules("resnet.", "backbone."))
    theirs = table.to_theirs(ours) | {"classifier.1.weight": torch.ones(1)}
    assert "resnet.encoder.stages.3.layers.2.layer.1.normalization.running_var" in theirs
    found = image_classifier_to_ours(theirs, ours)
    assert found.keys() == ours.keys() and all(found[k] is ours[k] for k in ours)


def test_names_come_back(torchvision_state: dict[str, Tensor]) -> None:
    table = NameTable(source="", rules=torchvision_rules("x.", "backbone."))
    ours = expected(torchvision_state, "backbone.")
    theirs = {k.removeprefix("x.") for k in table.to_theirs(ours)}
    counted = {k for k in torchvision_state if not k.endswith("num_batches_tracked")}
    assert theirs == {k for k in counted if not k.startswith("fc.")}


def test_what_does_not_fit_is_said(torchvision_state: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match=r"the model has none; choose MODEL\.BACKBONE\.NAME"):
        image_classifier_to_ours(torchvision_state, ["backbone.features.0.weight"])
    strange = torchvision_state | {"layer1.0.se.weight": torch.ones(1)}
    with pytest.raises(ValueError, match=r"no place for .*layer1\.0\.se\.weight"):
        image_classifier_to_ours(strange, ["backbone.stem.conv1.weight"])
