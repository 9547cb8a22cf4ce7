"""A training killed with SIGKILL and resumed equals one left alone; and the tool would notice."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kill_test import broken_checkpoint, differences
from recorded_training import read_losses

TOOL = Path(__file__).resolve().parents[2] / "tools/recovery/kill_test.py"


def test_three_kills():
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TOOL), "--kills", "3", "--seed", "1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 kills" in done.stdout
    assert "equal to the uninterrupted run" in done.stdout


def write_run(folder: Path) -> Path:
    """Files of a finished run, as far as the tool looks at it."""
    (folder / "inference").mkdir(parents=True)
    (folder / "inference/coco_instances_results.json").write_text("[]")
    (folder / "metrics.json").write_text('{"iteration": 1}\n')
    (folder / "losses.txt").write_text(f"0 {(1.5).hex()}\n1 {(1.25).hex()}\n")
    state = {"model": {"weight": torch.ones(2)}, "trainer": {"iteration": 1}}
    torch.save(state, folder / "model_final.pth")
    (folder / "last_checkpoint").write_text("model_final.pth")
    return folder


def other_weights(folder: Path) -> None:
    path = folder / "model_final.pth"
    state = torch.load(path)
    state["model"]["weight"][1] += 1e-7
    torch.save(state, path)


def other_loss(folder: Path) -> None:
    text = (folder / "losses.txt").read_text()
    again = float.fromhex(text.split()[3]) * (1 + 2**-52)
    (folder / "losses.txt").write_text(f"{text}1 {again.hex()}\n")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda run: None, None),
        (other_loss, "loss of iteration 1 is 1.25"),
        (lambda run: (run / "losses.txt").write_text(f"0 {(1.5).hex()}\n"), "no loss of"),
        (other_weights, "1 final weights differ, first weight"),
        (lambda run: (run / "inference/coco_instances_results.json").write_text("[1]"), "detect"),
        (lambda run: (run / ".model_0000003.pth.abc").touch(), "left over"),
        (lambda run: (run / "metrics.json").write_text('{"iter'), "line 1 of metrics.json"),
    ],
)
def test_differences_are_found(tmp_path, change, problem):
    whole, broken = write_run(tmp_path / "whole"), write_run(tmp_path / "broken")
    change(broken)
    found = differences(whole, broken)
    assert len(found) == (problem is not None)
    assert problem is None or problem in found[0]


def test_broken_checkpoints_are_found(tmp_path):
    assert broken_checkpoint(tmp_path) is None
    run = write_run(tmp_path / "run")
    assert broken_checkpoint(run) is None

    whole = (run / "model_final.pth").read_bytes()
    (run / "model_0000005.pth").write_bytes(whole)
    (run / "last_checkpoint").write_text("model_0000005.pth")
    assert "holds iteration 1" in broken_checkpoint(run)
    (run / "model_0000005.pth").write_bytes(whole[:-40])
    assert "cannot be read" in broken_checkpoint(run)
    (run / "last_checkpoint").write_text("model_0000007.pth")
    assert "cannot be read: FileNotFoundError" in broken_checkpoint(run)


def test_a_line_cut_short_is_left_out(tmp_path):
    assert read_losses(tmp_path) == []
    (tmp_path / "losses.txt").write_text(f"0 {(1.5).hex()}\n1 0x1.8")
    assert read_losses(tmp_path) == [(0, 1.5)]
