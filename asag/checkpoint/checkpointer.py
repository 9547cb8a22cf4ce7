"""Checkpoints that are complete or not there at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..files import atomic_writer
from .loading import PublishedCheckpointer

SCRATCH_FILES = ".*.pth.*"  # names that `atomic_writer` gives to incomplete checkpoints


class AtomicCheckpointer(PublishedCheckpointer):
    """Detectron2's checkpointer, except that a crash while writing leaves the older file readable,
    and that it reads the papers' published weights.

    Checkpoints hold tensors, numbers and strings only: `torch.load` reads them with
    `weights_only=True`. Where the weights descend from a source that computes in its own way, they
    say so (`settings`).
    """

    def save(self, name: str, **extra: Any) -> None:
        """Writes `<name>.pth` with the model and all checkpointables, and marks it as the last.

        Args:
            name: file name without suffix.
            extra: further entries.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        states = {key: value.state_dict() for key, value in self.checkpointables.items()}
        self._write(name, {**states, **extra})
        self.tag_last_checkpoint(f"{name}.pth")

    def save_weights(self, name: str, **extra: Any) -> None:
        """Writes `<name>.pth` with the model alone; `--resume` will not start from it."""
        if self.save_dir and self.save_to_disk:
            self._write(name, extra)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Notes the file that `--resume` starts from."""
        with atomic_writer(Path(self.save_dir) / "last_checkpoint") as file:
            file.write(last_filename_basename)

    def _write(self, name: str, data: dict[str, Any]) -> None:
        target = Path(self.save_dir) / f"{name}.pth"
        self.logger.info(f"Saving checkpoint to {target}")
        for leftover in target.parent.glob(SCRATCH_FILES):  # of a process killed while it wrote
            leftover.unlink(missing_ok=True)
        settings = {"settings": self.settings} if self.settings else {}
        data = {"model": self.model.state_dict(), **settings, **data}
        with atomic_writer(target, "wb") as file:
            torch.save(data, file)
