"""The moving average of the weights: its arithmetic, its way through checkpoints, who uses it."""

from __future__ import annotations

import copy

import pytest
import torch
from detectron2.engine import HookBase
from detectron2.utils.env import seed_all_rng
from engine_support import losses, register_tiny_shapes, tiny_cfg
from torch import nn

from asag.checkpoint.loading import PublishedCheckpointer, load_weights
from asag.engine import Trainer
from asag.engine.ema import WeightAverage
from asag.inference.predictor import Predictor

EMA = {"SOLVER__EMA__ENABLED": True, "SOLVER__EMA__DECAY": 0.7}


def trainer(folder, **changes) -> Trainer:
    """Batch norm, so that there are statistics; dropout, so that a resume could go astray."""
    settings = {
        "MODEL__SLIM_RESNET__NORM": "BN",
        "MODEL__SLIM_RESNET__WIDTH": 8,
        "MODEL__DECODER__DROPOUT": 0.1,
        "SOLVER__MAX_ITER": 4,
        "SOLVER__CHECKPOINT_PERIOD": 2,
    }
    register_tiny_shapes()
    seed_all_rng(7)
    return Trainer(tiny_cfg(folder, **settings | EMA | changes))


class Recorder(HookBase):
    """Copies the weights after every step, and may stop the training like a power cut."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []
        self.stop_after = stop_after

    def after_step(self) -> None:
        self.weights.append(trainable(self.trainer.checkpointer.model))
        if self.stop_after == len(self.weights):
            raise KeyboardInterrupt


def trainable(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a.keys() & b.keys())


@pytest.mark.parametrize("warmup", [1.0, 10.0])
def test_average_of_a_known_sequence(warmup):
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    model[0].bias.requires_grad_(False)
    average = WeightAverage(model, decay=0.9, warmup=warmup)
    expected = model[0].weight.detach().double()
    for t in range(30):
        with torch.no_grad():
            model[0].weight.copy_(torch.randn(3, 2))
            model[0].bias.fill_(t)
            model[1].running_mean.fill_(t)
        average.update()
        decay = min(0.9, (1 + t) / (warmup + t))
        expected = decay * expected + (1 - decay) * model[0].weight.detach().double()
    state = average.state_dict()
    assert torch.allclose(state["0.weight"].double(), expected, atol=1e-6)
    assert not torch.allclose(state["0.weight"], model[0].weight)
    # What is not trained is the model's own.
    assert state["0.bias"].tolist() == state["1.running_mean"].tolist() == [29.0] * 3
    assert state.keys() == model.state_dict().keys()


def test_applied_weights_and_back_again_even_after_an_error():
    model = nn.Linear(2, 2)
    average = WeightAverage(model, decay=0.5)
    before = trainable(model)
    with torch.no_grad():
        model.weight.add_(1)
    after = trainable(model)
    with pytest.raises(KeyError), average.applied():
        assert same(trainable(model), before)
        raise KeyError
    assert same(trainable(model), after)
    assert same(average.state_dict(), before)
    model.weight.sum().backward()  # the optimizer's parameters are still the model's
    assert model.weight.grad is not None


def test_a_skipped_step_is_no_update():
    """A loss scaler does not call the optimizer when gradients overflow."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    average = WeightAverage(model, decay=0.5)
    average.follow(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for x, updates in ((float("inf"), 0), (1.0, 1)):
        optimizer.zero_grad()
        scaler.scale(model(torch.full((1, 2), x)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert average.updates == updates


@pytest.mark.parametrize("parts", [1, 2], ids=["whole", "accumulating"])
def test_training_averages_once_a_step(tmp_path, parts):
    run = trainer(tmp_path, SOLVER__ACCUMULATE_STEPS=parts)
    expected = {n: p.double() for n, p in trainable(run.checkpointer.model).items()}
    recorder = Recorder()
    run.register_hooks([recorder])
    run.train()
    for t, step in enumerate(recorder.weights):
        decay = min(0.7, (1 + t) / (10 + t))
        expected = {n: decay * x + (1 - decay) * step[n].double() for n, x in expected.items()}
    assert run.ema.updates == 4
    average = run.ema.state_dict()
    for name, value in expected.items():
        assert torch.allclose(average[name].double(), value, atol=1e-6), name


def test_resumed_average_equals_uninterrupted_one(tmp_path):
    whole = trainer(tmp_path / "whole")
    whole.train()
    broken = trainer(tmp_path / "broken")
    broken.register_hooks([Recorder(stop_after=3)])
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    resumed = trainer(tmp_path / "broken")
    resumed.resume_or_load(resume=True)
    assert (resumed.start_iter, resumed.ema.updates) == (2, 2)
    resumed.train()
    assert losses(resumed) == losses(whole)[2:]
    assert same(resumed.ema.state_dict(), whole.ema.state_dict())
    assert same(trainable(resumed.checkpointer.model), trainable(whole.checkpointer.model))


def test_files_hold_both_and_readers_take_the_average(tmp_path):
    run = trainer(tmp_path)
    run.train()
    file = tmp_path / "model_final.pth"
    state = torch.load(file, weights_only=True)
    raw, average = state["model"], state["ema"]
    assert not same(raw, average) and raw.keys() == average.keys()
    assert same(raw, trainable(run.checkpointer.model))

    model = copy.deepcopy(run.checkpointer.model)
    for use, expected in ((True, average), (False, raw)):
        load_weights(model, str(file), use_average=use)
        assert same(trainable(model), expected)
        options = {"MODEL__WEIGHTS": file, "TEST__EMA_WEIGHTS": use}
        cfg = tiny_cfg(
            tmp_path, MODEL__SLIM_RESNET__NORM="BN", MODEL__SLIM_RESNET__WIDTH=8, **options
        )
        assert same(trainable(Predictor.from_config(cfg).model), expected)
    PublishedCheckpointer(model).load(str(file))
    assert same(trainable(model), average)

    # A new training from this file starts at the average, and so does its own average.
    fine = trainer(tmp_path / "fine", MODEL__WEIGHTS=file)
    fine.resume_or_load(resume=False)
    assert same(trainable(fine.checkpointer.model), average)
    assert same(fine.ema.state_dict(), average) and fine.ema.updates == 0


def test_resume_with_the_average_newly_switched_on(tmp_path):
    trainer(tmp_path, SOLVER__EMA__ENABLED=False, SOLVER__MAX_ITER=2).train()
    assert "ema" not in torch.load(tmp_path / "model_final.pth", weights_only=True)
    run = trainer(tmp_path)
    run.resume_or_load(resume=True)
    assert same(run.ema.state_dict(), trainable(run.checkpointer.model)) and run.ema.updates == 0
    run.train()
    assert run.ema.updates == 2


def test_evaluation_and_best_weights_use_the_average(tmp_path, monkeypatch):
    seen = []

    def test(cfg, model, evaluators=None):
        seen.append(trainable(model))
        return {"bbox": {"AP": 50.0}}

    monkeypatch.setattr(Trainer, "test", staticmethod(test))
    changes = {"DATASETS__TEST": "('engine_shapes_val',)", "SOLVER__MAX_ITER": 2}
    for use in (True, False):
        run = trainer(tmp_path, TEST__EMA_WEIGHTS=use, **changes)
        run.train()
        raw, average = trainable(run.checkpointer.model), run.ema.state_dict()
        assert same(seen[-1], average if use else raw) and not same(raw, average)
        best = torch.load(tmp_path / "model_best.pth", weights_only=True)
        assert same(best["model"], average if use else raw) and "ema" not in best


def test_foreign_average_is_refused():
    average = WeightAverage(nn.Linear(2, 2), decay=0.5)
    with pytest.raises(ValueError, match=r"weight is missing.*shape \(2, 2\)"):
        average.load_state_dict({})
    with pytest.raises(ValueError, match=r"of shape \(3, 2\)"):
        average.load_state_dict(nn.Linear(2, 3).state_dict())
