"""Later errors do not hide the first one, and nothing costs a step its time."""

import sys
from types import SimpleNamespace

import pytest
import torch
from engine_support import register_tiny_shapes, tiny_cfg
from torch import nn

from asag.diagnostics.replay import load_step
from asag.engine import NonFiniteLossError, Trainer, non_finite
from asag.engine.ema import WeightAverage
from asag.engine.non_finite import update_on_device


class Doomed(Trainer):
    """Fails in its second step."""

    def run_step(self):
        super().run_step()
        if self.iter == 1:
            raise RuntimeError("the first thing that went wrong")


def test_a_writer_that_fails_at_the_end_does_not_hide_the_reason(tmp_path, monkeypatch, caplog):
    def init(**options):
        raise RuntimeError("no API key")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    register_tiny_shapes()
    run = Doomed(tiny_cfg(tmp_path, LOGGING__WANDB="shapes"))
    with pytest.raises(RuntimeError, match="the first thing that went wrong"):
        run.train()
    assert "no API key" in caplog.text


def test_divergence_is_told_where_its_file_cannot_be_written(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    register_tiny_shapes()
    monkeypatch.setattr(non_finite, "atomic_writer", full)
    run = Trainer(tiny_cfg(tmp_path))
    with torch.no_grad():
        next(run.model.roi_heads.parameters()).fill_(float("nan"))
    with pytest.raises(NonFiniteLossError, match=r"diverged at iteration 0.*No space left"):
        run.train()


@pytest.mark.parametrize("content", [torch.ones(2), [1, 2], 3])
def test_replay_names_a_file_of_something_else(tmp_path, content):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"x\.pth lacks iteration"):
        load_step(tmp_path / "x.pth")


def test_a_step_left_out_on_the_device_brings_the_average_closer_to_the_same_weights():
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    average = WeightAverage(model, decay=0.5)
    average.follow(optimizer)
    for bad in (False, True, False):
        before, weight = average.state_dict()["weight"].clone(), model.weight.detach().clone()
        model(torch.full((1, 2), float("nan") if bad else 1.0)).sum().backward()
        update_on_device(optimizer, torch.tensor(bad))
        assert torch.equal(model.weight, weight) == bad
        optimizer.zero_grad()
        expected = (before + model.weight) / 2
        torch.testing.assert_close(average.state_dict()["weight"], expected.detach())
