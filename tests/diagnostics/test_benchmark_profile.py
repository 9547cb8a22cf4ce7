"""The profile of real training steps: phases, hints, command line."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import benchmark
import pytest
import torch
from engine_support import CONFIG, register_tiny_shapes, tiny_cfg, tiny_options

from asag.diagnostics import step_profile
from asag.diagnostics.profiling import PhaseTimer, device_busy_ms
from asag.diagnostics.step_profile import StepProfile, hints, profile_steps, render
from asag.engine import trainer
from asag.modeling.matching import HungarianMatcher

PHASES = {
    "data", "other", "backbone", "proposal_generator", "roi_heads", "matcher", "criterion",
    "backward", "optimizer",
}  # fmt: skip
NAP = 0.3  # seconds; much longer than all the rest of a tiny step


def slow(function, seconds=NAP):
    def slowed(*args, **kwargs):
        time.sleep(seconds)
        return function(*args, **kwargs)

    return slowed


def run(tmp_path, **changes):
    register_tiny_shapes()
    cfg = tiny_cfg(tmp_path, **changes)
    return profile_steps(cfg, steps=2, warmup=1), cfg


def test_a_slow_mapper_is_bound_by_the_loader(monkeypatch, tmp_path):
    mapper = trainer.SparseDetectionMapper
    monkeypatch.setattr(mapper, "__call__", slow(mapper.__call__, NAP / 4))  # four images
    profile, cfg = run(tmp_path)
    assert profile.share("data") > 0.5 and profile.batch_ms > 1000 * NAP
    assert profile.phase_ms["data"] == pytest.approx(profile.batch_ms, rel=0.5)
    (hint,) = hints(profile, cfg)
    assert hint.startswith("bound by the loader")


def test_a_loader_with_processes_is_watched_after_what_it_has_in_store(monkeypatch, tmp_path):
    mapper = trainer.SparseDetectionMapper
    monkeypatch.setattr(mapper, "__call__", slow(mapper.__call__, NAP / 4))
    profile, cfg = run(tmp_path, DATALOADER__NUM_WORKERS=1)
    assert profile.phase_ms["data"] > 1000 * NAP / 4
    assert hints(profile, cfg)[0].startswith("bound by the loader")


def test_a_slow_matcher_is_bound_by_matching(monkeypatch, tmp_path):
    monkeypatch.setattr(HungarianMatcher, "forward", slow(HungarianMatcher.forward))
    profile, cfg = run(tmp_path)
    assert set(profile.phase_ms) == PHASES
    assert profile.phase_ms["matcher"] >= 1000 * NAP
    assert sum(map(profile.share, PHASES)) == pytest.approx(1.0)
    (hint,) = hints(profile, cfg)
    assert hint.startswith("bound by matching") and "NUM_QUERIES" in hint


def test_nothing_is_said_where_nothing_is_out_of_proportion(monkeypatch, tmp_path):
    heads = sys.modules["asag.modeling.roi_heads"].DynamicConvHeads
    monkeypatch.setattr(heads, "forward", slow(heads.forward, 2 * NAP))
    profile, cfg = run(tmp_path)
    assert profile.phase_ms["roi_heads"] > 1000 * NAP and profile.images == 4
    assert profile.images_per_second == pytest.approx(4000 / profile.total_ms)
    assert hints(profile, cfg) == []
    assert render(profile, cfg).splitlines()[-1] == "no hints"


def test_profiling_writes_nothing_and_keeps_the_configuration(tmp_path):
    _, cfg = run(tmp_path / "out", DATASETS__TEST="('engine_shapes_val',)")
    assert not (tmp_path / "out").exists() and cfg.DATASETS.TEST == ("engine_shapes_val",)


def test_accumulated_parts_count_their_own_phases(tmp_path):
    profile, _ = run(tmp_path, SOLVER__ACCUMULATE_STEPS=2)
    assert set(profile.phase_ms) == PHASES and profile.images == 4


def test_a_forward_pass_after_a_backward_pass_is_none():
    model = torch.nn.Linear(1, 1)
    with PhaseTimer(model) as timer:
        timer.measure(lambda: [model(torch.ones(1)).sum().backward() for _ in range(2)])
    begins, backwards = "other", "backward"
    assert [phase for _, phase in timer.marks] == [
        begins, begins, backwards, begins, backwards, backwards,
    ]  # fmt: skip


HEALTHY = StepProfile(
    phase_ms={"data": 5, "backbone": 50, "matcher": 5, "backward": 35, "optimizer": 5},
    images=4, host_waits={"cpu": 2}, batch_ms=150.0, idle_share=None, cores=4,
)  # fmt: skip


def with_phase(**phase_ms):
    return replace(HEALTHY, phase_ms=HEALTHY.phase_ms | phase_ms)


SINKHORN = {
    "MODEL__MATCHER__NAME": "OptimalTransportMatcher",
    "MODEL__MATCHER__OT__SOLVER": "sinkhorn",
}


@pytest.mark.parametrize(
    "profile, changes, expected",
    [
        (HEALTHY, {}, None),
        (with_phase(data=30), {}, "set DATALOADER.NUM_WORKERS to about 2 (now 0)"),
        (with_phase(data=30), {"DATALOADER__NUM_WORKERS": 3}, "3 would be enough with a core"),
        (replace(with_phase(data=900), batch_ms=950), {}, "10 processes are needed, but there"),
        (HEALTHY, {"DATALOADER__NUM_WORKERS": 9}, "NUM_WORKERS 9 on 4 core(s); about 2 are enough"),
        (with_phase(matcher=20), {}, "NUM_QUERIES, now 6) or stages"),
        (with_phase(matcher=20), SINKHORN, "MODEL.MATCHER.OT.SOLVER exact"),
        (
            with_phase(matcher=20),
            SINKHORN | {"MODEL__MATCHER__OT__SOLVER": "exact", "MODEL__DEVICE": "cuda"},
            "MODEL.MATCHER.OT.SOLVER sinkhorn",
        ),
        (with_phase(matcher=20), SINKHORN | {"MODEL__DEVICE": "cuda"}, "OT.ITERS (now 60)"),
        (with_phase(optimizer=40), {}, "SOLVER.IMS_PER_BATCH (now 4)"),
        (replace(HEALTHY, host_waits={"nonzero": 30, "cpu": 2}), {}, "32 times a step (nonzero 30"),
        (replace(HEALTHY, idle_share=0.6), {}, "idle for 60% of the forward pass"),
        (replace(HEALTHY, idle_share=0.6), {"MODEL__COMPILE": True}, "launched: more images"),
        (replace(HEALTHY, idle_share=0.1), {}, None),
    ],
)  # fmt: skip
def test_hints_name_existing_keys_and_present_values(tmp_path, profile, changes, expected):
    found = hints(profile, tiny_cfg(tmp_path, **changes))
    if expected is None:
        assert found == []
    else:
        assert len(found) == 1 and expected in found[0]


def test_asag_learns_how_to_wait_less(tmp_path):
    name = {"MODEL__PROPOSAL_GENERATOR__NAME": "AdaptiveSparseAnchors"}
    profile = replace(HEALTHY, host_waits={"nonzero": 30})
    (hint,) = hints(profile, tiny_cfg(tmp_path, **name))
    assert "MODEL.ASAG.PATCH_CAPACITY" in hint
    fixed = {"MODEL__ASAG__PATCH_CAPACITY": 15, "MODEL__ASAG__ANCHOR_CAPACITY": 200}
    (hint,) = hints(profile, tiny_cfg(tmp_path, **name, **fixed))
    assert "CAPACITY" not in hint


def test_command_line(capsys, tmp_path):
    register_tiny_shapes()
    target = tmp_path / "profile.json"
    words = [str(CONFIG), "--profile", "--device", "cpu", "--iterations", "2", "--warmup", "1"]
    words += ["--json", str(target), "--opts", *tiny_options(tmp_path)]
    assert benchmark.main(words) == 0
    out = capsys.readouterr().out
    for row in ("data (waiting for it)", "backbone", "matching", "images a second", "on a CPU"):
        assert row in out
    (profile,) = json.loads(target.read_text())["profiles"]
    assert set(profile["shares"]) == PHASES
    assert sum(profile["shares"].values()) == pytest.approx(1.0)
    assert profile["images"] == 4 and profile["batch_ms"] > 0 and profile["host_waits"]["cpu"] == 1


def test_command_line_with_random_images(capsys, tmp_path):
    words = [str(CONFIG), "--profile", "--device", "cpu", "--iterations", "1", "--warmup", "1"]
    words += ["--size", "64x64", "--batch", "2", "--amp", "bfloat16"]
    assert benchmark.main([*words, "--opts", *tiny_options(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "1 training steps of 2 images (random)" in out and "bound by the loader" not in out


@pytest.mark.parametrize("words", [["--mode", "inference"], ["--fold-norms"]])
def test_a_profile_is_of_training(capsys, words):
    assert benchmark.main([str(CONFIG), "--profile", "--device", "cpu", *words]) == 2
    assert "--profile trains" in capsys.readouterr().err


@pytest.mark.parametrize("attribute", ["self_device_time_total", "self_cuda_time_total"])
def test_busy_time_is_that_of_the_device_under_either_name(monkeypatch, attribute):
    calls = []

    class Profile:
        def __init__(self, activities):
            assert activities == [torch.profiler.ProfilerActivity.CUDA]

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def key_averages(self):
            return [SimpleNamespace(**{attribute: 1500}), SimpleNamespace(**{attribute: 500})]

    monkeypatch.setattr(torch.profiler, "profile", Profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("synchronize"))
    assert device_busy_ms(lambda: calls.append("work")) == 2.0
    assert calls == ["work", "synchronize"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_idle_share_on_a_gpu(tmp_path):
    profile, _ = run(tmp_path, MODEL__DEVICE="cuda")
    assert 0 < profile.idle_share < 1  # a model this small is bound by launches


def test_thresholds_are_documented(capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--help"])
    out = " ".join(capsys.readouterr().out.replace("%%", "%").split())
    assert f"more than {step_profile.DATA_SHARE:.0%} of a step" in out
    assert f"more than {step_profile.HOST_WAITS} times" in out


def test_a_missing_data_set_is_one_sentence(capsys, tmp_path):
    options = tiny_options(tmp_path, DATASETS__TRAIN="('nowhere',)")
    words = [str(CONFIG), "--profile", "--device", "cpu", "--opts", *options]
    assert benchmark.main(words) == 2
    assert "nowhere" in capsys.readouterr().err
