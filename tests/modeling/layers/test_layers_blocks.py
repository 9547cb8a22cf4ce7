"""Attention, dynamic convolution and towers against slow references."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import layer_norm

from asag.modeling.layers.attention import SelfAttention, attendable
from asag.modeling.layers.feed_forward import FeedForward, make_tower
from asag.modeling.layers.init import prior_bias, xavier_init_matrices
from asag.modeling.roi_heads.sparse_rcnn.dynamic_conv import DynamicConv, RoIProjection

B, N, C, H = 2, 7, 16, 4


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def pair_of_attentions():
    """Ours and torch's with equal, non-trivial weights."""
    ours, theirs = SelfAttention(dim=C, num_heads=H), nn.MultiheadAttention(C, H, batch_first=True)
    with torch.no_grad():
        for p in ours.parameters():
            nn.init.normal_(p, std=0.3)
        theirs.in_proj_weight.copy_(ours.in_proj.weight)
        theirs.in_proj_bias.copy_(ours.in_proj.bias)
    theirs.out_proj.load_state_dict(ours.out_proj.state_dict())
    return ours, theirs


def test_attention_equals_multihead_attention_forward_and_backward():
    ours, theirs = pair_of_attentions()
    x, boxes = torch.randn(B, N, C, requires_grad=True), torch.zeros(B, N, 4)
    y = x.detach().clone().requires_grad_()
    a, b = ours(x, boxes, None), theirs(y, y, y)[0]
    assert torch.allclose(a, b, atol=1e-6)
    a.pow(2).sum().backward()
    b.pow(2).sum().backward()
    assert torch.allclose(x.grad, y.grad, atol=1e-4)
    assert torch.allclose(ours.in_proj.weight.grad, theirs.in_proj_weight.grad, atol=1e-4)


def test_masked_attention_equals_multihead_attention_on_real_rows():
    ours, theirs = pair_of_attentions()
    x = torch.randn(B, N, C)
    valid = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    a = ours(x, torch.zeros(B, N, 4), valid)
    b = theirs(x, x, x, key_padding_mask=~valid)[0]
    assert torch.allclose(a[valid], b[valid], atol=1e-6)


def test_padding_changes_nothing():
    attention, _ = pair_of_attentions()
    x, boxes = torch.randn(B, N, C), torch.zeros(B, N, 4)
    alone = attention(x, boxes, None)
    junk = torch.full((B, 3, C), 1e3)
    valid = torch.arange(N + 3) < N
    padded = attention(torch.cat((x, junk), 1), torch.zeros(B, N + 3, 4), valid.expand(B, -1))
    assert torch.allclose(padded[:, :N], alone, atol=1e-5)


def test_fully_padded_image_has_finite_values_and_gradients():
    attention, _ = pair_of_attentions()
    x = torch.randn(B, N, C, requires_grad=True)
    valid = torch.zeros(B, N, dtype=torch.bool)
    y = attention(x, torch.zeros(B, N, 4), valid)
    y.sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()


def test_attendable_keys():
    mask = attendable(torch.tensor([[True, False, True]]))
    expected = torch.tensor([[1, 0, 1], [1, 1, 1], [1, 0, 1]], dtype=torch.bool)
    assert torch.equal(mask, expected[None, None])


def test_permuted_queries_give_permuted_answers():
    attention, _ = pair_of_attentions()
    x, order = torch.randn(B, N, C), torch.randperm(N)
    boxes = torch.zeros(B, N, 4)
    assert torch.allclose(
        attention(x[:, order], boxes, None), attention(x, boxes, None)[:, order], atol=1e-6
    )


def test_attention_dropout_acts_in_training_only():
    attention = SelfAttention(dim=C, num_heads=H, dropout=0.5)
    x, boxes = torch.randn(B, N, C), torch.zeros(B, N, 4)
    assert not torch.equal(attention(x, boxes, None), attention(x, boxes, None))
    attention.eval()
    assert torch.equal(attention(x, boxes, None), attention(x, boxes, None))


def test_heads_must_divide_channels():
    with pytest.raises(ValueError, match=r"MODEL\.DECODER\.NUM_HEADS"):
        SelfAttention(dim=16, num_heads=5)


def test_dynamic_conv_equals_a_loop_over_queries():
    queries, positions, dim, inner, query_dim = 5, 9, 8, 3, 6
    conv = DynamicConv(dim=dim, dynamic_dim=inner, query_dim=query_dim)
    for norm in (conv.norm1, conv.norm2):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    query, roi = torch.randn(queries, query_dim), torch.randn(queries, positions, dim)
    out = conv(query, roi)
    for r in range(queries):
        kernels = conv.dynamic_layer.weight @ query[r] + conv.dynamic_layer.bias
        first = kernels[: dim * inner].reshape(dim, inner)
        second = kernels[dim * inner :].reshape(inner, dim)
        for p in range(positions):
            x = torch.stack([sum(roi[r, p, c] * first[c, d] for c in range(dim)) for d in range(3)])
            x = layer_norm(x, (inner,), conv.norm1.weight, conv.norm1.bias).clamp(min=0)
            x = torch.stack([sum(x[d] * second[d, c] for d in range(inner)) for c in range(dim)])
            x = layer_norm(x, (dim,), conv.norm2.weight, conv.norm2.bias).clamp(min=0)
            assert torch.allclose(out[r, p], x, atol=1e-5)


def test_dynamic_conv_keeps_queries_apart():
    conv = DynamicConv(dim=8, dynamic_dim=3)
    query, roi = torch.randn(4, 8), torch.randn(4, 9, 8)
    out = conv(query, roi)
    query[2] += 1
    changed = (conv(query, roi) != out).flatten(1).any(dim=1)
    assert changed.tolist() == [False, False, True, False]


def test_projection_flattens_position_major():
    projection = RoIProjection(dim=3, num_positions=2, out_dim=5)
    x = torch.randn(4, 2, 3)
    flat = torch.cat((x[:, 0], x[:, 1]), dim=1)
    expected = projection.norm(flat @ projection.linear.weight.T + projection.linear.bias)
    assert torch.allclose(projection(x), expected.clamp(min=0), atol=1e-6)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_feed_forward_is_a_normed_residual(activation):
    block = FeedForward(dim=6, hidden_dim=11, activation=activation)
    x = torch.randn(2, 3, 6)
    inner = getattr(torch.nn.functional, activation)(block.linear1(x))
    expected = layer_norm(x + block.linear2(inner), (6,))
    assert torch.allclose(block(x), expected, atol=1e-6)


def test_tower():
    tower = make_tower(6, 3)
    assert [type(x) for x in tower] == 3 * [nn.Linear, nn.LayerNorm, nn.ReLU]
    assert all(x.bias is None for x in tower if isinstance(x, nn.Linear))
    x = torch.randn(2, 6)
    assert make_tower(6, 0)(x) is x


def test_initialization():
    module = nn.Sequential(nn.Linear(50, 100), nn.LayerNorm(100))
    before = module[0].bias.clone()
    xavier_init_matrices(module)
    bound = math.sqrt(6 / 150)
    assert module[0].weight.abs().max() <= bound and module[0].weight.abs().max() > 0.95 * bound
    assert torch.equal(module[0].bias, before) and (module[1].weight == 1).all()
    assert torch.tensor(prior_bias(0.01)).sigmoid() == pytest.approx(0.01)
