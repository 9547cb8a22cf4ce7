"""One optimizer step: groups, clipping, accumulation, mixed precision, what is logged."""

from __future__ import annotations

import copy
import math
import shutil
from dataclasses import replace

import pytest
import torch
from detectron2.engine import HookBase
from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng
from engine_support import losses, register_tiny_shapes, tiny_cfg, weights
from torch import nn

from asag.engine import NonFiniteLossError, Trainer, build_optimizer
from asag.engine.optimizer import build_clipper, gradient_norm, parameter_groups
from asag.engine.step import LossLog, TrainStep, amp_dtype, split_batch


def tiny_batch(cfg, size: int = 4):
    register_tiny_shapes()
    return next(iter(Trainer.build_train_loader(cfg, seed=0)))[:size]


# Optimizer


def test_one_group_per_learning_rate(tmp_path):
    cfg = tiny_cfg(tmp_path, SOLVER__BACKBONE_MULTIPLIER=0.1, SOLVER__WEIGHT_DECAY=0.03)
    model = build_model(cfg)
    frozen = next(model.backbone.parameters())
    frozen.requires_grad = False
    optimizer = build_optimizer(cfg, model)
    assert sorted(g["lr"] for g in optimizer.param_groups) == pytest.approx([5e-5, 5e-4])
    assert {g["weight_decay"] for g in optimizer.param_groups} == {0.03}
    by_lr = {round(g["lr"], 6): {id(p) for p in g["params"]} for g in optimizer.param_groups}
    for name, parameter in model.named_parameters():
        own = name.startswith("backbone.") and not name.startswith("backbone.fpn_")
        expected = 5e-5 if own else 5e-4
        assert (id(parameter) in by_lr[expected]) == (parameter is not frozen), name


def test_equal_rates_share_a_group(tmp_path):
    model = build_model(tiny_cfg(tmp_path))
    (group,) = build_optimizer(tiny_cfg(tmp_path), model).param_groups
    assert len(group["params"]) == len(list(model.parameters()))


def test_shared_parameters_are_updated_once():
    layer = nn.Linear(2, 2)
    named = [("a.weight", layer.weight), ("b.weight", layer.weight)]
    (group,) = parameter_groups(named, base_lr=1.0, weight_decay=0.0)
    assert len(group["params"]) == 1


def test_optimizer_choices(tmp_path):
    model = nn.Linear(2, 2)
    assert build_optimizer(tiny_cfg(tmp_path), model).defaults["fused"]
    sgd = build_optimizer(tiny_cfg(tmp_path, SOLVER__OPTIMIZER="SGD"), model)
    assert sgd.param_groups[0]["momentum"] == 0.9
    with pytest.raises(ValueError, match=r"OPTIMIZER is 'LION'; it must be one of: 'ADAMW'"):
        build_optimizer(tiny_cfg(tmp_path, SOLVER__OPTIMIZER="LION"), model)
    with pytest.raises(ValueError, match="no trainable parameter"):
        build_optimizer(tiny_cfg(tmp_path), model.requires_grad_(False))


# Clipping


def clipping_cfg(folder, **changes):
    return tiny_cfg(
        folder, **{f"SOLVER__CLIP_GRADIENTS__{key}": value for key, value in changes.items()}
    )


def gradients(*values: list[float]) -> list[nn.Parameter]:
    parameters = [nn.Parameter(torch.zeros(len(v))) for v in values]
    for parameter, value in zip(parameters, values, strict=True):
        parameter.grad = torch.tensor(value)
    return parameters


@pytest.mark.parametrize(
    ("full_model", "kind", "expected"),
    [
        (True, "norm", [[3 / 13, 4 / 13], [12 / 13]]),
        (False, "norm", [[0.6, 0.8], [1.0]]),
        (False, "value", [[1.0, 1.0], [1.0]]),
    ],
)
def test_clipping(tmp_path, full_model, kind, expected):
    clip = build_clipper(clipping_cfg(tmp_path, CLIP_TYPE=kind, FULL_MODEL=full_model))
    parameters = gradients([3.0, 4.0], [12.0])
    assert clip(parameters).item() == pytest.approx(13.0), "the norm before clipping"
    for parameter, grad in zip(parameters, expected, strict=True):
        assert parameter.grad.tolist() == pytest.approx(grad, abs=1e-5)


def test_norm_without_clipping():
    parameters = [*gradients([3.0, 4.0], [12.0]), nn.Parameter(torch.ones(2))]
    before = [p.grad.clone() for p in parameters[:2]]
    assert gradient_norm(parameters).item() == pytest.approx(13.0)
    assert gradient_norm(parameters, float("inf")).item() == 12.0
    assert gradient_norm(parameters[2:]).item() == 0.0
    assert all(torch.equal(p.grad, g) for p, g in zip(parameters, before, strict=False))
    model = Line()
    step = TrainStep(model, torch.optim.SGD(model.parameters(), lr=1.0))
    assert step([{"slope": 4.0}])["grad_norm"].item() == 4.0
    assert model.weight.item() == -4.0, "not clipped"


def test_clipping_errors(tmp_path):
    assert build_clipper(clipping_cfg(tmp_path, ENABLED=False)) is None
    with pytest.raises(ValueError, match="CLIP_TYPE is 'global'; it must be one of: 'norm'"):
        build_clipper(clipping_cfg(tmp_path, CLIP_TYPE="global"))
    with pytest.raises(ValueError, match=r"write CLIP_TYPE 'norm' and FULL_MODEL True"):
        build_clipper(clipping_cfg(tmp_path, CLIP_TYPE="full_model"))
    with pytest.raises(ValueError, match=r"FULL_MODEL is True, but CLIP_TYPE 'value'"):
        build_clipper(clipping_cfg(tmp_path, CLIP_TYPE="value"))
    with pytest.raises(ValueError, match=r"CLIP_VALUE is 0\.0; it must be positive"):
        build_clipper(clipping_cfg(tmp_path, CLIP_VALUE=0))


@pytest.mark.parametrize("kind", ["ADAMW", "SGD"])
def test_the_optimizer_clips_by_itself_in_any_loop(tmp_path, kind):
    register = {"SOLVER__OPTIMIZER": kind, "SOLVER__CLIP_GRADIENTS__CLIP_VALUE": 0.5}
    cfg = tiny_cfg(tmp_path, **register)
    model = nn.Linear(3, 2)
    model.weight.grad, model.bias.grad = torch.full((2, 3), 4.0), torch.full((2,), 3.0)
    alone = build_optimizer(cfg, model, clip_in_step=False)
    alone.step()
    assert model.bias.grad.tolist() == [3.0, 3.0]
    build_optimizer(cfg, model).step()
    assert gradient_norm(list(model.parameters())).item() == pytest.approx(0.5, abs=1e-5)
    assert model.weight.grad[0, 0] / model.bias.grad[0] == pytest.approx(4 / 3)


@pytest.mark.skipif(not hasattr(torch.amp, "GradScaler"), reason="needs a scaler for the CPU")
def test_a_loss_scaler_unscales_before_the_optimizer_clips(tmp_path):
    model = Line()
    optimizer = build_optimizer(tiny_cfg(tmp_path), model)  # AdamW; norm at most 1
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(model([{"slope": 0.5}])["loss_line"]).backward()
    scaler.step(optimizer)
    assert model.weight.grad.item() == 0.5


# Accumulation


def one_step(model: nn.Module, batch, parts: int) -> tuple[dict, torch.Tensor]:
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)  # an update shows the gradient itself
    logged = TrainStep(model, optimizer, accumulate_steps=parts)(batch)
    return {k: v.item() for k, v in logged.items()}, weights(model)


@pytest.mark.parametrize("drop", [(), (1,), (0, 1, 2, 3)], ids=["full", "uneven", "no objects"])
def test_accumulated_gradient_is_that_of_the_whole_batch(tmp_path, drop):
    cfg = tiny_cfg(tmp_path)
    seed_all_rng(3)
    model = build_model(cfg).train()
    batch = tiny_batch(cfg)
    for i in drop:
        batch[i]["instances"] = batch[i]["instances"][:0]
    whole, whole_weights = one_step(model, batch, 1)
    for parts in (2, 4):
        cut, cut_weights = one_step(model, batch, parts)
        assert cut == pytest.approx(whole, rel=1e-4)
        change = (whole_weights - weights(model)).abs().max()
        assert (cut_weights - whole_weights).abs().max() < 1e-3 * change


def test_batch_that_cannot_be_cut(tmp_path):
    with pytest.raises(ValueError, match=r"SOLVER\.ACCUMULATE_STEPS is 3"):
        split_batch([{}] * 4, 3)
    register_tiny_shapes()
    with pytest.raises(ValueError, match=r"SOLVER\.IMS_PER_BATCH is 4; .* multiple of 3"):
        Trainer(tiny_cfg(tmp_path, SOLVER__ACCUMULATE_STEPS=3))


# Mixed precision


def test_bfloat16_trains_and_keeps_boxes_and_losses_in_float32(tmp_path):
    register_tiny_shapes()
    cfg = tiny_cfg(tmp_path, SOLVER__AMP__ENABLED=True, SOLVER__AMP__DTYPE="bfloat16")
    seed_all_rng(1)
    trainer = Trainer(cfg)
    before = weights(trainer.model).clone()
    trainer.train()
    assert all(map(math.isfinite, losses(trainer)))
    assert weights(trainer.model).dtype == torch.float32
    assert not torch.equal(before, weights(trainer.model))

    heads, linear, predictions = trainer.model.roi_heads, [], []
    layer = next(m for m in heads.modules() if isinstance(m, nn.Linear))
    layer.register_forward_hook(lambda module, args, output: linear.append(output.dtype))
    heads.register_forward_hook(lambda module, args, output: predictions.append(output))
    with torch.autocast("cpu", torch.bfloat16):
        found = trainer.model(tiny_batch(cfg))
    assert torch.bfloat16 in linear, "autocast reached the layers"
    assert {p.boxes_xyxy.dtype for p in predictions} == {torch.float32}
    assert {v.dtype for v in found.values()} == {torch.float32}


class Line(nn.Module):
    """One weight; its loss is the input times it, so the gradient is the input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, batch):
        return {"loss_line": (self.weight * batch[0]["slope"]).sum()}


@pytest.mark.skipif(not hasattr(torch.amp, "GradScaler"), reason="needs a scaler for the CPU")
def test_gradients_are_unscaled_before_they_are_clipped(tmp_path):
    clip = build_clipper(tiny_cfg(tmp_path))  # norm at most 1
    model = Line()
    step = TrainStep(model, torch.optim.SGD(model.parameters(), lr=1.0), clip=clip)
    step.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    logged = step([{"slope": 0.5}])
    assert (model.weight.item(), logged["grad_norm"].item()) == (-0.5, 0.5)
    logged = step([{"slope": 4.0}])
    assert model.weight.item() == pytest.approx(-1.5, abs=1e-5)
    assert logged["grad_norm"].item() == 4.0

    before, scale = model.weight.item(), step.grad_scaler.get_scale()
    logged = step([{"slope": 1e37}])  # overflows once scaled: skipped, and scaled less from now on
    assert model.weight.item() == before
    assert step.grad_scaler.get_scale() == scale / 2


def test_float16_needs_cuda(tmp_path):
    register_tiny_shapes()
    with pytest.raises(ValueError, match=r"SOLVER\.AMP\.DTYPE is 'float16'.*use 'bfloat16'"):
        Trainer(tiny_cfg(tmp_path, SOLVER__AMP__ENABLED=True))
    with pytest.raises(ValueError, match=r"SOLVER\.AMP\.DTYPE is 'fp8'"):
        amp_dtype(tiny_cfg(tmp_path, SOLVER__AMP__DTYPE="fp8"))


# Memory format and compilation


def same_losses(tmp_path, **changes) -> None:
    # A stage is compiled like any other: one is enough.
    small = {"MODEL__DECODER__NUM_STAGES": 1}
    cfg = tiny_cfg(tmp_path, **small)
    plain = build_model(cfg).train()
    other = build_model(tiny_cfg(tmp_path, **small, **changes)).train()
    other.load_state_dict(plain.state_dict())
    batch = tiny_batch(cfg, 2)
    expected, found = plain(batch), other(batch)
    assert {k: v.item() for k, v in found.items()} == pytest.approx(
        {k: v.item() for k, v in expected.items()}, rel=1e-3
    )
    sum(expected.values()).backward()
    sum(found.values()).backward()
    for (name, a), b in zip(plain.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-2, atol=1e-3, msg=name)


def test_channels_last_gives_the_same_numbers(tmp_path):
    same_losses(tmp_path, MODEL__CHANNELS_LAST=True)


def compiled_frames() -> int:
    from torch._dynamo.utils import counters

    return counters["frames"]["ok"]


def test_captured_graphs_give_the_same_numbers(tmp_path, monkeypatch):
    """Graph capture and its autograd, without the minutes that generating code for a CPU takes."""
    compile_module = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda m: compile_module(m, backend="aot_eager"))
    before = compiled_frames()
    same_losses(tmp_path, MODEL__COMPILE=True)
    assert compiled_frames() > before, "nothing was compiled"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_model_gives_the_same_numbers(tmp_path, request):
    if "slow" not in request.config.getoption("-m"):
        pytest.skip("takes minutes; run with -m slow")
    before = compiled_frames()
    same_losses(tmp_path, MODEL__COMPILE=True)
    assert compiled_frames() > before, "nothing was compiled"


# Log


class Infect(HookBase):
    """Spoils the predictions of one iteration."""

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def before_step(self) -> None:
        if self.trainer.iter == self.iteration:
            self.trainer.model.roi_heads.register_forward_hook(
                lambda module, args, output: replace(output, logits=output.logits * math.nan)
            )


def test_divergence_stops_with_iteration_rate_and_images(tmp_path):
    register_tiny_shapes()
    trainer = Trainer(tiny_cfg(tmp_path, SOLVER__CHECKPOINT_PERIOD=1))
    trainer.register_hooks([Infect(2)])
    with pytest.raises(NonFiniteLossError) as caught:
        trainer.train()
    message = str(caught.value)
    assert "iteration 2" in message and "Learning rate 0.0005" in message
    assert "SOLVER.BASE_LR" in message
    assert message.count(".png") == 4
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000001.pth"


def test_log_copies_once_for_many_steps(monkeypatch):
    log = LossLog()
    for step in range(20):
        scalars = {"loss_ce": torch.tensor(float(step)), "positives": torch.tensor(float("nan"))}
        log.add(step, scalars)
    copies = []
    original = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: copies.append(1) or original(x))
    for name in ("item", "tolist", "numpy", "__float__"):
        monkeypatch.setattr(torch.Tensor, name, _only_on_result(copies, name), raising=True)
    records = log.collect()
    assert len(copies) == 1
    assert [(step, scalars["loss_ce"]) for step, scalars in records] == [(i, i) for i in range(20)]
    assert math.isnan(records[0][1]["positives"])
    assert log.collect() == []


def _only_on_result(copies: list, name: str):
    original = getattr(torch.Tensor, name)

    def method(self, *args):
        assert copies, f"{name}() of a tensor that was not copied to the host before"
        return original(self, *args)

    return method


def test_matcher_metrics_reach_the_log(tmp_path):
    register_tiny_shapes()
    trainer = Trainer(tiny_cfg(tmp_path, SOLVER__MAX_ITER=2))
    trainer.model.matcher.metrics = {"matcher/units": torch.tensor(3.5)}
    trainer.train()
    assert trainer.storage.history("matcher/units").latest() == 3.5
    assert trainer.storage.history("grad_norm").latest() > 0
    assert len(losses(trainer)) == 2
