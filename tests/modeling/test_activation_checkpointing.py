"""Activation checkpointing changes what is kept, and no number."""

from __future__ import annotations

import copy

import pytest
import torch
from family_support import FAMILIES, make_batch, make_model
from torch import nn

from asag.modeling.layers.buffers import training_buffers
from asag.modeling.layers.checkpointing import Recomputed, recompute


def train_pass(model: nn.Module, amp: bool = False) -> tuple[dict, dict, list]:
    """Losses, gradients and buffers of one pass."""
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        losses = model(make_batch())
    sum(losses.values()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return losses, gradients, training_buffers(model)


def numbers(losses: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: value.item() for name, value in losses.items()}


def assert_same(plain: nn.Module, other: nn.Module, amp: bool = False) -> None:
    losses, gradients, buffers = train_pass(plain, amp)
    other_losses, other_gradients, other_buffers = train_pass(other, amp)
    assert numbers(losses) == numbers(other_losses)
    assert gradients.keys() == other_gradients.keys() and gradients
    for name, value in gradients.items():
        torch.testing.assert_close(other_gradients[name], value, rtol=1e-5, atol=1e-7, msg=name)
    for value, other_value in zip(buffers, other_buffers, strict=True):
        assert torch.equal(value, other_value)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_and_statistics_are_the_same(family):
    plain, other = (make_model(*FAMILIES[family], flag) for flag in (False, True))
    assert not any(isinstance(m, Recomputed) for m in plain.modules())
    again = [m for m in other.modules() if isinstance(m, Recomputed)]
    expected = len(other.roi_heads.stages) + 4 + len(getattr(other.neck, "layers", ()))
    assert len(again) >= expected - 1, "decoder stages, encoder layers and backbone stages"
    assert list(plain.state_dict()) == list(other.state_dict())
    assert_same(plain, other)


def test_autocast_is_that_of_the_first_pass():
    plain, other = (make_model(*FAMILIES["detr"], flag) for flag in (False, True))
    assert_same(plain, other, amp=True)


def test_copies_of_a_model_compute_with_their_own_weights():
    model = make_model(*FAMILIES["sparse"], True)
    before = train_pass(copy.deepcopy(model))[0]
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert numbers(train_pass(twin)[0]) == numbers(before)


def test_compiling_as_well_is_refused():
    with pytest.raises(
        ValueError, match=r"ACTIVATION_CHECKPOINTING and MODEL\.COMPILE are both on"
    ):
        make_model("DETR/detr_tiny.yaml", {"MODEL.COMPILE": True}, True)


def test_less_is_kept_for_the_backward_pass():
    def kept(model: nn.Module) -> int:
        sizes: dict[int, int] = {}

        def pack(x: torch.Tensor) -> torch.Tensor:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            losses = model(make_batch())
        assert losses
        return sum(sizes.values())

    file, changes = FAMILIES["sparse"]
    plain, other = (make_model(file, changes, flag) for flag in (False, True))
    assert kept(other) < kept(plain) / 2


def test_forward_runs_once_more_while_training_and_not_otherwise():
    calls = []

    class Layer(nn.Linear):
        def forward(self, x):
            calls.append(torch.is_autocast_enabled("cpu"))
            return super().forward(x)

    layer = Layer(2, 2)
    recompute(layer)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(torch.ones(1, 2))
    out.sum().backward()
    assert calls == [True, True]
    layer.eval()(torch.ones(1, 2))
    layer.train()
    with torch.no_grad():
        layer(torch.ones(1, 2))
    assert len(calls) == 4
