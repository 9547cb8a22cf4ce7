"""Recipes in epochs become iterations, for any batch and data set."""

from __future__ import annotations

import math

import pytest
import torch
from detectron2.solver import build_lr_scheduler
from engine_support import tiny_cfg
from hypothesis import given, settings
from hypothesis import strategies as st

from asag import load_config
from asag.config import find_config
from asag.engine.schedule import resolve_schedule


def cfg_with(**solver):
    return tiny_cfg("unused", **{f"SOLVER__{key}": value for key, value in solver.items()})


def test_published_recipe_on_coco():
    cfg = load_config(str(find_config("SparseRCNN/sparse_rcnn_r50_100pro_3x.yaml")))
    resolved, schedule = resolve_schedule(cfg, 118287)
    assert (schedule.iterations, schedule.steps) == (270000, (210000, 250000))
    assert resolved.SOLVER.MAX_ITER == 270000 and resolved.SOLVER.STEPS == (210000, 250000)
    assert (schedule.base_lr, schedule.warmup_iters) == (2.5e-5, 1000)
    assert not schedule.notes and not schedule.warnings
    assert "118287 images, batch 16, 270000 iterations" in schedule.summary()
    assert cfg.SOLVER.EPOCHS > 0, "the argument is not changed"


solver_settings = st.fixed_dictionaries(
    {
        "images": st.integers(1, 200_000),
        "batch": st.integers(1, 128),
        "epochs": st.floats(0.01, 40),
        "shares": st.lists(st.floats(0.01, 1), max_size=3, unique=True).map(sorted),
        "scale": st.sampled_from(["none", "linear", "sqrt"]),
        "warmup": st.integers(0, 2000),
    }
)


@settings(max_examples=60, deadline=None)
@given(solver_settings)
def test_resolved_schedule(values):
    cfg = tiny_cfg("unused")
    solver = cfg.SOLVER
    solver.IMS_PER_BATCH, solver.REFERENCE_BATCH = values["batch"], 16
    solver.EPOCHS = values["epochs"]
    solver.EPOCH_STEPS = tuple(share * values["epochs"] for share in values["shares"])
    solver.SCALE_LR, solver.WARMUP_ITERS = values["scale"], values["warmup"]
    resolved, schedule = resolve_schedule(cfg, values["images"])

    # As many images as the recipe asks for, to within a batch (and at least one step).
    wanted = values["epochs"] * values["images"]
    assert schedule.iterations >= 1
    assert abs(schedule.iterations * values["batch"] - wanted) <= values["batch"]
    assert all(0 < step < schedule.iterations for step in schedule.steps)
    assert list(schedule.steps) == sorted(set(schedule.steps))
    assert 0 <= schedule.warmup_iters <= schedule.iterations / 4
    ratio = values["batch"] / 16
    factor = {"none": 1, "linear": ratio, "sqrt": math.sqrt(ratio)}[values["scale"]]
    assert schedule.base_lr == pytest.approx(solver.BASE_LR * factor)

    # Resolving again changes nothing.
    again, schedule_again = resolve_schedule(resolved, values["images"])
    assert again == resolved
    assert (schedule_again.iterations, schedule_again.steps) == (
        schedule.iterations,
        schedule.steps,
    )
    assert schedule_again.base_lr == schedule.base_lr

    # Detectron2 builds a scheduler of it.
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=schedule.base_lr)
    build_lr_scheduler(resolved, optimizer)


def test_learning_rate_curve():
    cfg = cfg_with(MAX_ITER=40, STEPS="(20, 30)", WARMUP_ITERS=10, WARMUP_FACTOR=0.01)
    cfg, _ = resolve_schedule(cfg, 12)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=cfg.SOLVER.BASE_LR)
    scheduler = build_lr_scheduler(cfg, optimizer)
    rates = []
    for _ in range(40):
        rates.append(optimizer.param_groups[0]["lr"] / cfg.SOLVER.BASE_LR)
        optimizer.step()
        scheduler.step()
    assert rates[0] == pytest.approx(0.01)
    assert rates[5] == pytest.approx(0.01 + 0.99 * 5 / 10)
    assert rates[10:20] == pytest.approx([1.0] * 10)
    assert rates[20:30] == pytest.approx([0.1] * 10)
    assert rates[30:] == pytest.approx([0.01] * 10)


def test_short_training_shortens_the_warm_up():
    _, schedule = resolve_schedule(cfg_with(MAX_ITER=40, WARMUP_ITERS=100), 12)
    assert schedule.warmup_iters == 10
    assert "warm-up shortened from 100 to 10" in schedule.summary()


def test_a_rate_for_another_batch_is_told():
    cfg = cfg_with(BASE_LR=1e-4, REFERENCE_BATCH=16, IMS_PER_BATCH=4)
    resolved, schedule = resolve_schedule(cfg, 100)
    assert "is meant for batch 16 (SOLVER.REFERENCE_BATCH), the batch is 4" in schedule.summary()
    assert "is meant for" not in resolve_schedule(resolved, 100)[1].summary()
    cfg.SOLVER.SCALE_LR = "sqrt"
    assert "is meant for" not in resolve_schedule(cfg, 100)[1].summary()
    cfg.SOLVER.REFERENCE_BATCH = 4
    assert "is meant for" not in resolve_schedule(cfg, 100)[1].summary()


def test_warns_of_a_learning_rate_of_another_world():
    recipe = cfg_with(BASE_LR=2.5e-5, REFERENCE_BATCH=16)
    cfg = cfg_with(BASE_LR=0.02, REFERENCE_BATCH=16, IMS_PER_BATCH=16)
    _, schedule = resolve_schedule(cfg, 100, recipe=recipe)
    assert "800 times the recipe's per image" in schedule.summary()
    _, schedule = resolve_schedule(
        cfg_with(BASE_LR=2.5e-5, REFERENCE_BATCH=16, IMS_PER_BATCH=1), 100, recipe=recipe
    )
    assert "16 times" in schedule.summary()
    scaled = cfg_with(BASE_LR=2.5e-5, REFERENCE_BATCH=16, IMS_PER_BATCH=1, SCALE_LR="linear")
    assert not resolve_schedule(scaled, 100, recipe=recipe)[1].warnings


@pytest.mark.parametrize(
    ("key", "value", "extra"),
    [
        ("IMS_PER_BATCH", 0, {}),
        ("REFERENCE_BATCH", 0, {}),
        ("ACCUMULATE_STEPS", 0, {}),
        ("BASE_LR", 0.0, {}),
        ("BASE_LR", "nan", {}),
        ("EPOCHS", -1.0, {}),
        ("WARMUP_ITERS", -5, {}),
        ("MAX_ITER", 0, {}),
        ("STEPS", "(30, 20)", {}),
        ("EPOCH_STEPS", "(3, 2)", {"EPOCHS": 4}),
        ("EPOCH_STEPS", "(3, 5)", {"EPOCHS": 4}),
        ("SCALE_LR", "cubic", {}),
    ],
)
def test_errors_name_the_key(key, value, extra):
    cfg = cfg_with(**extra)
    cfg.SOLVER[key] = {"nan": math.nan, "(30, 20)": (30, 20), "(3, 2)": (3, 2)}.get(value, value)
    if value == "(3, 5)":
        cfg.SOLVER[key] = (3, 5)
    with pytest.raises(ValueError, match=rf"SOLVER\.{key} is"):
        resolve_schedule(cfg, 10)


def test_no_images():
    with pytest.raises(ValueError, match=r"DATASETS\.TRAIN .* no images"):
        resolve_schedule(tiny_cfg("unused"), 0)
