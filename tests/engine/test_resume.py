"""A resumed training equals an uninterrupted one, bit for bit."""

from __future__ import annotations

import json

import pytest
import torch
from detectron2.engine import HookBase
from detectron2.utils.env import seed_all_rng
from engine_support import losses, register_tiny_shapes, tiny_cfg, weights

from asag.engine import Trainer


class Killed(Exception):
    pass


class KillAfter(HookBase):
    def __init__(self, iterations: int) -> None:
        self.iterations = iterations

    def after_step(self) -> None:
        if self.trainer.iter + 1 == self.iterations:
            raise Killed


def new_trainer(folder, **changes) -> Trainer:
    """Dropout makes the losses depend on the generators, the drop of the learning rate on the
    schedule, the interruption inside an epoch on the loader."""
    settings = {
        "MODEL__DECODER__DROPOUT": 0.2,
        "MODEL__SLIM_RESNET__NORM": "BN",
        "MODEL__SLIM_RESNET__WIDTH": 8,
        "SOLVER__MAX_ITER": 8,
        "SOLVER__STEPS": "(6,)",
        "SOLVER__CHECKPOINT_PERIOD": 2,
    }
    seed_all_rng(7)
    return Trainer(tiny_cfg(folder, **settings | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"SOLVER__OPTIMIZER": "SGD", "SOLVER__BASE_LR": 0.01, "SOLVER__ACCUMULATE_STEPS": 2},
        {"SOLVER__AMP__ENABLED": True, "SOLVER__AMP__DTYPE": "bfloat16"},
        {"DATASETS__TEST": "('engine_shapes_val',)", "TEST__EVAL_PERIOD": 2},
    ],
    ids=["adamw", "sgd-accumulating", "bfloat16", "evaluating"],
)
def test_resumed_run_equals_uninterrupted_run(tmp_path, changes):
    register_tiny_shapes()
    whole = new_trainer(tmp_path / "whole", **changes)
    whole.train()

    broken = new_trainer(tmp_path / "broken", **changes)
    broken.register_hooks([KillAfter(5)])
    with pytest.raises(Killed):
        broken.train()
    assert losses(broken) == losses(whole)[:5]

    resumed = new_trainer(tmp_path / "broken", **changes)
    torch.manual_seed(12345)  # a new process would not stand where the old one did
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == 4  # the checkpoint after four iterations
    resumed.train()

    assert losses(resumed) == losses(whole)[4:]
    assert torch.equal(weights(resumed.model), weights(whole.model))
    final = resumed.optimizer.param_groups[0]["lr"], whole.optimizer.param_groups[0]["lr"]
    assert final[0] == final[1] < whole.cfg.SOLVER.BASE_LR


def test_resume_says_where_it_goes_on_and_what_changed(tmp_path, caplog):
    register_tiny_shapes()
    first = new_trainer(tmp_path, SOLVER__MAX_ITER=2, SOLVER__STEPS="()")
    first.train()
    with caplog.at_level("INFO", logger="asag"):
        longer = new_trainer(tmp_path, SOLVER__MAX_ITER=4, SOLVER__STEPS="()")
        longer.resume_or_load(resume=True)
    assert "resumed at iteration 2 of 4" in caplog.text
    assert "SOLVER.MAX_ITER: 2 -> 4" in caplog.text
    longer.train()
    assert len(losses(longer)) == 2


def test_changed_rates_hold_from_the_first_resumed_step(tmp_path):
    register_tiny_shapes()
    new_trainer(tmp_path, SOLVER__MAX_ITER=2, SOLVER__STEPS="()").train()
    changes = {"SOLVER__BASE_LR": 0.00025, "SOLVER__WEIGHT_DECAY": 0.5}
    resumed = new_trainer(tmp_path, SOLVER__MAX_ITER=4, SOLVER__STEPS="(3,)", **changes)
    resumed.resume_or_load(resume=True)
    resumed.train()
    rates = [value for value, _ in resumed.storage.history("lr").values()]
    assert rates == pytest.approx([0.00025, 0.000025])
    assert {group["weight_decay"] for group in resumed.optimizer.param_groups} == {0.5}


def test_resume_says_that_nothing_is_left(tmp_path, caplog):
    register_tiny_shapes()
    new_trainer(tmp_path, SOLVER__MAX_ITER=2, SOLVER__STEPS="()").train()
    again = new_trainer(tmp_path, SOLVER__MAX_ITER=2, SOLVER__STEPS="()")
    again.resume_or_load(resume=True)
    with caplog.at_level("INFO", logger="asag"):
        assert again.train() is None
    assert "nothing left to train: 2 of 2 iterations" in caplog.text


def test_checkpoint_is_readable_without_pickle_and_names_the_classes(tmp_path):
    register_tiny_shapes()
    new_trainer(tmp_path, SOLVER__MAX_ITER=2, SOLVER__STEPS="()").train()
    state = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert state["class_names"] == ["circle", "square"]
    assert state["trainer"]["iteration"] == 1
    assert set(state["trainer"]) >= {"_trainer", "rng", "seed", "hooks"}
    assert set(state["trainer"]["_trainer"]) == {"iteration", "optimizer", "grad_scaler"}


def test_resume_refuses_other_classes_and_foreign_checkpoints(tmp_path):
    register_tiny_shapes()
    new_trainer(tmp_path, SOLVER__MAX_ITER=2, SOLVER__STEPS="()").train()
    other = new_trainer(tmp_path)
    other.class_names = ["dog", "cat"]
    with pytest.raises(ValueError, match="choose another OUTPUT_DIR"):
        other.resume_or_load(resume=True)

    larger = new_trainer(tmp_path, MODEL__DECODER__FFN_DIM=32)
    with pytest.raises(ValueError, match=r"model_final\.pth do not fit .* other shapes"):
        larger.resume_or_load(resume=True)

    state = torch.load(tmp_path / "model_final.pth", weights_only=True)
    del state["trainer"]["_trainer"]
    torch.save(state, tmp_path / "model_final.pth")
    with pytest.raises(ValueError, match="has no state of the optimizer"):
        new_trainer(tmp_path).resume_or_load(resume=True)


def test_best_weights_survive_a_resume(tmp_path):
    register_tiny_shapes()
    changes = {"DATASETS__TEST": "('engine_shapes_val',)", "TEST__EVAL_PERIOD": 2}
    new_trainer(tmp_path, SOLVER__MAX_ITER=2, SOLVER__STEPS="()", **changes).train()
    assert (tmp_path / "model_best.pth").is_file()
    (tmp_path / "best.json").write_text(json.dumps({"ap": 99.0, "iterations": 1}))
    before = (tmp_path / "model_best.pth").stat().st_mtime_ns

    resumed = new_trainer(tmp_path, SOLVER__MAX_ITER=4, SOLVER__STEPS="()", **changes)
    resumed.resume_or_load(resume=True)
    assert resumed.best.ap == 99.0
    resumed.train()
    assert (tmp_path / "model_best.pth").stat().st_mtime_ns == before
