"""Conditional cross-attention against the equations written out, one query and head at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from asag.config.rules import RULES
from asag.modeling.roi_heads.detr.conditional_attention import (
    ConditionalCrossAttention,
    ConditionalSelfAttention,
    IoUEnhancedConditionalSelfAttention,
    SpatialQuery,
)
from asag.modeling.roi_heads.sparse_rcnn.iou_esa import iou_prior

B, N, L, C, H = 2, 5, 7, 16, 4
D = C // H


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def randomize(*modules: nn.Module) -> None:
    with torch.no_grad():
        for module in modules:
            for p in module.parameters():
                p.normal_(std=0.4)


def slow_cross_attention(
    layer: ConditionalCrossAttention,
    query: Tensor,
    position: Tensor,
    spatial: Tensor,
    memory: Tensor,
    spatial_keys: Tensor,
    valid: Tensor,
) -> Tensor:
    c_q, p_q = layer.content_query(query), layer.spatial_query(spatial)
    c_k, p_k = layer.content_key(memory), layer.spatial_key(spatial_keys)
    value = layer.value(memory)
    if layer.object_query is not None:
        c_q, c_k = c_q + layer.object_query(position), c_k + p_k
    mixed = torch.zeros(B, N, C)
    for b in range(B):
        for n in range(N):
            for h in range(H):
                part = slice(h * D, (h + 1) * D)
                keys = [j for j in range(L) if valid[b, j]]
                scores = torch.stack(
                    [
                        (c_q[b, n, part] @ c_k[b, j, part] + p_q[0, n, part] @ p_k[0, j, part])
                        / math.sqrt(2 * D)
                        for j in keys
                    ]
                )
                weights = scores.softmax(dim=0)
                mixed[b, n, part] = sum(
                    w * value[b, j, part] for w, j in zip(weights, keys, strict=True)
                )
    return layer.out_proj(mixed)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_cross_attention_equals_equation_3(first: bool, padded: bool) -> None:
    layers = [ConditionalCrossAttention(dim=C, num_heads=H, first=i == 0) for i in range(2)]
    randomize(*layers)
    layer = layers[0 if first else 1]
    query, position, spatial = torch.randn(B, N, C), torch.randn(1, N, C), torch.randn(1, N, C)
    memory, spatial_keys = torch.randn(B, L, C), torch.randn(1, L, C)
    valid = torch.ones(B, L, dtype=torch.bool)
    valid[1, 4:] = not padded
    mask = valid[:, None, None] if padded else None
    memories = ConditionalCrossAttention.project_memory(layers, memory, spatial_keys)
    actual = layer(query, position, spatial, memories[0 if first else 1], mask)
    expected = slow_cross_attention(layer, query, position, spatial, memory, spatial_keys, valid)
    assert torch.allclose(actual, expected, atol=1e-5)


def test_padding_is_never_attended() -> None:
    layer = ConditionalCrossAttention(dim=C, num_heads=H)
    randomize(layer)
    query, position, spatial = torch.randn(B, N, C), torch.randn(1, N, C), torch.randn(1, N, C)
    memory, keys = torch.randn(B, L, C), torch.randn(B, L, C)
    mask = (torch.arange(L) < 4)[None, None, None].expand(B, 1, 1, L)
    short = layer.project_memory([layer], memory[:, :4], keys[:, :4])[0]
    (full,) = layer.project_memory([layer], memory, keys)
    a = layer(query, position, spatial, full, mask)
    assert torch.allclose(a, layer(query, position, spatial, short, None), atol=1e-6)
    weights = layer.weights(query, position, spatial, full, mask)
    assert (weights[..., 4:] == 0).all()
    assert torch.allclose(weights.sum(-1), torch.ones(B, H, N))


def test_self_attention_equals_separate_projections() -> None:
    layer = ConditionalSelfAttention(dim=C, num_heads=H)
    randomize(layer)
    query, position = torch.randn(B, N, C), torch.randn(1, N, C)
    weights, biases = layer.in_proj.weight.split(C), layer.in_proj.bias.split(C)
    q, k, v = (query @ w.T + b for w, b in zip(weights, biases, strict=True))
    weights, biases = layer.position_proj.weight.split(C), layer.position_proj.bias.split(C)
    q, k = (x + position @ w.T + b for x, w, b in zip((q, k), weights, biases, strict=True))
    q, k, v = (x.view(B, N, H, D).transpose(1, 2) for x in (q, k, v))
    mixed = (q @ k.transpose(-1, -2) / math.sqrt(D)).softmax(-1) @ v
    expected = layer.out_proj(mixed.transpose(1, 2).reshape(B, N, C))
    assert torch.allclose(layer(query, None, None, position), expected, atol=1e-5)


def test_invalid_queries_are_never_attended() -> None:
    layer = ConditionalSelfAttention(dim=C, num_heads=H)
    query, position = torch.randn(B, N, C), torch.randn(1, N, C)
    valid = torch.tensor([[True] * 3 + [False] * 2, [True] * 5])
    full = layer(query, None, valid, position)
    alone = layer(query[:1, :3], None, None, position[:, :3])
    assert torch.allclose(full[0, :3], alone[0], atol=1e-6)
    assert full.isfinite().all()


def test_iou_enhanced_self_attention_weighs_by_overlap() -> None:
    layer = IoUEnhancedConditionalSelfAttention(dim=C, num_heads=H)
    query, position = torch.randn(B, N, C), torch.randn(1, N, C)
    corner = torch.rand(B, N, 2) * 10
    boxes = torch.cat((corner, corner + 10), dim=-1)
    q, k, v = layer.project(query, position)
    weights = (q @ k.transpose(-1, -2) / math.sqrt(D)).exp() * iou_prior(boxes)
    mixed = (weights / weights.sum(-1, keepdim=True)) @ v
    expected = layer.out_proj(mixed.transpose(1, 2).reshape(B, N, C))
    assert torch.allclose(layer(query, boxes, None, position), expected, atol=1e-5)
    plain = ConditionalSelfAttention(dim=C, num_heads=H)
    plain.load_state_dict(layer.state_dict())
    assert torch.allclose(layer(query, None, None, position), plain(query, None, None, position))


def make(kind: str = "csq", projection: str = "diagonal") -> SpatialQuery:
    module = SpatialQuery(dim=C, num_heads=H, kind=kind, projection=projection)
    randomize(module)
    return module


def test_variants_of_table_3() -> None:
    f, c_q, p_s = torch.randn(B, N, C), torch.randn(B, N, C), torch.randn(1, N, C)
    expected = {
        "csq": lambda t: t(f) * p_s,
        "csq_i": lambda t: t(c_q) * p_s,
        "csq_t": lambda t: t(f),
        "csq_p": lambda t: p_s,
        "csq_c": lambda t: f,
    }
    first = {"csq_t": torch.ones_like(p_s), "csq_c": torch.zeros_like(p_s)}
    assert set(expected) == set(RULES["MODEL.DECODER.SPATIAL_QUERY"].choices)
    for kind, formula in expected.items():
        module = make(kind)
        assert torch.allclose(module(f, c_q, p_s), formula(module.transformation))
        assert torch.equal(module(None, c_q, p_s), first.get(kind, p_s))


def test_forms_of_figure_5() -> None:
    f, p_s = torch.randn(B, N, C), torch.randn(1, N, C)
    for projection in RULES["MODEL.DECODER.SPATIAL_PROJECTION"].choices:
        module = make(projection=projection)
        actual = module(f, f, p_s)
        if projection == "identity":
            assert torch.equal(actual, p_s) and not list(module.parameters())
            continue
        t = module.transformation(f)
        for b in range(B):
            for n in range(N):
                matrix = {
                    "diagonal": lambda t: torch.diag(t),
                    "single": lambda t: t * torch.eye(C),
                    "block": lambda t: torch.block_diag(*t.view(H, D, D)),
                    "full": lambda t: t.view(C, C),
                }[projection](t[b, n])
                assert torch.allclose(actual[b, n], matrix @ p_s[0, n], atol=1e-5)


def test_transformation_as_query_must_be_diagonal() -> None:
    with pytest.raises(ValueError, match=r"MODEL\.DECODER\.SPATIAL_PROJECTION is 'full'"):
        SpatialQuery(dim=C, num_heads=H, kind="csq_t", projection="full")


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match=r"MODEL\.DECODER\.NUM_HEADS"):
        ConditionalCrossAttention(dim=C, num_heads=3)
