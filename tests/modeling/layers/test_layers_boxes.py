"""Box arithmetic against slow references and Detectron2."""

import math

import pytest
import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import box_iou as torchvision_iou
from torchvision.ops import generalized_box_iou

from asag.modeling.layers.boxes import (
    MAX_SCALE,
    at_least_float32,
    box_area,
    box_giou,
    box_iou,
    cxcywh_to_xyxy,
    decode_deltas,
    xyxy_to_cxcywh,
)

number = st.floats(-1000, 1000, width=32)
side = st.floats(0.125, 1000, width=32)
box = st.tuples(number, number, side, side).map(lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3]))
boxes = st.lists(box, min_size=1, max_size=5).map(lambda x: torch.tensor(x, dtype=torch.float64))


@settings(max_examples=60, deadline=None)
@given(boxes, boxes)
def test_all_pairs_equal_torchvision(a, b):
    assert torch.allclose(box_iou(a[:, None], b[None]), torchvision_iou(a, b), atol=1e-9)
    assert torch.allclose(box_giou(a[:, None], b[None]), generalized_box_iou(a, b), atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(boxes)
def test_overlap_with_itself_is_exactly_one(a):
    assert torch.equal(box_iou(a, a), torch.ones(len(a), dtype=a.dtype))
    assert torch.allclose(box_giou(a, a), torch.ones(len(a), dtype=a.dtype), atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(boxes, boxes)
def test_overlap_is_symmetric_bounded_and_ignores_common_shifts(a, b):
    for function, low in ((box_iou, 0.0), (box_giou, -1.0)):
        values = function(a[:, None], b[None])
        assert torch.allclose(values, function(b[:, None], a[None]).T, atol=1e-12)
        assert values.min() >= low - 1e-9 and values.max() <= 1 + 1e-9
        assert torch.allclose(values, function(a[:, None] + 64, b[None] + 64), atol=1e-7)


@settings(max_examples=60, deadline=None)
@given(boxes)
def test_formats_invert_each_other(a):
    assert torch.allclose(cxcywh_to_xyxy(xyxy_to_cxcywh(a)), a, atol=1e-9)
    assert torch.allclose(xyxy_to_cxcywh(cxcywh_to_xyxy(a)), a, atol=1e-9)


def test_formats_by_hand():
    xyxy, cxcywh = torch.tensor([1.0, 2.0, 5.0, 10.0]), torch.tensor([3.0, 6.0, 4.0, 8.0])
    assert torch.equal(xyxy_to_cxcywh(xyxy), cxcywh)
    assert torch.equal(cxcywh_to_xyxy(cxcywh), xyxy)
    assert box_area(xyxy) == 32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_degenerate_boxes_have_finite_values_and_gradients(dtype):
    point = torch.tensor([[3.0, 3, 3, 3], [3, 3, 3, 9], [0, 0, 4, 4]], dtype=dtype)
    a, b = point.clone().requires_grad_(), point.clone().requires_grad_()
    for function in (box_iou, box_giou):
        values = function(a[:, None], b[None])
        assert values.isfinite().all()
        gradients = torch.autograd.grad(values.sum(), (a, b))
        assert all(g.isfinite().all() for g in gradients)
    assert box_iou(point[0], point[0]) == 0


def test_touching_boxes_do_not_overlap():
    a, b = torch.tensor([0.0, 0, 2, 2]), torch.tensor([2.0, 0, 4, 2])
    assert box_iou(a, b) == 0 and box_giou(a, b) == 0
    far = torch.tensor([6.0, 0, 8, 2])
    assert box_giou(a, far) == pytest.approx(-0.5)


def test_giou_gradient_is_numerically_right():
    a = torch.tensor([[0.0, 0, 3, 4], [1, 1, 2, 2], [5, 5, 9, 9]], dtype=torch.float64)
    b = torch.tensor([[1.0, 1.5, 4, 3], [-1, 0, 6, 5], [0, 0, 2, 3]], dtype=torch.float64)
    assert torch.autograd.gradcheck(box_giou, (a.requires_grad_(), b.requires_grad_()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_lifted(dtype):
    assert at_least_float32(torch.ones(1, dtype=dtype)).dtype is torch.float32
    deltas, current = torch.zeros(1, 4, dtype=dtype), torch.tensor([[1.0, 2, 3, 4]], dtype=dtype)
    assert decode_deltas(deltas, current).dtype is torch.float32


def test_double_precision_is_kept():
    x = torch.ones(1, 4, dtype=torch.float64)
    assert at_least_float32(x) is x
    assert decode_deltas(x, x).dtype is torch.float64


@pytest.mark.parametrize("weights", [(2.0, 1.0), (10.0, 5.0), (1.0, 1.0)])
def test_deltas_equal_detectron2(weights):
    generator = torch.Generator().manual_seed(0)
    deltas = 3 * torch.randn(200, 4, generator=generator)
    deltas[0, 2:] = 1e4  # growth is bounded, in the same place
    deltas[1, 2:] = -1e4
    current = cxcywh_to_xyxy(torch.rand(200, 4, generator=generator) * 400 + 1)
    center, size = weights
    reference = Box2BoxTransform((center, center, size, size), scale_clamp=math.log(MAX_SCALE))
    expected = reference.apply_deltas(deltas, current)
    decoded = decode_deltas(deltas, current, center_weight=center, size_weight=size)
    # Corners of huge boxes round at the scale of the box, not of the corner.
    scale = expected.abs().amax(dim=1, keepdim=True).clamp(min=1)
    assert ((decoded - expected).abs() / scale).max() < 1e-6


def test_changes_of_size_are_bounded_on_both_sides_where_asked_for():
    current = torch.tensor([0.0, 0.0, 100.0, 200.0], dtype=torch.float64)
    deltas = torch.tensor([0.0, 0.0, 9.0, -9.0], dtype=torch.float64)
    free = xyxy_to_cxcywh(decode_deltas(deltas, current))
    assert free.tolist() == pytest.approx([50, 100, 100 * MAX_SCALE, 200 * math.exp(-9)])
    bounded = xyxy_to_cxcywh(decode_deltas(deltas, current, min_scale=0.016, max_scale=62.5))
    assert bounded.tolist() == pytest.approx([50, 100, 6250, 3.2])


def test_deltas_by_hand():
    current = torch.tensor([10.0, 20, 30, 60])  # center 20, 40, size 20, 40
    deltas = torch.tensor([1.0, -1.0, math.log(2), math.log(0.5)])
    # The weight of the center is 2: moved by half a side.
    expected = torch.tensor([30.0 - 20, 20 - 10, 30 + 20, 20 + 10])
    assert torch.allclose(decode_deltas(deltas, current), expected)
    assert torch.allclose(decode_deltas(torch.zeros(4), current), current)
