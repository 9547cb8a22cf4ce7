"""Coordinates, attention, sampling and stages of ASAG's decoders against written-out forms."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from asag.modeling.layers.attention import attendable
from asag.modeling.layers.boxes import cxcywh_to_xyxy
from asag.modeling.layers.deformable_attention import (
    DeformableAttention,
    MultiScaleMemory,
    flatten_maps,
    sample_levels,
)
from asag.modeling.layers.overlap_attention import OverlapSelfAttention, overlap_with_query
from asag.modeling.layers.roi_align import PyramidRoIAlign
from asag.modeling.layers.xyzr import (
    XYZRPredictor,
    boxes_to_xyzr,
    encode_xyzr,
    move_xyzr,
    xyzr_to_boxes,
)
from asag.modeling.neck import DeformableEncoder
from asag.modeling.proposal_generator.asag.block import ProposalBlock
from asag.modeling.roi_heads.asag.adamixer import AdaMixerStage, sample_3d
from asag.modeling.roi_heads.asag.deformable import DeformableStage, embed_boxes
from asag.structures import ImageSizes

SEEDS = st.integers(0, 10_000)
DIM, CLASSES = 16, 3


def make_boxes(batch: int, count: int, size: float = 128.0) -> Tensor:
    center, half = torch.rand(batch, count, 2), 0.02 + 0.3 * torch.rand(batch, count, 2)
    return torch.cat((center - half, center + half), dim=-1) * size


def randomize(module: nn.Module) -> nn.Module:
    """Weights without the zeros of the initialization, in evaluation mode."""
    for parameter in module.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return module.eval()


# Coordinates


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_xyzr_round_trip(seed: int) -> None:
    torch.manual_seed(seed)
    boxes = make_boxes(2, 9)
    xyzr = boxes_to_xyzr(boxes)
    torch.testing.assert_close(xyzr_to_boxes(xyzr), boxes, atol=1e-3, rtol=1e-5)
    x0, y0, x1, y1 = (boxes[0, 0] / 4).tolist()
    w, h = x1 - x0, y1 - y0
    expected = ((x0 + x1) / 2, (y0 + y1) / 2, math.log2(math.sqrt(w * h)), math.log2(h / w) / 2)
    torch.testing.assert_close(xyzr[0, 0], torch.tensor(expected), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(move_xyzr(xyzr, torch.zeros_like(xyzr)), xyzr)


def test_scale_doubles_both_sides_and_moves_are_relative() -> None:
    boxes = make_boxes(1, 4)
    delta = torch.tensor([1.0, 0, 1, 0]).expand(1, 4, 4)
    moved = xyzr_to_boxes(move_xyzr(boxes_to_xyzr(boxes), delta))
    size, new = boxes[..., 2:] - boxes[..., :2], moved[..., 2:] - moved[..., :2]
    torch.testing.assert_close(new, 2 * size, rtol=1e-4, atol=1e-3)
    shift = ((moved[..., :2] + moved[..., 2:]) - (boxes[..., :2] + boxes[..., 2:])) / 2
    torch.testing.assert_close(shift[..., 0], size.prod(dim=-1).sqrt(), rtol=1e-4, atol=1e-3)


def test_degenerate_boxes_stay_finite() -> None:
    boxes = torch.tensor([[[5.0, 5, 5, 9], [9.0, 9, 3, 3], [0.0, 0, 0, 0]]], requires_grad=True)
    xyzr = boxes_to_xyzr(boxes)
    (xyzr.sum() + xyzr_to_boxes(xyzr).sum()).backward()
    assert xyzr.isfinite().all() and boxes.grad.isfinite().all()


def test_sine_encoding_equals_loops() -> None:
    xyzr = torch.tensor([[[100.0, 37.0, 3.0, -0.4]]])
    found = encode_xyzr(xyzr, DIM)[0, 0].tolist()
    expected = []
    for value, scale in zip(xyzr[0, 0].tolist(), (1000, 1000, 1, 1), strict=True):
        for k in range(DIM // 4):
            angle = value / scale / 10000 ** (2 * (k // 2) / (DIM // 4))
            expected.append(math.cos(angle) if k % 2 else math.sin(angle))
    assert found == pytest.approx(expected, abs=1e-5)


def test_predictors_start_where_the_boxes_are() -> None:
    predictor, boxes = XYZRPredictor(dim=DIM, num_logits=CLASSES), make_boxes(2, 5)
    logits, found = predictor(torch.randn(2, 5, DIM), boxes_to_xyzr(boxes))
    torch.testing.assert_close(found, boxes, atol=1e-3, rtol=1e-4)
    assert logits.sigmoid().mean() < 0.1


# Attention


def test_overlap_is_the_share_of_the_own_box() -> None:
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 5, 10], [20, 20, 30, 30]]])
    expected = torch.tensor([[[1.0, 0.5, 0], [1, 1, 0], [0, 0, 1]]])
    torch.testing.assert_close(overlap_with_query(boxes), expected)


def test_overlap_attention_equals_the_formula() -> None:
    attention, boxes = OverlapSelfAttention(dim=DIM, num_heads=4), make_boxes(2, 6)
    query = torch.randn(2, 6, DIM)
    valid = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    found = attention(query, boxes, valid)
    q, k, v = attention.project(query)
    scores = q @ k.transpose(-1, -2) / math.sqrt(DIM // 4)
    bias = (overlap_with_query(boxes) + 1e-7).log()[:, None] * attention.tau.view(1, 4, 1, 1)
    scores = (scores + bias).masked_fill(~attendable(valid), -torch.inf)
    expected = (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(found, attention.out_proj(expected), atol=1e-5, rtol=1e-4)
    found.sum().backward()
    assert attention.tau.grad.abs().sum() > 0


def test_masks_of_pairs_extend_masks_of_keys() -> None:
    valid = torch.tensor([[True, True, False]])
    pairs = valid[:, None].expand(1, 3, 3)
    assert torch.equal(attendable(pairs), attendable(valid))


# Sampling


def bilinear(features: Tensor, x: float, y: float) -> Tensor:
    """(C, H, W) at cell coordinates, zero outside."""
    x0, y0 = math.floor(x), math.floor(y)
    total = torch.zeros(features.shape[0])
    for j in (y0, y0 + 1):
        for i in (x0, x0 + 1):
            if 0 <= i < features.shape[2] and 0 <= j < features.shape[1]:
                total += features[:, j, i] * (1 - abs(x - i)) * (1 - abs(y - j))
    return total


def test_3d_sampling_equals_loops() -> None:
    torch.manual_seed(0)
    maps = [torch.randn(2, 8, 64 // s, 80 // s) for s in (4, 8, 16, 32)]
    points = torch.rand(2, 3, 4, 5, 2) * 90 - 5
    z = torch.rand(2, 3, 4, 5) * 5 - 1
    found = sample_3d(maps, (4, 8, 16, 32), points, z)
    assert found.shape == (2, 3, 4, 5, 2)
    for b, n, g, p in ((0, 0, 0, 0), (1, 2, 3, 4), (1, 1, 2, 0), (0, 2, 1, 3)):
        weights = torch.tensor([-((z[b, n, g, p] - i) ** 2) / 2 for i in range(4)]).softmax(0)
        expected = torch.zeros(2)
        for features, stride, weight in zip(maps, (4, 8, 16, 32), weights, strict=True):
            x, y = (points[b, n, g, p] / stride - 0.5).tolist()
            expected += weight * bilinear(features[b, 2 * g : 2 * g + 2], x, y)
        torch.testing.assert_close(found[b, n, g, p], expected, atol=1e-5, rtol=1e-4)


def test_deformable_sampling_equals_loops() -> None:
    torch.manual_seed(0)
    shapes, heads = ((5, 6), (3, 2)), 2
    value = torch.randn(2, 36, 8)
    points = torch.rand(2, 4, heads, 2, 3, 2) * 1.4 - 0.2
    weights = torch.rand(2, 4, heads, 2, 3)
    found = sample_levels(value, shapes, points, weights)
    for b, n in ((0, 0), (1, 3)):
        expected = torch.zeros(8)
        for h in range(heads):
            start = 0
            for level, (rows, columns) in enumerate(shapes):
                part = value[b, start : start + rows * columns, 4 * h : 4 * h + 4]
                features = part.T.unflatten(-1, (rows, columns))
                start += rows * columns
                for p in range(3):
                    x, y = points[b, n, h, level, p].tolist()
                    sample = bilinear(features, x * columns - 0.5, y * rows - 0.5)
                    expected[4 * h : 4 * h + 4] += weights[b, n, h, level, p] * sample
        torch.testing.assert_close(found[b, n], expected, atol=1e-5, rtol=1e-4)


def test_deformable_attention_ignores_padded_cells() -> None:
    torch.manual_seed(0)
    attention = randomize(DeformableAttention(dim=DIM, num_heads=4, num_levels=2, num_points=2))
    valid = torch.rand(2, 36) > 0.4
    memory = MultiScaleMemory(
        torch.randn(2, 36, DIM), ((5, 6), (3, 2)), valid, torch.ones(2, 2, 2), torch.ones(2, 4)
    )
    query, reference = torch.randn(2, 4, DIM), torch.rand(2, 4, 2, 4)
    before = attention(query, reference, memory)
    memory.values = memory.values.masked_fill(~valid[..., None], 1e3)
    torch.testing.assert_close(attention(query, reference, memory), before)


def test_box_embedding_equals_loops() -> None:
    box = torch.tensor([0.1, 0.7, 0.3, 0.2])
    expected = []
    for value in box.tolist():
        for i in range(4):
            angle = 2 * math.pi * value / 10000 ** (2 * i / 8)
            expected += [math.sin(angle), math.cos(angle)]
    assert embed_boxes(box, 8).tolist() == pytest.approx(expected, abs=1e-5)


# Stages: what padding and order must not change


def make_maps(batch: int = 2, strides: tuple[int, ...] = (4, 8, 16, 32)) -> list[Tensor]:
    return [torch.randn(batch, DIM, 128 // s, 128 // s) for s in strides]


def adamixer() -> AdaMixerStage:
    return randomize(
        AdaMixerStage(
            dim=DIM,
            num_logits=CLASSES,
            strides=(4, 8, 16, 32),
            num_heads=2,
            ffn_dim=32,
            in_points=4,
            out_points=6,
        )
    )


def call_adamixer(content: Tensor, boxes: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
    torch.manual_seed(5)
    stage = adamixer()
    return stage(content, boxes, make_maps(len(content)), mask)


def call_deformable(content: Tensor, boxes: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
    torch.manual_seed(5)
    stage = randomize(DeformableStage(dim=DIM, num_logits=CLASSES, num_heads=2, ffn_dim=32))
    sizes = ImageSizes.from_hw([(128, 128)] * len(content))
    return stage(content, boxes, flatten_maps(make_maps(len(content)), sizes), mask)


def call_block(content: Tensor, boxes: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
    torch.manual_seed(5)
    pooler = PyramidRoIAlign(strides=(4, 8, 16, 32), aligned=False, level_eps=1e-6)
    block = randomize(
        ProposalBlock(pooler=pooler, dim=DIM, num_logits=CLASSES, num_heads=2, ffn_dim=32)
    )
    new, logits, refined = block(make_maps(len(boxes)), boxes, mask)
    return logits, refined, new


STAGES = {"adamixer": call_adamixer, "deformable": call_deformable, "block": call_block}


@pytest.mark.parametrize("name", STAGES)
def test_padded_queries_change_nothing(name: str) -> None:
    call = STAGES[name]
    content, boxes = torch.randn(2, 7, DIM), make_boxes(2, 7)
    valid = torch.tensor([[True] * 7, [True] * 5 + [False] * 2])
    before = call(content, boxes, valid)
    alone = call(content[:, :5], boxes[:, :5], None)
    other = torch.where(valid[..., None], content, 50.0), torch.where(valid[..., None], boxes, 3.0)
    after = call(*other, valid)
    for x, y, z in zip(before, after, alone, strict=True):
        assert x.isfinite().all()
        torch.testing.assert_close(x[valid], y[valid])
        torch.testing.assert_close(x[1, :5], z[1], atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("name", STAGES)
def test_the_order_of_queries_does_not_matter(name: str) -> None:
    content, boxes, order = torch.randn(1, 6, DIM), make_boxes(1, 6), torch.randperm(6)
    expected = STAGES[name](content, boxes, None)
    found = STAGES[name](content[:, order], boxes[:, order], None)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y[:, order], atol=1e-3, rtol=1e-4)


def test_deformable_boxes_start_where_they_are() -> None:
    stage = DeformableStage(dim=DIM, num_logits=CLASSES, num_heads=2, ffn_dim=32)
    sizes = ImageSizes.from_hw([(100, 128)], (128, 128))
    boxes = cxcywh_to_xyxy(torch.tensor([[[50.0, 60, 40, 30], [100, 20, 10, 16]]]))
    memory = flatten_maps(make_maps(1), sizes)
    torch.testing.assert_close(
        stage(torch.randn(1, 2, DIM), boxes, memory, None)[1], boxes, atol=1e-3, rtol=1e-4
    )


@pytest.mark.parametrize(
    ("key", "make"),
    [
        ("MIXER_GROUPS", lambda: AdaMixerStage(dim=10, num_logits=2, strides=(4,), num_heads=2)),
        ("NUM_HEADS", lambda: DeformableAttention(dim=10, num_heads=3)),
    ],
)
def test_widths_that_cannot_be_cut(key: str, make) -> None:
    with pytest.raises(ValueError, match=rf"MODEL\.DECODER\.{key}"):
        make()


# The encoder


def make_encoder() -> DeformableEncoder:
    return randomize(
        DeformableEncoder(
            in_features=("res3", "res4", "res5"),
            in_channels=(4, 6, 8),
            strides=(8, 16, 32),
            dim=DIM,
            num_layers=2,
            num_heads=2,
            num_points=2,
            ffn_dim=32,
        )
    )


def test_encoder_names_and_shapes() -> None:
    encoder = make_encoder()
    features = {
        f"res{i}": torch.randn(2, c, 128 // 2**i, 160 // 2**i) for i, c in ((3, 4), (4, 6), (5, 8))
    }
    found = encoder(features, ImageSizes.from_hw([(128, 160), (100, 130)]))
    assert set(found) == set(encoder.output_shape())
    for name, spec in encoder.output_shape().items():
        assert spec.channels == DIM
        expected = (2, DIM, -(-128 // spec.stride), -(-160 // spec.stride))
        assert found[name].shape == expected


def test_encoder_cells_do_not_see_padding() -> None:
    torch.manual_seed(0)
    encoder = make_encoder()
    memory = flatten_maps(
        [torch.randn(1, DIM, 128 // s, 128 // s) for s in (8, 16, 32, 64)],
        ImageSizes.from_hw([(96, 64)], (128, 128)),
    )
    assert memory.valid.sum() == 12 * 8 + 6 * 4 + 3 * 2 + 2 * 1
    torch.testing.assert_close(memory.valid_ratios[0, 0], torch.tensor([0.5, 0.75]))
    reference = torch.rand(1, memory.values.shape[1], 4, 2)
    attend = encoder.layers[0].attention
    before = attend(memory.values, reference, memory)
    query = memory.values.clone()
    memory.values = memory.values.masked_fill(~memory.valid[..., None], 9.0)
    torch.testing.assert_close(attend(query, reference, memory), before)
