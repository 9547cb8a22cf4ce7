"""Weights & Biases: what is sent, under which run, and what is said when it cannot be."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
from detectron2.utils.events import EventStorage, JSONWriter, TensorboardXWriter
from engine_support import tiny_cfg

from asag.engine.writers import RUN_FILE, ConsolePrinter, WandbWriter, build_writers


class FakeRun:
    def __init__(self, number, given):
        self.id, self.calls = given or f"run{number}", []

    def define_metric(self, name, **options):
        self.calls.append(("define_metric", name, options))

    def log(self, values):
        self.calls.append(("log", values))

    def finish(self, exit_code):
        self.calls.append(("finish", exit_code))


@pytest.fixture
def wandb(monkeypatch):
    """A module that notes down what is asked of it."""
    module = ModuleType("wandb")
    module.started, module.runs = [], []

    def init(**options):
        module.started.append(options)
        module.runs.append(FakeRun(len(module.runs), options.get("id")))
        return module.runs[-1]

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def writer(folder):
    return WandbWriter(project="shapes", output_dir=str(folder), config={"SEED": 7}, window=3)


def train(folder, start, end):
    """As a training of some iterations, written every second one."""
    mine = writer(folder)
    with EventStorage(start) as storage:
        for iteration in range(start, end):
            storage.iter = iteration
            storage.put_scalars(total_loss=float(iteration))
            if iteration == 3:
                storage.put_scalars(**{"bbox/AP": 12.5}, smoothing_hint=False)
            if iteration % 2:
                mine.write()
        mine.write()
        mine.close()


def test_run_has_project_configuration_and_all_scalars(wandb, tmp_path):
    folder = tmp_path / "my_training"
    train(folder, 0, 4)
    assert wandb.started == [
        {"project": "shapes", "name": "my_training", "dir": str(folder), "config": {"SEED": 7}}
    ]
    assert wandb.runs[0].calls == [
        ("define_metric", "iteration", {}),
        ("define_metric", "*", {"step_metric": "iteration"}),
        ("log", {"iteration": 1, "total_loss": 0.5}),
        ("log", {"iteration": 3, "total_loss": 2.0, "bbox/AP": 12.5}),
        ("finish", 0),
    ]
    assert (folder / RUN_FILE).read_text() == "run0\n"


def test_resumed_training_goes_on_with_its_run(wandb, tmp_path):
    train(tmp_path, 0, 6)
    train(tmp_path, 4, 8)  # the last checkpoint lies behind what was sent
    again = wandb.started[1]
    assert (again["id"], again["resume"]) == ("run0", "allow")
    sent = [call[1]["iteration"] for call in wandb.runs[1].calls if call[0] == "log"]
    assert sent == [5, 7]
    train(tmp_path, 6, 8)  # and its id survives
    assert wandb.started[2]["id"] == "run0"


def test_new_training_in_an_old_folder_is_a_new_run(wandb, tmp_path):
    train(tmp_path, 0, 2)
    train(tmp_path, 0, 2)
    assert "id" not in wandb.started[1] and "resume" not in wandb.started[1]
    assert (tmp_path / RUN_FILE).read_text() == "run1\n"


def test_resuming_without_a_known_run_starts_one(wandb, tmp_path):
    train(tmp_path, 4, 6)
    assert "id" not in wandb.started[0] and (tmp_path / RUN_FILE).read_text() == "run0\n"


def test_nothing_is_started_before_there_are_numbers(wandb, tmp_path):
    mine = writer(tmp_path)
    with EventStorage(0):
        mine.write()
    mine.close()
    assert wandb.started == []


def test_failed_training_is_a_failed_run(wandb, tmp_path):
    mine = writer(tmp_path)
    with EventStorage(0) as storage, pytest.raises(RuntimeError):
        storage.put_scalars(total_loss=1.0)
        try:
            raise RuntimeError("diverged")
        finally:
            mine.write()
            mine.close()
    assert wandb.runs[0].calls[-1] == ("finish", 1)


@pytest.mark.parametrize("found", [None, ModuleType("wandb")], ids=["absent", "only a folder"])
def test_absent_package_is_named_at_build_time(monkeypatch, tmp_path, found):
    monkeypatch.setitem(sys.modules, "wandb", found)
    with pytest.raises(
        ValueError, match=r"LOGGING\.WANDB is 'shapes'.*pip install wandb, or leave"
    ):
        writer(tmp_path)


def test_a_run_that_cannot_start_says_what_to_do(monkeypatch, tmp_path):
    def init(**options):
        raise RuntimeError("no API key")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    mine = writer(tmp_path)
    with EventStorage(0) as storage:
        storage.put_scalars(total_loss=1.0)
        with pytest.raises(ValueError, match=r"no API key\. .*WANDB_MODE=offline"):
            mine.write()
    assert not (tmp_path / RUN_FILE).exists()


def test_writers_by_configuration(wandb, monkeypatch, tmp_path):
    options = {"max_iter": 4, "iters_per_epoch": 3}
    kinds = [ConsolePrinter, JSONWriter, TensorboardXWriter]
    off = tiny_cfg(tmp_path)
    assert off.LOGGING.WANDB == ""
    monkeypatch.setitem(sys.modules, "wandb", None)  # not needed where it is not asked for
    assert [type(w) for w in build_writers(str(tmp_path), **options, cfg=off)] == kinds
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    on = tiny_cfg(tmp_path, LOGGING__WANDB="shapes")
    writers = build_writers(str(tmp_path), **options, cfg=on)
    assert [type(w) for w in writers] == [*kinds, WandbWriter]
    with EventStorage(0) as storage:
        storage.put_scalars(total_loss=1.0)
        writers[-1].write()
    sent = wandb.started[0]
    assert sent["project"] == "shapes" and sent["config"]["MODEL"]["DECODER"]["NUM_STAGES"] == 2
