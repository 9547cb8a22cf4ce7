"""Output of a run: what it shows on a terminal, keeps in its log and sends to Weights & Biases."""

from __future__ import annotations

import os
import pty
import struct
import sys
import termios
import threading
from fcntl import ioctl
from types import ModuleType, SimpleNamespace

import pytest
from engine_support import CONFIG, register_tiny_shapes, tiny_cfg, tiny_options

from asag.engine import Trainer, progress
from train_net import main


@pytest.fixture
def wandb(monkeypatch):
    """A module that notes down which runs are started and what they are sent."""
    module = ModuleType("wandb")
    module.started, module.sent = [], []

    def init(**options):
        module.started.append(options)
        return SimpleNamespace(
            id=options.get("id", f"run{len(module.started)}"),
            define_metric=lambda *names, **options: None,
            log=module.sent.append,
            finish=lambda exit_code: None,
        )

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def train(folder, resume=False, **changes):
    register_tiny_shapes()
    trainer = Trainer(tiny_cfg(folder, **changes))
    trainer.resume_or_load(resume=resume)
    trainer.train()


def test_resumed_training_goes_on_with_its_run(wandb, tmp_path):
    evaluated = {"LOGGING__WANDB": "shapes", "DATASETS__TEST": "('engine_shapes_val',)"}
    train(tmp_path, SOLVER__MAX_ITER=2, **evaluated)
    train(tmp_path, SOLVER__MAX_ITER=3, resume=True, **evaluated)
    first, second = wandb.started
    assert "id" not in first and (second["id"], second["resume"]) == ("run1", "allow")
    assert first["config"]["SOLVER"]["MAX_ITER"] == 2 and first["project"] == "shapes"
    assert [numbers["iteration"] for numbers in wandb.sent] == [1, 2]
    for numbers in wandb.sent:
        assert {"total_loss", "grad_norm", "lr", "bbox/AP"} <= numbers.keys()


def test_absent_package_is_said_before_anything_is_built(monkeypatch, capsys, tmp_path):
    register_tiny_shapes()
    monkeypatch.setitem(sys.modules, "wandb", None)
    options = tiny_options(tmp_path, LOGGING__WANDB="shapes")
    assert main(["--config-file", str(CONFIG), *options]) == 2
    assert "pip install wandb, or leave LOGGING.WANDB empty" in capsys.readouterr().err
    assert not (tmp_path / "metrics.json").exists()


def test_terminal_shows_training_and_evaluation(monkeypatch, tmp_path):
    for key, value in (("NO_COLOR", ""), ("TERM", "xterm")):
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(progress, "REFRESH", 0.0)
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    seen = []
    reader = threading.Thread(target=read_all, args=(ours, seen))
    reader.start()
    with open(theirs, "w", encoding="utf-8") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        train(tmp_path, DATASETS__TEST="('engine_shapes_val',)", TEST__EVAL_PERIOD=2)
    reader.join(timeout=60)
    text = b"".join(seen).decode()
    for part in ("train 0/4", "train 2/4", "train 4/4", "loss ", "AP ", "evaluate 6/6"):
        assert part in text, part


def read_all(reading, seen):
    try:
        while chunk := os.read(reading, 65536):
            seen.append(chunk)
    except OSError:  # Linux ends a terminal without a writer so
        pass
    os.close(reading)


def test_log_file_has_no_colors(monkeypatch, tmp_path):
    register_tiny_shapes()
    monkeypatch.setattr("detectron2.data.build.colored", lambda text, *_: f"\x1b[36m{text}\x1b[0m")
    options = tiny_options(tmp_path, SOLVER__MAX_ITER=1)
    assert main(["--config-file", str(CONFIG), *options]) == 0
    log = (tmp_path / "log.txt").read_text()
    assert "category" in log and "\x1b" not in log
