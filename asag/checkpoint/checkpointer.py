"""Checkpoints that are complete or not there at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from ..files import atomic_writer
from .loading import PublishedCheckpointer

SCRATCH_FILES = ".*.pth.*"  # what `write_atomically` calls a checkpoint that is not complete


class AtomicCheckpointer(PublishedCheckpointer):
    """Detectron2's checkpointer, except that a crash while writing leaves the older file readable,
    and that it reads the papers' published weights.

    Checkpoints hold tensors, numbers and strings only: `torch.load` reads them with
    `weights_only=True`.
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
        self._write(name, {"model": self.model.state_dict(), **states, **extra})
        self.tag_last_checkpoint(f"{name}.pth")

    def save_weights(self, name: str, **extra: Any) -> None:
        """Writes `<name>.pth` with the model alone; `--resume` will not start from it."""
        if self.save_dir and self.save_to_disk:
            self._write(name, {"model": self.model.state_dict(), **extra})

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Notes the file that `--resume` starts from."""
        with atomic_writer(Path(self.save_dir) / "last_checkpoint") as file:
            file.write(last_filename_basename)

    def _write(self, name: str, data: dict[str, Any]) -> None:
        target = Path(self.save_dir) / f"{name}.pth"
        target.parent.mkdir(parents=True, exist_ok=True)
        self.logger.info(f"Saving checkpoint to {target}")
        for leftover in target.parent.glob(SCRATCH_FILES):  # of a process killed while it wrote
            leftover.unlink(missing_ok=True)
        write_atomically(data, target)


def write_atomically(data: dict[str, Any], target: Path) -> None:
    """`torch.save` into a scratch file beside `target`, which then takes its name.

    Raises:
        OSError: the folder cannot be written; `target` is as it was.
    """
    descriptor, scratch = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            torch.save(data, file)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(scratch, 0o666 & ~mask)  # mkstemp makes it private to the user
        os.replace(scratch, target)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise
