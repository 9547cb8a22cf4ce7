"""A training without progress ends by itself, with everything written that its end should have."""

from __future__ import annotations

import pytest
import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from engine_support import register_tiny_shapes, tiny_cfg

from asag.engine import Trainer


@pytest.fixture
def accuracies(monkeypatch):
    """Sets what the coming evaluations find; no image is looked at."""

    def set_to(*values: float | None) -> None:
        left = list(values)

        def test(cfg, model, evaluators=None):
            ap = left.pop(0)
            return {} if not comm.is_main_process() else {"bbox": {"AP": ap}}

        monkeypatch.setattr(Trainer, "test", staticmethod(test))

    return set_to


def trainer(folder, patience: int = 2, **changes) -> Trainer:
    register_tiny_shapes()
    settings = {
        "DATASETS__TEST": "('engine_shapes_val',)",
        "SOLVER__EARLY_STOP_PATIENCE": patience,
        "SOLVER__MAX_ITER": 12,
        "SOLVER__IMS_PER_BATCH": 1,
        "TEST__EVAL_PERIOD": 2,
    }
    return Trainer(tiny_cfg(folder, **settings | changes))


def last(folder) -> tuple[str, dict]:
    name = (folder / "last_checkpoint").read_text()
    return name, torch.load(folder / name, weights_only=True)


def test_stops_when_patience_is_exhausted(tmp_path, accuracies, caplog):
    accuracies(10.0, 20.0, 20.0, 15.0, 90.0)
    run = trainer(tmp_path)
    with caplog.at_level("INFO", logger="asag"):
        results = run.train()
    assert results["bbox"]["AP"] == 15.0 and run.best.ap == 20.0
    assert "stopped early after 8 of 12 iterations: 2 evaluations" in caplog.text
    assert "20.00, reached after 4 iterations" in caplog.text
    name, state = last(tmp_path)
    assert name == "model_final.pth" and state["trainer"]["iteration"] == 7
    assert (tmp_path / "metrics.json").read_text().splitlines(), "the writers came to their end"

    accuracies()  # a resumed run has nothing to do, and says so
    again = trainer(tmp_path)
    again.resume_or_load(resume=True)
    with caplog.at_level("INFO", logger="asag"):
        assert again.train() is None
    assert "nothing left to train, the run was stopped early: 2 evaluations" in caplog.text

    accuracies(30.0, 40.0)  # unless it is told to be more patient
    patient = trainer(tmp_path, patience=5)
    patient.resume_or_load(resume=True)
    assert patient.start_iter == 8
    assert patient.train()["bbox"]["AP"] == 40.0


@pytest.mark.parametrize(
    ("patience", "found"),
    [(0, (9.0, 8.0, 7.0, 6.0, 5.0, 4.0)), (3, (5.0, 4.0, 3.0, 6.0, 5.0, 4.0))],
    ids=["off", "progress-in-time"],
)
def test_trains_to_the_end(tmp_path, accuracies, patience, found):
    accuracies(*found)
    run = trainer(tmp_path, patience=patience)
    run.train()
    assert run.iter == 12
    assert last(tmp_path)[1]["trainer"]["iteration"] == 11


def test_evaluations_without_a_result_count(tmp_path, accuracies):
    accuracies(float("nan"), float("nan"))
    run = trainer(tmp_path)
    run.train()
    assert run.iter == 4 and run.best is None


def test_interrupted_run_stops_where_the_whole_one_does(tmp_path, accuracies):
    class Kill(HookBase):
        def after_step(self):
            if self.trainer.iter + 1 == 7:
                raise KeyboardInterrupt

    accuracies(20.0, 10.0, 10.0)
    broken = trainer(tmp_path, patience=3, SOLVER__CHECKPOINT_PERIOD=2)
    broken.register_hooks([Kill()])
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    accuracies(10.0)
    resumed = trainer(tmp_path, patience=3, SOLVER__CHECKPOINT_PERIOD=2)
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == 6
    resumed.train()
    assert resumed.iter == 8  # the best after 2, then three without progress


@pytest.mark.parametrize("changes", [{"TEST__EVAL_PERIOD": 0}, {"DATASETS__TEST": "()"}])
def test_patience_needs_evaluations(tmp_path, changes):
    with pytest.raises(ValueError, match=r"EARLY_STOP_PATIENCE is 2, but nothing is evaluated"):
        trainer(tmp_path, **changes)
