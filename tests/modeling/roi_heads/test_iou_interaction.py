"""Channel weighting and disentangled convolution against their steps written out one by one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asag.modeling.roi_heads.sparse_rcnn.channel_weighting import (
    ChannelWeightedInteraction,
    TaskPath,
)
from asag.modeling.roi_heads.sparse_rcnn.disentangled import (
    DisentangledInteraction,
    SplitDynamicConv,
)
from asag.modeling.roi_heads.sparse_rcnn.dynamic_conv import DynamicConv

DIM, DYNAMIC, FFN, POSITIONS = 16, 4, 24, 9
SIZES = {"dim": DIM, "dynamic_dim": DYNAMIC, "ffn_dim": FFN, "num_positions": POSITIONS}


@pytest.fixture
def query() -> Tensor:
    return torch.randn(2, 5, DIM, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def roi_features() -> Tensor:
    return torch.randn(10, POSITIONS, DIM, generator=torch.Generator().manual_seed(2))


def shaken(module: nn.Module) -> nn.Module:
    """Norms away from 1 and 0, so that exchanging or forgetting one shows."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.eval()


def slow_path(path: TaskPath, query: Tensor, filtered: Tensor) -> Tensor:
    """One task's path for one query (C,) and its filtered feature (P, C)."""
    mask = torch.sigmoid(path.mask.expand(path.mask.reduce(query)))
    rows = [F.relu(path.mask_norm(position * mask)) for position in filtered]
    seen = F.relu(path.project.norm(path.project.linear(torch.cat(rows))))
    z = path.norm(path.query_norm(path.query_proj(query)) + seen)
    inner = path.ffn.linear2(F.relu(path.ffn.linear1(z)))
    return path.ffn.norm(z + inner)


def test_channel_weighting_equals_its_steps(query: Tensor, roi_features: Tensor) -> None:
    module = shaken(ChannelWeightedInteraction(**SIZES))
    cls_query, reg_query, following = module(query, roi_features)
    filtered = module.conv(query.flatten(0, 1), roi_features)
    for row, one in enumerate(query.flatten(0, 1)):
        expected_cls = slow_path(module.cls_path, one, filtered[row])
        expected_reg = slow_path(module.reg_path, one, filtered[row])
        b, n = divmod(row, 5)
        torch.testing.assert_close(cls_query[b, n], expected_cls, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(reg_query[b, n], expected_reg, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(following[b, n], expected_cls + expected_reg)


def test_masks_lie_between_zero_and_one_and_differ_by_task(query: Tensor) -> None:
    module = shaken(ChannelWeightedInteraction(**SIZES))
    masks = [path.mask(query) for path in (module.cls_path, module.reg_path)]
    assert all(((m > 0) & (m < 1)).all() for m in masks)
    assert not torch.allclose(*masks)


def test_mask_is_a_linear_bottleneck(query: Tensor) -> None:
    mask = shaken(ChannelWeightedInteraction(**SIZES)).cls_path.mask
    assert mask.reduce.out_features == DIM // 8
    # Without an activation in between, the logit of a sum is the sum of the logits.
    logit = torch.logit(mask(query), eps=1e-7)
    zero = torch.logit(mask(torch.zeros(DIM)), eps=1e-7)
    torch.testing.assert_close(
        torch.logit(mask(2 * query), eps=1e-7) - zero, 2 * (logit - zero), atol=2e-2, rtol=1e-2
    )


def slow_split(conv: SplitDynamicConv, query: Tensor, roi_features: Tensor) -> Tensor:
    """Two ordinary dynamic convolutions of half the width, one query at a time: (R, 2, P, C/2)."""
    half, answers = DIM // 2, []
    for q, features in zip(query, roi_features, strict=True):
        first, second = conv.dynamic_layer(q).chunk(2)
        tasks = []
        for t in range(2):
            kernel1 = first[t * half * DYNAMIC :][: half * DYNAMIC].view(half, DYNAMIC)
            kernel2 = second[t * half * DYNAMIC :][: half * DYNAMIC].view(DYNAMIC, half)
            channels = slice(t * half, (t + 1) * half)
            x = F.relu(conv.norm1(features[:, channels] @ kernel1)) @ kernel2
            weight, bias = conv.norm2.weight[channels], conv.norm2.bias[channels]
            tasks.append(F.relu(F.layer_norm(x, (half,), weight, bias)))
        answers.append(torch.stack(tasks))
    return torch.stack(answers)


def test_split_convolution_is_two_convolutions(query: Tensor, roi_features: Tensor) -> None:
    conv = shaken(SplitDynamicConv(dim=DIM, dynamic_dim=DYNAMIC))
    expected = slow_split(conv, query.flatten(0, 1), roi_features)
    # The stage hands over a transposed view of what RoIAlign read.
    view = roi_features.transpose(1, 2).contiguous().transpose(1, 2)
    for given in (roi_features, view):
        actual = conv(query.flatten(0, 1), given)
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


def test_split_convolution_has_the_parameters_of_a_whole_one() -> None:
    shapes = [
        {k: v.shape for k, v in kind(dim=DIM, dynamic_dim=DYNAMIC).state_dict().items()}
        for kind in (SplitDynamicConv, DynamicConv)
    ]
    assert shapes[0] == shapes[1]


def test_tasks_share_nothing_before_they_rejoin(query: Tensor, roi_features: Tensor) -> None:
    conv = shaken(SplitDynamicConv(dim=DIM, dynamic_dim=DYNAMIC))
    changed = roi_features.clone()
    changed[..., DIM // 2 :] += torch.randn(10, POSITIONS, DIM // 2)
    before, after = (conv(query.flatten(0, 1), x) for x in (roi_features, changed))
    assert torch.equal(before[:, 0], after[:, 0])
    assert not torch.allclose(before[:, 1], after[:, 1])


@pytest.mark.parametrize("recover", [False, True])
def test_disentangled_equals_its_steps(query: Tensor, roi_features: Tensor, recover: bool) -> None:
    module = shaken(DisentangledInteraction(**SIZES, recover_dim=recover))
    cls_query, reg_query, following = module(query, roi_features)
    filtered = slow_split(module.conv, query.flatten(0, 1), roi_features)
    seen = torch.cat(
        [F.relu(p.norm(p.linear(filtered[:, t].flatten(1)))) for t, p in enumerate(module.project)],
        dim=-1,
    )
    z = module.norm(query + seen.view(query.shape))
    z = module.ffn.norm(z + module.ffn.linear2(F.relu(module.ffn.linear1(z))))
    torch.testing.assert_close(following, z, atol=1e-4, rtol=1e-4)
    for t, actual in enumerate((cls_query, reg_query)):
        expected = module.recover[t](z[..., t * DIM // 2 : (t + 1) * DIM // 2])
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
        assert actual.shape[-1] == module.task_dim == (DIM if recover else DIM // 2)


def test_odd_width_cannot_be_halved() -> None:
    with pytest.raises(ValueError, match=r"MODEL.DECODER.HIDDEN_DIM.*15"):
        DisentangledInteraction(**(SIZES | {"dim": 15}), recover_dim=False)


@pytest.mark.parametrize("kind", [ChannelWeightedInteraction, DisentangledInteraction])
def test_rows_are_independent_and_every_parameter_learns(
    kind: type[nn.Module], query: Tensor, roi_features: Tensor
) -> None:
    extra = {"recover_dim": True} if kind is DisentangledInteraction else {}
    module = shaken(kind(**SIZES, **extra))
    outputs = module(query, roi_features)
    alone = module(query[1:], roi_features[5:])
    for together, single in zip(outputs, alone, strict=True):
        torch.testing.assert_close(together[1:], single, atol=1e-5, rtol=1e-4)
    sum((x * torch.randn_like(x)).sum() for x in outputs).backward()
    without = [k for k, p in module.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []
