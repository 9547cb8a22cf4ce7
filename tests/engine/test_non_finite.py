"""Non-finite steps: detected, skipped, reported and reproduced."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import replace as changed
from pathlib import Path

import pytest
import replay as replay_tool
import torch
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from engine_support import losses, register_tiny_shapes, tiny_cfg, weights
from family_support import FAMILIES, make_batch, make_model
from torch import nn

import asag.engine.step
from asag.diagnostics.profiling import host_waits
from asag.diagnostics.replay import _Trace, load_step, replay, report
from asag.engine import NonFiniteLossError, Trainer
from asag.engine.launch import launch
from asag.engine.non_finite import (
    BOXES,
    LOGITS,
    NonFiniteGuard,
    update_on_device,
    update_unless,
    watch_predictions,
)
from asag.engine.step import TrainStep
from asag.modeling.criterion.set_criterion import SetCriterion
from asag.structures import Predictions

BAD = 2  # the iteration that goes wrong
Change = Callable[[list[dict]], None]


class SpoiltTrainer(Trainer):
    """Changes the batches of some iterations before it trains on them."""

    change: Change
    iterations = (BAD,)

    def before_train(self) -> None:
        super().before_train()
        batches = self._batches
        self._batches = (self._spoil(i, batch) for i, batch in enumerate(batches))

    def _spoil(self, i: int, batch: list[dict]) -> list[dict]:
        if i in self.iterations:
            self.change(batch)
        return batch


def infinite_pixel(batch: list[dict]) -> None:
    batch[1]["image"] = batch[1]["image"].float()
    batch[1]["image"][0, 5, 5] = math.inf


def nan_box(batch: list[dict]) -> None:
    batch[1]["instances"].gt_boxes.tensor[0, 2] = math.nan


class NaNGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * math.nan


def nan_loss(name: str, value: torch.Tensor) -> torch.Tensor:
    return value * math.nan if name == "loss_giou" else value


def nan_gradient(name: str, value: torch.Tensor) -> torch.Tensor:
    return NaNGradient.apply(value) if name == "loss_bbox" else value


@pytest.fixture
def spoil_losses(monkeypatch) -> Callable[[Callable], Change]:
    """Makes the criterion change the losses of one batch, whenever it comes."""

    def install(spoil: Callable[[str, torch.Tensor], torch.Tensor]) -> Change:
        marked: list[torch.Tensor] = []
        original = SetCriterion.forward

        def forward(self, predictions, targets, assignment):
            found = original(self, predictions, targets, assignment)
            count = targets.counts[0]
            if marked and torch.equal(targets.boxes_xyxy[0, :count], marked[0]):
                return {name: spoil(name, value) for name, value in found.items()}
            return found

        monkeypatch.setattr(SetCriterion, "forward", forward)
        return lambda batch: marked.append(batch[0]["instances"].gt_boxes.tensor.clone())

    return install


def new_trainer(folder: Path, kind: type[Trainer] = SpoiltTrainer, **changes) -> Trainer:
    register_tiny_shapes()
    settings = {"MODEL__DECODER__DROPOUT": 0.2, "SOLVER__MAX_ITER": 4}
    seed_all_rng(7)
    return kind(tiny_cfg(folder, **settings | changes))


def stopped(folder: Path, change: Change, **changes) -> str:
    """The message that ends a training."""
    trainer = new_trainer(folder, **changes)
    trainer.change = change
    with pytest.raises(NonFiniteLossError) as caught:
        trainer.train()
    return str(caught.value)


def only_file(folder: Path) -> Path:
    (path,) = folder.glob("non_finite_*.pth")
    return path


# Detected and reproduced


def test_image(tmp_path, capsys):
    message = stopped(tmp_path, infinite_pixel)
    assert f"iteration {BAD}: the image of " in message
    assert "came with 1 NaN or infinite number(s)" in message
    assert "NaN or infinite number(s) in the predicted boxes" in message
    assert "gradient norm nan" in message and "NaN or infinite gradient of backbone" in message
    assert "Learning rate 0.0005; images: " in message and "SOLVER.BASE_LR" in message
    assert f"python tools/replay.py {only_file(tmp_path)}" in message

    found = replay(load_step(only_file(tmp_path)))
    assert found.reproduced and len(found.inputs) == 1 and not found.weights
    assert found.forward.spread and found.forward.module == "backbone.bottom_up.stem.conv1.norm"
    assert replay_tool.main([str(only_file(tmp_path))]) == 0
    printed = capsys.readouterr().out
    assert "reproduced" in printed and "backbone.bottom_up.stem.conv1.norm (GroupNorm)" in printed


def test_ground_truth_box(tmp_path):
    message = stopped(tmp_path, nan_box)
    assert f"iteration {BAD}: " in message and "matching costs are NaN or infinite" in message
    assert "the ground-truth boxes of " in message
    found = replay(load_step(only_file(tmp_path)))
    assert found.reproduced and "matching costs" in found.error and found.forward is None


def test_loss(tmp_path, spoil_losses):
    message = stopped(tmp_path, spoil_losses(nan_loss))
    assert f"iteration {BAD}: loss_giou = nan, total_loss = nan (finite: loss_ce" in message
    state = load_step(only_file(tmp_path))
    assert state["iteration"] == BAD and state["learning_rate"] == 0.0005
    found = replay(state)
    assert found.reproduced and found.forward.module == "criterion"
    same = {k: v for k, v in state["values"].items() if math.isfinite(v)}
    assert {k: found.values[k] for k in same} == pytest.approx(same, rel=1e-4)
    assert same["loss_ce"] != same["loss_ce_0"], "numbers that tell something"


def test_gradient(tmp_path, spoil_losses):
    message = stopped(tmp_path, spoil_losses(nan_gradient))
    assert "gradient norm nan; NaN or infinite gradient of " in message and "more." in message
    assert "loss_bbox = nan" not in message
    state = load_step(only_file(tmp_path))
    found = replay(state)
    assert found.reproduced and found.parameters == state["parameters"]
    assert "roi_heads.stages.1.box_deltas.weight" in found.parameters
    assert "roi_heads.stages.1.class_logits.bias" not in found.parameters
    assert found.forward is None and found.backward.module == "roi_heads"
    assert "first in the backward pass: roi_heads" in "\n".join(report(state, found))


def test_boxes_too_large_to_have_an_area(tmp_path):
    """Nothing is NaN yet; the replay says why the step is bad all the same."""
    trainer = new_trainer(tmp_path)
    torch.nn.init.constant_(trainer.model.roi_heads.stages[-1].box_deltas.bias, 1e17)
    with pytest.raises(NonFiniteLossError, match="in the predicted boxes"):
        trainer.train()
    state = load_step(only_file(tmp_path))
    found = replay(state)
    assert found.reproduced and found.forward is None
    lines = report(state, found)
    assert "boxes are beyond 1e+15 pixels" in lines[-1] and "SOLVER.BASE_LR" in lines[-1]


@pytest.mark.parametrize("norm", ["GN", "BN"])
def test_learning_rate(tmp_path, norm):
    changes = {"SOLVER__OPTIMIZER": "SGD", "SOLVER__BASE_LR": 1e18, "SOLVER__ACCUMULATE_STEPS": 2}
    if norm == "BN":
        changes |= STATISTICS
    message = stopped(tmp_path, lambda _: None, **changes)
    assert "Learning rate 1e+18" in message
    state = load_step(only_file(tmp_path))
    found = replay(state)
    assert found.reproduced and found.forward is not None and not found.forward.spread
    again = [x for x in found.values if not math.isfinite(found.values[x])]
    assert again == [x for x in state["values"] if not math.isfinite(state["values"][x])]


def test_no_file_of_ours(tmp_path, capsys):
    assert replay_tool.main([str(tmp_path / "none.pth")]) == 2
    (tmp_path / "text.pth").write_text("no zip")
    assert replay_tool.main([str(tmp_path / "text.pth")]) == 2
    torch.save({"model": {}}, tmp_path / "other.pth")
    assert replay_tool.main([str(tmp_path / "other.pth")]) == 2
    assert "other.pth lacks iteration, what" in capsys.readouterr().err


def test_another_outcome_is_said(tmp_path):
    stopped(tmp_path, infinite_pixel)
    state = load_step(only_file(tmp_path))
    for sample in state["batch"]:
        sample["image"] = sample["image"].nan_to_num(posinf=0)
    found = replay(state)
    assert not found.reproduced
    assert found.forward is None and found.backward is None and found.parameters == []
    torch.save(state, only_file(tmp_path))
    assert replay_tool.main([str(only_file(tmp_path))]) == 1


# Skipped


def as_on_a_gpu(trainer: Trainer, monkeypatch) -> None:
    """The host reads results late and logs rarely, and the optimizer decides on the device."""
    trainer._trainer.guard.late = True
    monkeypatch.setattr(Trainer, "_on_cpu", False)
    monkeypatch.setattr(asag.engine.step, "update_unless", update_on_device)


STATISTICS = {"MODEL__SLIM_RESNET__NORM": "BN", "MODEL__SLIM_RESNET__WIDTH": 8}


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("change", [infinite_pixel, nan_box, "loss"])
def test_a_bad_step_does_not_reach_the_weights(tmp_path, change, late, monkeypatch, spoil_losses):
    if change == "loss":
        change = spoil_losses(nan_loss)
    healthy = new_trainer(tmp_path / "healthy", Trainer, SOLVER__MAX_ITER=BAD, **STATISTICS)
    healthy.train()
    trainer = new_trainer(tmp_path / "bad", SOLVER__MAX_ITER=BAD + 1, **STATISTICS)
    trainer.change = change
    if late:  # the last step of a run: noticed before the final checkpoint
        as_on_a_gpu(trainer, monkeypatch)
    with pytest.raises(NonFiniteLossError, match=f"iteration {BAD}"):
        trainer.train()
    assert not (tmp_path / "bad" / "last_checkpoint").exists()
    assert torch.equal(weights(trainer.model), weights(healthy.model))
    assert late or losses(trainer)[:BAD] == losses(healthy)
    state = load_step(only_file(tmp_path / "bad"))
    for name, value in healthy.model.state_dict().items():
        assert torch.equal(state["model"][name], value), name
    assert replay(state).reproduced


@pytest.mark.parametrize("late", [False, True])
def test_a_bad_step_ends_training_before_an_evaluation(tmp_path, late, monkeypatch):
    trainer = new_trainer(tmp_path, TEST__EVAL_PERIOD=BAD + 1)
    trainer.change = infinite_pixel
    if late:
        as_on_a_gpu(trainer, monkeypatch)
    monkeypatch.setattr(trainer, "evaluate", lambda: pytest.fail("evaluated a diverged model"))
    with pytest.raises(NonFiniteLossError, match=f"iteration {BAD}"):
        trainer.train()


def test_late_file_holds_what_the_bad_step_met(tmp_path, monkeypatch):
    states = []
    for late in (False, True):
        trainer = new_trainer(tmp_path / str(late), **STATISTICS)
        trainer.change = infinite_pixel
        if late:
            as_on_a_gpu(trainer, monkeypatch)
        with pytest.raises(NonFiniteLossError, match=f"iteration {BAD}"):
            trainer.train()
        states.append(load_step(only_file(tmp_path / str(late))))
    early, late = states
    assert early["values"].keys() == late["values"].keys()
    assert early["what"] == late["what"] and early["parameters"] == late["parameters"]
    for name, value in early["model"].items():
        assert torch.equal(late["model"][name], value), name
        assert value.isfinite().all(), name
    assert torch.equal(early["rng"]["torch"], late["rng"]["torch"])


def test_a_healthy_run_is_the_same_without_the_guard(tmp_path):
    guarded, plain = (new_trainer(tmp_path / n, Trainer, SOLVER__MAX_ITER=2) for n in "ab")
    guarded.train()
    seed_all_rng(7)
    plain = Trainer(plain.cfg)
    plain._trainer.guard.step = lambda iteration, batch: contextlib.nullcontext()
    plain._trainer.guard.examine = lambda losses, gradients: torch.tensor(False)
    plain.train()
    assert torch.equal(weights(guarded.model), weights(plain.model))
    assert losses(guarded) == losses(plain)


def test_fused_optimizer_decides_on_the_device():
    torch.manual_seed(0)
    layers = [nn.Linear(3, 3), nn.Linear(3, 3)]
    layers[1].load_state_dict(layers[0].state_dict())
    optimizers = [torch.optim.AdamW(x.parameters(), lr=0.1, fused=True) for x in layers]
    for bad in (True, False, True, False):
        gradient = torch.randn(3, 3)
        for layer in layers:
            layer.weight.grad = gradient * math.nan if bad else gradient.clone()
            layer.bias.grad = torch.ones(3)
        update_on_device(optimizers[0], torch.tensor(bad))
        update_unless(optimizers[1], torch.tensor(bad))
        assert torch.equal(layers[0].weight, layers[1].weight)
        assert torch.equal(layers[0].bias, layers[1].bias)
    state = optimizers[0].state[layers[0].weight]
    assert state["step"].item() == 2 and state["exp_avg"].isfinite().all()


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, batch):
        return {"loss_line": (self.weight * batch[0]["slope"]).sum() + batch[0]["offset"]}


@pytest.mark.skipif(not hasattr(torch.amp, "GradScaler"), reason="needs a scaler for the CPU")
def test_loss_scaler(tmp_path):
    """Overflowing gradients are the scaler's business, a bad loss is not."""
    model = Line()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    guard = NonFiniteGuard(model, optimizer, folder=tmp_path)
    step = TrainStep(model, optimizer, guard=guard)
    step.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for slope in (0.5, 1e37):
        step([{"slope": slope, "offset": 0.0}])
        assert model.weight.tolist() == [0.5, 0.5]
    with pytest.raises(NonFiniteLossError, match=r"iteration 7: loss_line = inf"):
        step([{"slope": 0.5, "offset": math.inf}], iteration=7)
    assert model.weight.tolist() == [0.5, 0.5] and only_file(tmp_path)


def test_the_host_does_not_wait_for_the_result_of_a_step(monkeypatch):
    model = Line()
    step = TrainStep(model, torch.optim.AdamW(model.parameters(), fused=True))
    batch = [{"slope": 0.5, "offset": 0.0}]
    assert host_waits(lambda: step(batch)), "on a CPU it reads the result at once"
    step.guard.late = True
    monkeypatch.setattr(asag.engine.step, "update_unless", update_on_device)
    assert host_waits(lambda: step(batch)) == {}


def test_a_step_without_a_folder_writes_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = Line()
    step = TrainStep(model, torch.optim.SGD(model.parameters(), lr=1.0))
    with pytest.raises(NonFiniteLossError, match="loss_line = inf") as caught:
        step([{"slope": 0.5, "offset": math.inf}])
    assert model.weight.tolist() == [1.0, 1.0]
    assert "replay.py" not in str(caught.value) and not list(tmp_path.iterdir())


def test_watch_replaces_bad_predictions_by_zeros():
    class Heads(nn.Module):
        def forward(self, predictions):
            return predictions

    model = nn.Module()
    model.roi_heads = Heads()
    boxes, logits = torch.rand(2, 1, 3, 4), torch.rand(2, 1, 3, 5)
    valid = torch.tensor([[True, True, False]])
    good = Predictions(logits, boxes, valid)
    with watch_predictions(model) as counts:
        cleaned = model.roi_heads(good)
    assert torch.equal(cleaned.boxes_xyxy, boxes) and torch.equal(cleaned.logits, logits)
    assert {name: count.item() for name, count in counts.items()} == {BOXES: 0, LOGITS: 0}

    boxes, logits = boxes.clone(), logits.clone()
    boxes[0, 0, 1, 2], boxes[1, 0, 0, 0], boxes[0, 0, 2] = math.nan, 1e16, math.inf
    logits[1, 0, 1, 3] = -math.inf
    bad = changed(good, boxes_xyxy=boxes, logits=logits)
    with watch_predictions(model) as counts:
        cleaned = model.roi_heads(bad)
    assert {name: count.item() for name, count in counts.items()} == {BOXES: 2, LOGITS: 1}
    assert cleaned.boxes_xyxy.isfinite().all() and (cleaned.boxes_xyxy == 0).sum() == 6
    assert cleaned.logits[1, 0, 1, 3] == 0 and (cleaned.logits != logits).sum() == 1
    assert model.roi_heads(bad) is bad


@pytest.mark.parametrize("family", ["iou", "dynamic", "asag-d", "detr-padding", "conditional"])
def test_trace_finds_nothing_in_healthy_models(family):
    model = make_model(*FAMILIES[family], False)
    trace = _Trace(model)
    sum(model(make_batch()).values()).backward()
    assert trace.forward is None and trace.backward is None


# Several processes


def work(data: str, folder: str) -> int:
    """One of two processes, of which only the second has a bad image."""
    register_tiny_shapes(data)

    def spoil(batch: list[dict]) -> None:
        if comm.get_rank() == 1:
            infinite_pixel(batch)

    settings = {"MODEL__DECODER__DROPOUT": 0, "SOLVER__MEMORY_CHECK": "always"}
    trainer = new_trainer(Path(folder) / "run", **settings)
    trainer.change = spoil
    try:
        trainer.train()
    except NonFiniteLossError as error:
        (Path(folder) / f"message{comm.get_rank()}.txt").write_text(str(error))
    torch.save(weights(trainer.model), Path(folder) / f"weights{comm.get_rank()}.pth")
    return 0


def test_two_processes_end_together(tmp_path):
    assert launch(work, (str(register_tiny_shapes()), str(tmp_path)), processes=2) == 0
    messages = [(tmp_path / f"message{rank}.txt").read_text() for rank in (0, 1)]
    for message in messages:
        assert f"iteration {BAD}: the image of " in message
        assert message.split("images: ")[1].count(".png") == 4, "of both processes"
    assert only_file(tmp_path / "run").name.endswith("_rank1.pth")
    assert "replay.py" in messages[1] and "replay.py" not in messages[0]
    first, second = (torch.load(tmp_path / f"weights{rank}.pth") for rank in (0, 1))
    assert torch.equal(first, second) and first.isfinite().all()
