"""Shared parts of DETR and Conditional DETR: embeddings, masks, encoder, residuals, padding."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone.resnet import build_resnet_backbone
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from asag import get_asag_cfg
from asag.modeling.backbone import ZeroPadding, build_dc5_resnet_backbone
from asag.modeling.backbone.zero_padding import padding_masks
from asag.modeling.layers.feed_forward import Residual, make_mlp
from asag.modeling.layers.position_encoding import (
    FeaturePositions,
    cell_mask,
    cell_positions,
    inverse_sigmoid,
    sine_embedding,
    valid_cells,
)
from asag.modeling.neck.transformer_encoder import EncoderLayer
from asag.modeling.roi_heads.detr.cross_attention import (
    DETRCrossAttention,
    attend,
    attention_weights,
)
from asag.structures import ImageSizes

ROOT = Path(__file__).resolve().parents[2]
C, H = 16, 4


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def slow_embedding(x: float, y: float, dim: int) -> list[float]:
    values = []
    for share in (y, x):
        for f in range(dim // 2):
            angle = 2 * math.pi * share / 10000 ** (2 * (f // 2) / (dim // 2))
            values.append(math.sin(angle) if f % 2 == 0 else math.cos(angle))
    return values


@given(st.floats(0, 1), st.floats(0, 1), st.sampled_from([4, 8, 12, 32]))
def test_sine_embedding_equals_its_formula(x: float, y: float, dim: int) -> None:
    actual = sine_embedding(torch.tensor([[x, y]], dtype=torch.float64), dim)
    expected = torch.tensor([slow_embedding(x, y, dim)], dtype=torch.float64)
    assert torch.allclose(actual, expected, atol=1e-9)


def test_sine_embedding_names_the_key_of_a_bad_width() -> None:
    with pytest.raises(ValueError, match=r"MODEL\.DECODER\.HIDDEN_DIM is 6"):
        sine_embedding(torch.zeros(1, 2), 6)


@given(st.integers(1, 6), st.integers(1, 6), st.data())
def test_cell_positions_count_valid_cells(height: int, width: int, data: st.DataObject) -> None:
    h, w = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
    positions = cell_positions(cell_mask([(h, w)], (height, width)))[0]
    for i in range(h):
        for j in range(w):
            expected = ((j + 1) / (w + 1e-6), (i + 1) / (h + 1e-6))
            assert positions[i, j].tolist() == pytest.approx(expected, rel=1e-6)
    assert positions.isfinite().all()


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(1, 200), st.integers(1, 200)), min_size=1, max_size=3))
def test_nearest_rule_equals_resizing_the_pixel_mask(hw: list[tuple[int, int]]) -> None:
    sizes = ImageSizes.from_hw(hw)
    feature_hw = tuple(-(-side // 32) for side in sizes.padded_hw)
    pixels = cell_mask(hw, sizes.padded_hw)
    expected = F.interpolate((~pixels)[None].float(), size=feature_hw)[0].bool()
    actual = cell_mask(valid_cells(sizes, feature_hw, None), feature_hw)
    assert torch.equal(~actual, expected)


@given(st.lists(st.tuples(st.integers(1, 200), st.integers(1, 200)), min_size=1, max_size=3))
def test_exact_rule_gives_each_image_the_map_it_has_alone(hw: list[tuple[int, int]]) -> None:
    sizes = ImageSizes.from_hw(hw)
    feature_hw = tuple(-(-side // 32) for side in sizes.padded_hw)
    assert valid_cells(sizes, feature_hw, 32) == [(-(-h // 32), -(-w // 32)) for h, w in hw]
    coarsest = list(padding_masks(sizes).values())[-1]
    assert torch.equal(coarsest[:, 0], cell_mask(valid_cells(sizes, feature_hw, 32), feature_hw))


def test_positions_without_padding_are_kept_and_may_be_trained_with_after_inference() -> None:
    positions = FeaturePositions(dim=C)
    features, sizes = torch.rand(2, 3, 3, 5), ImageSizes.from_hw([(96, 160)] * 2)
    with torch.inference_mode():
        first, valid = positions(features, sizes)
    again, _ = positions(features, sizes)
    assert valid is None and first is again and first.shape == (1, 15, C)
    layer = nn.Linear(C, C)
    layer(again).sum().backward()  # an inference tensor would refuse
    # A batch whose padding covers no whole cell needs no mask either.
    _, valid = FeaturePositions(dim=C, stride=32)(
        features, ImageSizes.from_hw([(96, 160), (95, 159)])
    )
    assert valid is None


def test_padded_positions_of_an_image_equal_those_it_has_alone() -> None:
    positions = FeaturePositions(dim=C, stride=32)
    hw = [(70, 200), (120, 90)]
    together, valid = positions(torch.rand(2, 3, 4, 7), ImageSizes.from_hw(hw))
    for b, (h, w) in enumerate(hw):
        rows, columns = -(-h // 32), -(-w // 32)
        alone, _ = positions(torch.rand(1, 3, rows, columns), ImageSizes.from_hw([(h, w)]))
        assert int(valid[b].sum()) == rows * columns
        assert torch.allclose(together[b][valid[b]], alone[0], atol=1e-5)


@given(st.floats(0, 1))
def test_inverse_sigmoid_inverts(x: float) -> None:
    value = inverse_sigmoid(torch.tensor(x, dtype=torch.float64))
    assert float(value.sigmoid()) == pytest.approx(min(max(x, 1e-5), 1 - 1e-5), abs=2e-5)


@pytest.mark.parametrize("pre_norm", [False, True])
def test_residual_puts_the_norm_where_it_says(pre_norm: bool) -> None:
    residual, layer = Residual(dim=C, pre_norm=pre_norm), nn.Linear(C, C)
    nn.init.normal_(residual.norm.weight)
    x = torch.randn(2, 3, C)
    expected = x + layer(residual.norm(x)) if pre_norm else residual.norm(x + layer(x))
    assert torch.allclose(residual(x, layer), expected)


@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_encoder_layer_equals_torchs(pre_norm: bool, padded: bool) -> None:
    theirs = nn.TransformerEncoderLayer(C, H, 24, 0.0, batch_first=True, norm_first=pre_norm)
    ours = EncoderLayer(dim=C, num_heads=H, ffn_dim=24, pre_norm=pre_norm)
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_(std=0.3)
    ours.self_attention.in_proj.weight.data = theirs.self_attn.in_proj_weight.data
    ours.self_attention.in_proj.bias.data = theirs.self_attn.in_proj_bias.data
    ours.self_attention.out_proj.load_state_dict(theirs.self_attn.out_proj.state_dict())
    ours.self_residual.norm.load_state_dict(theirs.norm1.state_dict())
    ours.ffn.norm.load_state_dict(theirs.norm2.state_dict())
    ours.ffn.linear1.load_state_dict(theirs.linear1.state_dict())
    ours.ffn.linear2.load_state_dict(theirs.linear2.state_dict())
    x, none = torch.randn(2, 6, C), torch.zeros(1, 6, C)
    valid = torch.ones(2, 6, dtype=torch.bool)
    valid[1, 4:] = not padded
    expected = theirs(x, src_key_padding_mask=~valid)
    actual = ours(x, none, valid if padded else None)
    assert torch.allclose(actual[valid], expected[valid], atol=1e-5)


def test_values_see_no_position() -> None:
    layer = EncoderLayer(dim=C, num_heads=H, ffn_dim=24).self_attention
    x, position = torch.randn(2, 6, C), torch.randn(1, 6, C)
    q, k, v = layer.project(x, position)
    shifted, plain = layer.project(x + position), layer.project(x)
    for actual, expected in zip((q, k, v), (shifted[0], shifted[1], plain[2]), strict=True):
        assert torch.allclose(actual, expected, atol=1e-6)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("wide", [False, True])
def test_fused_attention_equals_the_plain_formula(padded: bool, wide: bool) -> None:
    width = 8 if wide else 4
    q, k = (torch.randn(2, H, n, width, requires_grad=True) for n in (5, 7))
    v = torch.randn(2, H, 7, 4, requires_grad=True)
    mask = None
    if padded:
        mask = torch.ones(2, 1, 1, 7, dtype=torch.bool)
        mask[0, ..., 4:] = False
    fused, plain = attend(q, k, v, mask), attention_weights(q, k, mask) @ v
    assert torch.allclose(fused, plain, atol=1e-6)
    probe = torch.randn_like(fused)
    for a, b in zip(
        torch.autograd.grad((fused * probe).sum(), (q, k, v)),
        torch.autograd.grad((plain * probe).sum(), (q, k, v)),
        strict=True,
    ):
        assert torch.allclose(a, b, atol=1e-5)


def test_cross_attention_equals_torchs() -> None:
    theirs = nn.MultiheadAttention(C, H, batch_first=True)
    layers = [DETRCrossAttention(dim=C, num_heads=H) for _ in range(3)]
    ours = layers[1]
    with torch.no_grad():
        for p in (p for layer in layers for p in layer.parameters()):
            p.normal_(std=0.3)
        theirs.in_proj_weight.copy_(ours.in_proj.weight)
        theirs.in_proj_bias.copy_(ours.in_proj.bias)
    theirs.out_proj.load_state_dict(ours.out_proj.state_dict())
    query, position = torch.randn(2, 5, C), torch.randn(1, 5, C)
    memory, spatial = torch.randn(2, 7, C), torch.randn(1, 7, C)
    valid = torch.ones(2, 7, dtype=torch.bool)
    valid[1, 3:] = False
    memories = DETRCrossAttention.project_memory(layers, memory, spatial)
    mask = valid[:, None, None]
    actual = ours(query, position, None, memories[1], mask)
    expected, weights = theirs(query + position, memory + spatial, memory, key_padding_mask=~valid)
    assert torch.allclose(actual, expected, atol=1e-5)
    plain = ours.weights(query, position, None, memories[1], mask).mean(dim=1)
    assert torch.allclose(plain, weights, atol=1e-5)


def test_mlp_has_the_depth_asked_for() -> None:
    mlp, x = make_mlp(C, 4, 3), torch.randn(2, C)
    expected = mlp[4](mlp[2](mlp[0](x).relu()).relu())
    assert torch.equal(mlp(x), expected)


def slim_cfg(dilation: int = 1):
    cfg = get_asag_cfg()
    r = cfg.MODEL.RESNETS
    r.DEPTH, r.STEM_OUT_CHANNELS, r.WIDTH_PER_GROUP, r.RES2_OUT_CHANNELS = 50, 8, 4, 16
    r.OUT_FEATURES, r.RES5_DILATION = ["res5"], dilation
    return cfg


def randomize_norms(module: nn.Module) -> None:
    for m in module.modules():
        if hasattr(m, "running_mean"):
            m.running_mean.normal_(std=0.2)
            m.running_var.uniform_(0.5, 1.5)
            m.weight.data.uniform_(0.5, 1.5)
            m.bias.data.normal_(std=0.5)


def test_dilation_follows_torchvision() -> None:
    resnet = build_dc5_resnet_backbone(slim_cfg(2), ShapeSpec(channels=3))
    assert [b.conv2.dilation for b in resnet.res5] == [(1, 1), (2, 2), (2, 2)]
    assert resnet.output_shape()["res5"].stride == 16
    assert resnet(torch.rand(1, 3, 65, 90))["res5"].shape[-2:] == (5, 6)
    theirs = build_resnet_backbone(slim_cfg(2), ShapeSpec(channels=3))
    theirs.load_state_dict(resnet.state_dict())
    x = torch.rand(1, 3, 64, 64)
    assert not torch.allclose(theirs(x)["res5"], resnet(x)["res5"], rtol=1e-2)


@pytest.mark.parametrize("dilation", [1, 2])
def test_exact_padding_gives_features_of_single_images(dilation: int) -> None:
    resnet = build_dc5_resnet_backbone(slim_cfg(dilation), ShapeSpec(channels=3)).eval().double()
    randomize_norms(resnet)
    zero_padding = ZeroPadding(resnet)
    hw = [(70, 129), (101, 64)]
    images = [torch.randn(3, h, w, dtype=torch.double) for h, w in hw]
    batch = torch.stack([F.pad(x, (0, 129 - x.shape[2], 0, 101 - x.shape[1])) for x in images])
    with torch.no_grad():
        dirty = resnet(batch)["res5"]
        with zero_padding(ImageSizes.from_hw(hw)):
            clean = resnet(batch)["res5"]
        assert torch.equal(resnet(batch)["res5"], dirty)  # nothing stays behind
        for b, image in enumerate(images):
            alone: Tensor = resnet(image[None])["res5"][0]
            rows, columns = alone.shape[-2:]
            assert torch.allclose(clean[b, :, :rows, :columns], alone, atol=1e-9)
            assert not torch.allclose(dirty[b, :, :rows, :columns], alone, atol=1e-3)


def test_exact_padding_refuses_other_backbones() -> None:
    with pytest.raises(ValueError, match=r"MODEL\.EXACT_PADDING"):
        ZeroPadding(nn.Conv2d(3, 3, 3))
