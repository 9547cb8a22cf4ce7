"""The benchmark: phases, interleaving, host waits and memory."""

import json
from pathlib import Path
from types import SimpleNamespace

import benchmark
import pytest
import torch
from torch import nn

from asag.diagnostics import profiling
from asag.diagnostics.profiling import PhaseTimer, host_waits, resident_bytes, saved_bytes

ROOT = Path(__file__).resolve().parents[2]

TINY = str(ROOT / "configs/SparseRCNN/sparse_rcnn_tiny.yaml")
SMALL = ("--size", "64x64", "--batch", "1", "--iterations", "3", "--warmup", "1", "--device", "cpu")


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only where a test lets it."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(profiling, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


class Sleeper(nn.Module):
    """Takes its time (milliseconds), before and after what it calls."""

    def __init__(self, clock, milliseconds, inner=None):
        super().__init__()
        self.clock, self.milliseconds, self.inner = clock, milliseconds, inner
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x):
        self.clock.now += self.milliseconds / 2000
        x = x if self.inner is None else self.inner(x)
        self.clock.now += self.milliseconds / 2000
        return self.weight * x


class Pipeline(nn.Module):
    """Components in an order of its own, with a matcher called from within the heads."""

    def __init__(self, clock):
        super().__init__()
        self.backbone = Sleeper(clock, 20)
        self.matcher = Sleeper(clock, 30)
        self.roi_heads = Sleeper(clock, 10, inner=self.matcher)
        self.unknown = Sleeper(clock, 25)

    def forward(self, x):
        return self.unknown(self.roi_heads(self.backbone(x)))


def test_phases_exclude_the_rooms_within_and_sum_to_the_total(clock):
    with PhaseTimer(Pipeline(clock).eval()) as timer:
        spent = timer.measure(lambda: timer.model(torch.ones(())))
    expected = {"other": 25, "backbone": 20, "roi_heads": 10, "matcher": 30, "total": 85}
    assert spent == pytest.approx(expected)


def test_training_step_has_backward_and_optimizer(clock):
    model = Pipeline(clock).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    timer = PhaseTimer(model, optimizer)

    def wait(milliseconds):
        clock.now += milliseconds / 1000

    clip = timer.as_optimizer(lambda parameters: wait(7))

    def step(clipped):
        loss = model(torch.ones(()))
        wait(40)
        loss.backward()
        if clipped:
            clip(None)
        optimizer.step(lambda: wait(5))

    components = {"other": 25, "backbone": 20, "roi_heads": 10, "matcher": 30, "backward": 40}
    with timer:
        for clipped, update in ((True, 12), (False, 5)):
            spent = timer.measure(lambda clipped=clipped: step(clipped))
            assert spent == pytest.approx(components | {"optimizer": update, "total": 125 + update})
    assert timer.as_optimizer(None) is None


def test_timer_leaves_no_hooks(clock):
    model = Pipeline(clock)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with PhaseTimer(model, optimizer):
        assert model.backbone._forward_hooks
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize(
    "operation, expected",
    [
        (lambda x: x.cpu(), {"cpu": 1}),
        (lambda x: float(x.sum()), {"_local_scalar_dense": 1}),
        (lambda x: x.sum().item() + len(x.tolist()), {"_local_scalar_dense": 1, "tolist": 1}),
        (lambda x: bool((x > 0).any()), {"_local_scalar_dense": 1}),
        (lambda x: x[x > 0], {"index by mask": 1}),
        (lambda x: (x > 0).nonzero(), {"nonzero": 1}),
        (lambda x: x.masked_select(x > 0), {"masked_select": 1}),
        (lambda x: x.new_tensor([1.0]), {"new_tensor": 1}),
        (lambda x: torch.tensor([1.0], device=x.device), {"tensor": 1}),
        (lambda x: torch.tensor([1.0]).to(x.device, non_blocking=True), {}),
        (lambda x: torch.as_tensor(x, device=x.device), {}),
        (lambda x: x.to("meta"), {"to": 1}),
        (lambda x: x.to("meta", non_blocking=True), {}),
        (lambda x: x.double().to(torch.float32), {}),
        (lambda x: torch.where(x > 0, x, 0.0)[:, None].masked_fill(x > 0, 1), {}),
    ],
)
def test_host_waits_counts_what_waits_and_nothing_else(operation, expected):
    x = torch.tensor([1.0, 2.0])
    assert host_waits(lambda: operation(x)) == expected


def test_host_waits_sees_the_backward_pass():
    class Waits(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * float(grad.sum())

    x = torch.ones(2, requires_grad=True)
    assert host_waits(lambda: Waits.apply(x).sum().backward()) == {"_local_scalar_dense": 1}


def test_memory_counts_shared_storage_once():
    linear = nn.Linear(4, 3, bias=False)
    x = torch.ones(5, 4)

    def step():
        (linear(x).exp() + linear(x.view(5, 4)).exp()).sum().backward()

    # x once although two products keep it, both results of exp, the weight not at all.
    assert saved_bytes(linear, step) == 4 * (5 * 4 + 2 * 5 * 3)
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.1, momentum=0.9)
    optimizer.step()
    assert resident_bytes(linear, optimizer) == 4 * 12 * 3


def test_percentile_is_a_measured_value():
    assert benchmark.percentile_95(list(range(1, 101))) == 95
    assert benchmark.percentile_95([3.0, 1.0, 2.0]) == 3.0
    assert benchmark.percentile_95([7.0]) == 7.0


def test_arms_take_turns(monkeypatch):
    calls = []

    class Recorder:
        def __init__(self, name):
            self.name = name

        def run(self, mode):
            calls.append((mode, self.name, "warm"))

        def measure(self, mode):
            calls.append((mode, self.name, "timed"))

        def report(self, modes):
            return {}

    benchmark.measure_arms([Recorder("A"), Recorder("B")], ["inference"], 1, 2)
    turns = [("A", "warm"), ("B", "warm"), *2 * [("A", "timed"), ("B", "timed")]]
    assert [(name, kind) for _, name, kind in calls] == turns


def test_whole_run(capsys, tmp_path):
    target = tmp_path / "figures.json"
    deeper = f"{TINY}@MODEL.DECODER.NUM_STAGES=6"
    code = benchmark.main([TINY, deeper, *SMALL, "--json", str(target)])
    out = capsys.readouterr().out
    assert code == 0
    figures = json.loads(target.read_text())
    first, second = figures["arms"]
    assert second["parameters"] > first["parameters"]
    assert second["saved_bytes"] > first["saved_bytes"] > 0
    assert second["resident_bytes"] > first["resident_bytes"] > 4 * first["parameters"]
    assert set(first["training"]["median_ms"]) == {
        "other", "backbone", "proposal_generator", "roi_heads", "matcher", "criterion",
        "backward", "optimizer", "total",
    }  # fmt: skip
    for arm in figures["arms"]:
        for mode in benchmark.MODES:
            median, p95 = arm[mode]["median_ms"], arm[mode]["p95_ms"]
            assert all(0 <= median[phase] <= p95[phase] for phase in median)
    assert figures["settings"]["size"] == "64x64"
    assert "A: " in out and "B: " in out and "x)" in out


def test_one_arm_with_folded_norms(capsys, tmp_path):
    target = tmp_path / "figures.json"
    arms = [f"{TINY}@fold-norms", TINY, "--mode", "inference"]
    assert benchmark.main([*arms, *SMALL, "--json", str(target)]) == 0
    folded, plain = json.loads(target.read_text())["arms"]
    assert folded["parameters"] != plain["parameters"]
    assert benchmark.main([f"{TINY}@fold-norms", *SMALL]) == 2
    assert "--mode inference" in capsys.readouterr().err


def test_same_seed_gives_equal_models_and_batches():
    args = benchmark.parse([TINY, *SMALL, "--objects", "3"])
    one, two = benchmark.Arm(TINY, args), benchmark.Arm(TINY, args)
    pairs = zip(one.model.parameters(), two.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert torch.equal(one.batch[0]["image"], two.batch[0]["image"])
    boxes = one.batch[0]["instances"].gt_boxes
    assert len(boxes) == 3 and boxes.nonempty().all()
    assert boxes.tensor.min() >= 0 and boxes.tensor.max() <= 64


@pytest.mark.parametrize(
    "arguments, issue",
    [
        (["nowhere.yaml", *SMALL], "nowhere.yaml: no such file"),
        ([f"{TINY}@MODEL.DECODER.NUM_HEADS=5", *SMALL], "MODEL.DECODER.NUM_HEADS"),
        ([f"{TINY}@MODEL.DECODER.NUM_HEADS", *SMALL], "pairs KEY VALUE"),
        ([TINY, *SMALL[:-1], "cuda"], "--device cpu"),
    ],
)
def test_mistakes_end_with_a_sentence(capsys, monkeypatch, arguments, issue):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert benchmark.main(arguments) == 2
    err = capsys.readouterr().err
    assert issue in err and len(err.splitlines()) == 1
