"""Files that other processes may read while they are written."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


@contextmanager
def atomic_writer(path: str | os.PathLike[str]) -> Iterator[TextIO]:
    """Opens a text file that appears under its name only when it is complete, see `atomic_path`.

    Yields:
        The open scratch file (UTF-8).

    Raises:
        OSError: the folder cannot be made or written.
    """
    with atomic_path(path) as scratch, open(scratch, "w", encoding="utf-8") as file:
        yield file


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A place to write a file that appears under its name only when it is complete.

    The scratch file lies in the same folder, takes the place of `path` when the block ends and is
    removed when the block raises. Several processes may write the same path at once: readers see
    one of the complete versions.

    Args:
        path: the file to write; missing parent folders are made.

    Yields:
        The scratch file, empty.

    Raises:
        OSError: the folder cannot be made or written.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, scratch = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(descriptor)
    try:
        yield Path(scratch)
        os.chmod(scratch, 0o666 & ~_umask())  # mkstemp makes it private to the user
        os.replace(scratch, target)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise


def _umask() -> int:
    """The process's file mode mask (readable only by setting it)."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
