"""IoU-enhanced attention against Eq. 3 written out, entry by entry, and against itself."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from asag.modeling.layers.attention import SelfAttention
from asag.modeling.roi_heads.sparse_rcnn.iou_esa import (
    IoUAttention,
    IoUEnhancedSelfAttention,
    NoAttention,
    iou_prior,
    iou_weighted_softmax,
)

DIM, HEADS = 16, 4


def random_boxes(
    batch: int, count: int, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Boxes in a field that is small enough for some to overlap and some not."""
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(batch, count, 2, generator=generator, dtype=dtype) * 80
    size = 5 + torch.rand(batch, count, 2, generator=generator, dtype=dtype) * 40
    return torch.cat((low, low + size), dim=-1)


def slow_iou(a: list[float], b: list[float]) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = sum((x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)) - width * height
    return width * height / union if union > 0 else 0.0


def slow_attention(
    module: IoUEnhancedSelfAttention, query: Tensor, boxes: Tensor, valid: Tensor | None
) -> Tensor:
    """Eq. 3 in Python numbers, one query, head and image at a time (float64)."""
    q, k, v = module.project(query)
    mixed = torch.zeros_like(q)
    batch, heads, count, width = q.shape
    for b in range(batch):
        for h in range(heads):
            for i in range(count):
                weights = []
                for j in range(count):
                    seen = valid is None or bool(valid[b, j]) or i == j
                    overlap = (
                        1.0 if i == j else slow_iou(boxes[b, i].tolist(), boxes[b, j].tolist())
                    )
                    score = float(q[b, h, i] @ k[b, h, j]) / math.sqrt(width)
                    weights.append(math.exp(score) * overlap * seen)
                total = sum(weights)
                for j, weight in enumerate(weights):
                    mixed[b, h, i] += weight / total * v[b, h, j]
    return module.out_proj(mixed.transpose(1, 2).reshape(query.shape))


def make(dtype: torch.dtype = torch.float64, seed: int = 0) -> IoUEnhancedSelfAttention:
    torch.manual_seed(seed)
    return IoUEnhancedSelfAttention(dim=DIM, num_heads=HEADS).to(dtype)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("learned", [False, True])
def test_equals_the_equation(masked: bool, learned: bool) -> None:
    module = make()
    query = torch.randn(2, 9, DIM, dtype=torch.float64)
    boxes = random_boxes(2, 9, dtype=torch.float64)
    valid = torch.rand(2, 9) > 0.3 if masked else None
    with torch.no_grad():
        expected = slow_attention(module, query, boxes, valid)
    actual = module(query, boxes.requires_grad_(learned), valid)
    torch.testing.assert_close(actual, expected)


def gradients(
    module: IoUEnhancedSelfAttention, query: Tensor, prior: Tensor, fused: bool
) -> tuple[Tensor, ...]:
    q, k, v = (x.detach().requires_grad_() for x in module.project(query))
    mix = module.mix_fused if fused else module.mix_with_gradient
    output = mix(q, k, v, prior)
    probe = torch.randn(output.shape, generator=torch.Generator().manual_seed(5), dtype=q.dtype)
    return (output, *torch.autograd.grad((output * probe).sum(), (q, k, v)))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-5)])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_fused_form_equals_the_definition_forward_and_backward(
    dtype: torch.dtype, tolerance: float, scale: float
) -> None:
    module = make(dtype)
    query = scale * torch.randn(2, 25, DIM, dtype=dtype)
    prior = iou_prior(random_boxes(2, 25, dtype=dtype), torch.rand(2, 25) > 0.2)
    slow, fast = (gradients(module, query, prior, fused) for fused in (False, True))
    for a, b in zip(slow, fast, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * scale * scale)


def test_boxes_get_the_gradient_of_the_equation() -> None:
    module = make()
    query = torch.randn(1, 6, DIM, dtype=torch.float64)
    boxes = random_boxes(1, 6, seed=3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: module(query, x, None), (boxes,))


def test_form_is_chosen_by_the_need_for_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    module, chosen = make(), []
    for name in ("mix_fused", "mix_with_gradient"):
        original = getattr(module, name)

        def spy(*args: Tensor, name: str = name, original=original) -> Tensor:
            chosen.append(name)
            return original(*args)

        monkeypatch.setattr(module, name, spy)
    query, boxes = torch.randn(1, 4, DIM).double(), random_boxes(1, 4).double()
    module(query, boxes, None)
    module(query, boxes.clone().requires_grad_(), None)
    with torch.no_grad():
        module(query, boxes.clone().requires_grad_(), None)
    assert chosen == ["mix_fused", "mix_with_gradient", "mix_fused"]


@pytest.mark.parametrize("learned", [False, True])
def test_scores_of_several_hundred_stay_finite(learned: bool) -> None:
    module = make(torch.float32)
    query = (60 * torch.randn(2, 12, DIM)).requires_grad_()
    boxes = random_boxes(2, 12).requires_grad_(learned)
    scores = module.scores(*module.project(query)[:2])
    assert scores.abs().max() > 200  # the unshifted exponential would overflow
    output = module(query, boxes, None)
    double = make(torch.float64)
    double.load_state_dict(module.state_dict())
    expected = double(query.double(), boxes.double(), None).detach()
    torch.testing.assert_close(
        output.double(), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())
    )
    output.sum().backward()
    assert query.grad.isfinite().all()
    assert boxes.grad is None or boxes.grad.isfinite().all()


def test_a_loud_query_without_overlap_is_not_heard() -> None:
    # The score of a box that does not overlap must not even shift the others.
    scores = torch.tensor([[[[0.0, 1.0, 500.0]] * 3]])
    prior = torch.tensor([[[[1.0, 0.5, 0.0], [0.5, 1.0, 0.0], [0.0, 0.0, 1.0]]]])
    weights = iou_weighted_softmax(scores, prior)[0, 0]
    share = 1 / (1 + 0.5 * math.e)
    torch.testing.assert_close(weights[0], torch.tensor([share, 1 - share, 0.0]))
    torch.testing.assert_close(weights[2], torch.tensor([0.0, 0.0, 1.0]))


def test_equal_boxes_make_plain_attention() -> None:
    module = make()
    plain = SelfAttention(dim=DIM, num_heads=HEADS).double()
    plain.load_state_dict(module.state_dict())
    query = torch.randn(2, 7, DIM, dtype=torch.float64)
    boxes = torch.tensor([10.0, 20.0, 50.0, 90.0], dtype=torch.float64).expand(2, 7, 4)
    torch.testing.assert_close(module(query, boxes, None), plain(query, boxes, None))


def test_lonely_box_attends_to_itself_only() -> None:
    module = make()
    query = torch.randn(1, 5, DIM, dtype=torch.float64)
    boxes = torch.arange(5.0).double()[:, None] * 100 + torch.tensor([0.0, 0.0, 50.0, 50.0])
    alone = module(query, boxes[None], None)
    _, _, v = module.project(query)
    torch.testing.assert_close(alone, module.out_proj(v.transpose(1, 2).reshape(1, 5, DIM)))


DEGENERATE = {
    "no width": [5.0, 5.0, 5.0, 30.0],
    "point": [5.0, 5.0, 5.0, 5.0],
    "inverted": [30.0, 30.0, 5.0, 5.0],
    "half inverted": [30.0, 5.0, 5.0, 30.0],
    "tiny": [5.0, 5.0, 5.0 + 1e-6, 5.0 + 1e-6],
    "area beyond float32": [-1e25, -1e25, 1e25, 1e25],
}


@pytest.mark.parametrize("kind", DEGENERATE)
@pytest.mark.parametrize("learned", [False, True])
def test_degenerate_boxes_give_finite_outputs_and_gradients(kind: str, learned: bool) -> None:
    boxes = torch.tensor([[DEGENERATE[kind], DEGENERATE[kind], [0.0, 0.0, 20.0, 20.0]]])
    boxes.requires_grad_(learned)
    prior = iou_prior(boxes)
    assert torch.equal(prior[0, 0].diagonal(), torch.ones(3))
    assert ((prior >= 0) & (prior <= 1)).all()
    module = make(torch.float32)
    query = torch.randn(1, 3, DIM, requires_grad=True)
    output = module(query, boxes, None)
    output.square().sum().backward()
    assert output.isfinite().all() and query.grad.isfinite().all()
    # Learned boxes, those of the first stage, are never that large.
    if learned and kind != "area beyond float32":
        assert boxes.grad.isfinite().all()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.01, 100), st.floats(-1000, 1000))
def test_prior_is_symmetric_bounded_and_blind_to_scale_and_place(
    seed: int, scale: float, shift: float
) -> None:
    boxes = random_boxes(2, 8, seed, torch.float64)
    prior = iou_prior(boxes)
    assert prior.shape == (2, 1, 8, 8) and (prior >= 0).all() and (prior <= 1).all()
    assert torch.equal(prior, prior.transpose(-2, -1))
    torch.testing.assert_close(iou_prior(boxes * scale + shift), prior, atol=1e-9, rtol=1e-7)
    for i in range(8):
        for j in range(8):
            expected = slow_iou(boxes[1, i].tolist(), boxes[1, j].tolist())
            assert float(prior[1, 0, i, j]) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("kind", ["iou_esa", "iou"])
def test_padded_queries_change_nothing(kind: str) -> None:
    torch.manual_seed(1)
    module = make() if kind == "iou_esa" else IoUAttention(dim=DIM).double()
    query, boxes = torch.randn(2, 9, DIM).double(), random_boxes(2, 9, dtype=torch.float64)
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[:, 6:] = False
    padded = module(query, boxes, valid)
    torch.testing.assert_close(padded[:, :6], module(query[:, :6], boxes[:, :6], None))
    assert padded.isfinite().all()


@pytest.mark.parametrize("kind", ["iou_esa", "iou", "none"])
def test_permuted_queries_give_permuted_answers(kind: str) -> None:
    torch.manual_seed(2)
    modules = {"iou_esa": make(), "iou": IoUAttention(dim=DIM).double(), "none": NoAttention()}
    query, boxes = torch.randn(1, 7, DIM).double(), random_boxes(1, 7, dtype=torch.float64)
    order = torch.randperm(7)
    module = modules[kind]
    expected = module(query, boxes, None)[:, order]
    torch.testing.assert_close(module(query[:, order], boxes[:, order], None), expected)


@pytest.mark.parametrize("row_normalize", [False, True])
def test_iou_matrix_as_attention(row_normalize: bool) -> None:
    torch.manual_seed(0)
    module = IoUAttention(dim=DIM, row_normalize=row_normalize).double()
    query, boxes = torch.randn(1, 6, DIM).double(), random_boxes(1, 6, dtype=torch.float64)
    value = module.value_proj(query)[0]
    mixed = torch.zeros_like(value)
    for i in range(6):
        row = [slow_iou(boxes[0, i].tolist(), boxes[0, j].tolist()) for j in range(6)]
        total = sum(row) if row_normalize else 1.0
        for j in range(6):
            mixed[i] += row[j] / total * value[j]
    torch.testing.assert_close(module(query, boxes, None)[0], module.out_proj(mixed))


@pytest.mark.parametrize("learned", [False, True])
def test_half_precision_keeps_the_prior_in_float32(learned: bool) -> None:
    module = make(torch.float32)
    query, boxes = torch.randn(2, 12, DIM), random_boxes(2, 12) + 3000
    expected = module(query, boxes, None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert iou_prior(boxes).dtype == torch.float32
        # The corners of these boxes differ by less than bfloat16 can tell apart at 3000 pixels.
        exact = iou_prior(boxes.double()).float()
        torch.testing.assert_close(iou_prior(boxes), exact, atol=1e-4, rtol=0)
        actual = module(query, boxes.requires_grad_(learned), None)
    torch.testing.assert_close(actual.float(), expected, atol=3e-2, rtol=3e-2)
    if learned:
        actual.float().sum().backward()
        assert boxes.grad.isfinite().all()


def test_dropout_acts_on_the_weights_while_training() -> None:
    torch.manual_seed(0)
    module = IoUEnhancedSelfAttention(dim=DIM, num_heads=HEADS, dropout=0.5)
    query, boxes = torch.randn(1, 10, DIM), random_boxes(1, 10)
    for learned in (False, True):
        given_boxes = boxes.clone().requires_grad_(learned)
        module.train()
        assert not torch.equal(module(query, given_boxes, None), module(query, given_boxes, None))
        module.eval()
        assert torch.equal(module(query, given_boxes, None), module(query, given_boxes, None))
