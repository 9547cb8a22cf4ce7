#!/usr/bin/env python
"""Runs train_net.py and records the exact loss of every iteration and the processes.

OUTPUT_DIR/losses.txt gets a line `iteration loss` after each iteration, the loss as a hexadecimal
float (metrics.json has smoothed values of some iterations). Lines of a killed process stay.
OUTPUT_DIR/process<rank>.txt has the id of the latest process of a rank.

    python tools/recovery/recorded_training.py ARGUMENTS OF train_net.py
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from asag.cli import load_command
from asag.engine import Trainer, defaults

from detectron2.engine import HookBase
from detectron2.utils import comm

LOSSES_FILE = "losses.txt"
PROCESS_FILE = "process{rank}.txt"


class LossRecorder(HookBase):
    """Writes `losses.txt` and `process<rank>.txt` below a folder."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)

    def before_train(self) -> None:
        place = self._folder / PROCESS_FILE.format(rank=comm.get_rank())
        place.write_text(str(os.getpid()))

    def after_step(self) -> None:
        self.trainer.collect_log()
        if comm.is_main_process():
            loss = self.trainer.storage.history("total_loss").latest()
            with open(self._folder / LOSSES_FILE, "a") as file:
                file.write(f"{self.trainer.iter} {float(loss).hex()}\n")


class RecordingTrainer(Trainer):
    """Trainer that records the loss of an iteration before its checkpoint is saved."""

    def build_hooks(self) -> list[HookBase]:
        """Puts the recorder before the usual hooks."""
        return [LossRecorder(self.cfg.OUTPUT_DIR), *super().build_hooks()]


def read_losses(folder: Path) -> list[tuple[int, float]]:
    """Reads the losses in the order of writing.

    Returns:
        (iteration, loss); a repeated iteration occurs repeatedly, and an incomplete last line is
        left out.
    """
    path = folder / LOSSES_FILE
    if not path.is_file():
        return []
    whole, _, _ = path.read_text().rpartition("\n")
    rows = [line.split() for line in whole.splitlines()]
    return [(int(iteration), float.fromhex(loss)) for iteration, loss in rows]


def main(arguments: list[str]) -> int:
    """Runs `train_net.py` with these arguments and records it; returns the exit code."""
    train_net = load_command("train_net.py")
    defaults.Trainer = RecordingTrainer
    return train_net.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
