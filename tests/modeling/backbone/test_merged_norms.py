"""Frozen norms of timm's networks, computed by the convolutions in front of them."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("timm")

from asag.inference.deploy import fold_batch_norms, merge_frozen_norms
from asag.modeling.backbone import TimmBackbone


def network(name="tf_efficientnet_lite0", **options):
    torch.manual_seed(0)
    net = TimmBackbone(name, norm="FrozenBN", **options).double()
    generator = torch.Generator().manual_seed(1)
    for key, buffer in net.named_buffers():
        if "num_batches" not in key:  # statistics other than 0 and 1
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return net.train()


def run(net, image):
    """Maps, and the gradients of what can learn."""
    outputs = net(image)
    sum((x * x).mean() for x in outputs.values()).backward()
    gradients = {k: p.grad.clone() for k, p in net.named_parameters() if p.requires_grad}
    net.zero_grad()
    return outputs, gradients


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "efficientnet_lite0"])
def test_merged_norms_change_neither_maps_nor_gradients_nor_names(name):
    net = network(name, freeze_at=2)
    image = torch.rand(2, 3, 64, 96, dtype=torch.double)
    maps, gradients = run(net, image)
    state = net.state_dict()
    assert merge_frozen_norms(net) == 48
    merged_maps, merged_gradients = run(net, image)
    assert_same(merged_maps, maps)
    assert_same(merged_gradients, gradients)
    assert_same(net.state_dict(), state)
    assert merge_frozen_norms(net) == 0, "there are none left"


def test_a_copy_has_norms_of_its_own():
    net = network()
    merge_frozen_norms(net)
    twin = copy.deepcopy(net)
    image = torch.rand(1, 3, 64, 64, dtype=torch.double)
    before = run(net, image)[0]
    for parameter in twin.state_dict().values():
        parameter.mul_(0)
    assert_same(run(net, image)[0], before)
    assert not any(x.abs().sum() for x in twin(image).values())


def test_merged_norms_can_be_folded_for_good():
    net = network().eval()
    image = torch.rand(1, 3, 64, 64, dtype=torch.double)
    expected = net(image)
    merge_frozen_norms(net)
    with torch.no_grad():
        assert fold_batch_norms(net) == 48
        assert_same(net(image), expected)


def test_norms_that_learn_stay_where_they_are():
    torch.manual_seed(0)
    net = TimmBackbone("tf_efficientnet_lite0", norm="BN").train()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    assert merge_frozen_norms(net) == 0
    assert net.training
    assert_same(net.state_dict(), state)  # running statistics included
