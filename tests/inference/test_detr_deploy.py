"""Detectors prepared for inference answer as before: every model of the library, every option."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling import build_model
from torch import Tensor, nn

from asag import load_config
from asag.inference.deploy import fold_batch_norms, prepare_for_inference

ROOT = Path(__file__).resolve().parents[2]
TINY = sorted(ROOT.glob("configs/*/*_tiny.yaml"))


MOST_STAGES = 3  # untrained stages multiply a rounding error, each by up to ten


def build(path: Path) -> nn.Module:
    torch.manual_seed(0)
    stages = min(load_config(str(path)).MODEL.DECODER.NUM_STAGES, MOST_STAGES)
    options = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.DECODER.NUM_STAGES", str(stages)]
    model = build_model(load_config(str(path), options)).eval()
    for m in model.modules():
        if hasattr(m, "running_mean"):  # a norm at its start would hide what folding does
            m.running_mean.normal_(std=0.2)
            m.running_var.uniform_(0.5, 1.5)
            m.weight.data.uniform_(0.7, 1.3)
            m.bias.data.normal_(std=0.2)
    return model


def images() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((128, 160), (97, 120))
    return [{"image": torch.rand(3, *hw, generator=generator) * 255} for hw in sizes]


@torch.no_grad()
def detect(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    found = [x["instances"] for x in model(images())]
    return [(x.scores, x.pred_boxes.tensor) for x in found]


def assert_close(actual: list, expected: list, score: float, pixels: float) -> None:
    for (a_scores, a_boxes), (b_scores, b_boxes) in zip(actual, expected, strict=True):
        assert a_scores.dtype == a_boxes.dtype == torch.float32
        assert len(a_scores) == len(b_scores)
        assert (a_scores - b_scores).abs().max() < score  # in falling order, so ties do not matter
        distance = (a_boxes[:, None] - b_boxes).abs().amax(dim=-1)
        assert distance.amin(dim=1).max() < pixels  # every box has its counterpart


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, FrozenBatchNorm2d])
@pytest.mark.parametrize("bias", [False, True])
def test_folding_equals_convolution_and_norm(norm: type[nn.Module], bias: bool) -> None:
    torch.manual_seed(0)
    conv = Conv2d(3, 5, 3, padding=1, bias=bias, norm=norm(5)).eval()
    conv.norm.running_mean.normal_()
    conv.norm.running_var.uniform_(0.2, 2)
    conv.norm.weight.data.normal_()
    conv.norm.bias.data.normal_()
    x = torch.randn(2, 3, 7, 9)
    expected = conv(x)
    assert fold_batch_norms(conv) == 1 and conv.norm is None
    assert torch.allclose(conv(x), expected, atol=1e-5)


def test_norms_that_depend_on_the_input_stay() -> None:
    conv = Conv2d(3, 4, 1, norm=nn.GroupNorm(2, 4))
    assert fold_batch_norms(conv) == 0 and isinstance(conv.norm, nn.GroupNorm)


@pytest.mark.parametrize("path", TINY, ids=lambda p: p.stem)
def test_folded_norms_and_memory_format_change_nothing(path: Path) -> None:
    assert len(TINY) >= 4
    expected = detect(build(path))
    model = prepare_for_inference(build(path), channels_last=True)
    assert not any(isinstance(m, nn.BatchNorm2d | FrozenBatchNorm2d) for m in model.modules())
    assert_close(detect(model), expected, score=1e-4, pixels=0.05)


@pytest.mark.parametrize("path", TINY, ids=lambda p: p.stem)
def test_half_precision_stays_close(path: Path) -> None:
    model = prepare_for_inference(build(path), fold_norms=False, dtype=torch.bfloat16)
    expected = detect(build(path))
    actual = detect(model)
    for (a_scores, a_boxes), (b_scores, _) in zip(actual, expected, strict=True):
        assert a_scores.dtype == a_boxes.dtype == torch.float32
        assert not torch.equal(a_scores, b_scores), "nothing was rounded"
        # Weak candidates of an untrained detector may change places.
        assert torch.allclose(a_scores[:5], b_scores[:5], atol=0.05)
        assert a_boxes.isfinite().all()


@pytest.mark.parametrize("path", TINY, ids=lambda p: p.stem)
def test_compiled_parts_change_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = detect(build(path))
    compile = torch.compile
    # Everything but the generation of machine code, which takes minutes.
    monkeypatch.setattr(torch, "compile", lambda f, **_: compile(f, backend="eager"))
    assert_close(detect(prepare_for_inference(build(path), compile=True)), expected, 1e-4, 0.05)


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="dtype"):
        prepare_for_inference(build(TINY[0]), dtype=torch.int8)
