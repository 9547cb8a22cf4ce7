"""Unpacking a zip with a data set into a cache folder."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import zipfile
from pathlib import Path

from asag.data.errors import DataIssue, DatasetError

_UTF8_FLAG = 0x800
_ENCRYPTED_FLAG = 0x1


def unpack(archive: Path) -> Path:
    """The folder with the contents of a zip, unpacked once below `unpacked_root()`.

    The folder appears at once and complete, so several processes may unpack the same file.

    Raises:
        DatasetError: a damaged or encrypted archive, or too little disk space.
    """
    stat = archive.stat()
    identity = f"{archive.resolve()}\n{stat.st_size}\n{stat.st_mtime_ns}".encode(
        "utf-8", "surrogateescape"
    )
    mark = hashlib.sha256(identity).hexdigest()[:12]
    folder = unpacked_root() / f"{archive.stem}-{mark}"
    if folder.is_dir():
        return folder
    scratch = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".unpacking-", dir=folder.parent))
        scratch.chmod(0o755)
        _extract(archive, scratch)
        try:
            os.rename(scratch, folder)
        except OSError:
            if not folder.is_dir():  # another process was faster
                raise
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        remedy = "the archive is damaged or of an unusual kind; download it again, or unpack it"
        raise DatasetError(
            [DataIssue(str(archive), f"not a valid zip: {error}", remedy)]
        ) from error
    except OSError as error:
        remedy = (
            "unpack it yourself and pass the folder, or set DETECTRON2_DATASETS to a folder on "
            "another disk"
        )
        problem = f"cannot be unpacked into {folder.parent} ({error.strerror or error})"
        raise DatasetError([DataIssue(str(archive), problem, remedy)]) from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
    return folder


def unpacked_root() -> Path:
    """Folder of all unpacked data sets, beside Detectron2's own."""
    return Path(os.environ.get("DETECTRON2_DATASETS", "datasets")) / "unpacked"


def _extract(archive: Path, folder: Path) -> None:
    with zipfile.ZipFile(archive) as file:
        members = [x for x in file.infolist() if not _is_clutter(x.filename)]
        if any(x.flag_bits & _ENCRYPTED_FLAG for x in members):
            raise RuntimeError("it is encrypted")
        needed, free = sum(x.file_size for x in members), shutil.disk_usage(folder).free
        if needed > free:
            raise OSError(f"it needs {needed >> 20} MiB, {free >> 20} are free")
        for member in members:
            member.filename = _name(member)
            file.extract(member, folder)  # keeps names inside the folder, whatever they say


def _is_clutter(name: str) -> bool:
    """Returns True for the names that a Mac adds to archives."""
    return name.startswith("__MACOSX/") or os.path.basename(name).startswith("._")


def _name(member: zipfile.ZipInfo) -> str:
    """A member's name with slashes, and as UTF-8 where the archive forgets to say that it is."""
    name = member.filename
    if not member.flag_bits & _UTF8_FLAG:
        with contextlib.suppress(UnicodeError):
            name = name.encode("cp437").decode("utf-8")
    return name.replace("\\", "/")
