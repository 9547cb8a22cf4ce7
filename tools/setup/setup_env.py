#!/usr/bin/env python3
"""Create `.venv` with everything the project runs on; `make setup` calls it.

Safe to repeat: what is already in place is left alone. It needs Python 3.10 or newer with venv and
pip, a package index that pip reaches (pip's own settings decide which) and disk space, but no
compiler, GPU or code host. The stamp file it leaves in `.venv` tells make that all is done.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VENV = ROOT / ".venv"
STAMP = ".ready"

MINIMUM_PYTHON = (3, 10)
VENV_GIGABYTES = 7
"""What a finished environment takes: the CUDA build of PyTorch is most of it."""
DOWNLOAD_GIGABYTES = 4
"""What pip keeps in the temporary folder while it installs PyTorch."""

# Editable installs without build isolation need current build tools; pip 25.3 is the last tested
# series that reads the Detectron2 archive without a detour (see install_detectron2.py).
BUILD_TOOLS = ("pip==25.3", "setuptools==84.2.1", "wheel==0.48.0")
PROBE = "yacs==0.1.8"
"""A tiny package of requirements.txt, used to ask whether pip reaches an index at all."""


class SetupError(RuntimeError):
    """A problem the user can act on; the message says how."""


def check_interpreter(version: Sequence[int] = sys.version_info) -> None:
    """Raise SetupError unless this Python is new enough and can create environments."""
    if tuple(version[:2]) < MINIMUM_PYTHON:
        raise SetupError(
            f"Python {'.'.join(map(str, version[:3]))} is too old, 3.10 or newer is needed. "
            "Name another interpreter: make setup PYTHON=python3.11"
        )
    missing = [name for name in ("venv", "ensurepip") if importlib.util.find_spec(name) is None]
    if missing:
        raise SetupError(
            f"this Python has no module {' and no '.join(missing)}. On Debian or Ubuntu: "
            f"sudo apt install python{version[0]}.{version[1]}-venv; or name another interpreter: "
            "make setup PYTHON=/path/to/python3"
        )


def check_disk_space(venv: Path = VENV) -> None:
    """Raise SetupError when the environment or pip's temporary files cannot fit."""
    folder = venv.parent
    scratch = Path(tempfile.gettempdir())
    needed = {folder: VENV_GIGABYTES}
    if os.stat(folder).st_dev == os.stat(scratch).st_dev:
        needed[folder] += DOWNLOAD_GIGABYTES
    else:
        needed[scratch] = DOWNLOAD_GIGABYTES
    for place, gigabytes in needed.items():
        free = shutil.disk_usage(place).free / 1e9
        if free < gigabytes:
            raise SetupError(
                f"{place} has {free:.1f} GB free and set-up needs about {gigabytes} GB there. "
                "Free some space, move the checkout, or point TMPDIR at a larger disk."
            )


def _run(command: Sequence[str | Path], failure: str, *, quiet: bool = False) -> None:
    """Run a command from the repository root; raise SetupError with `failure` when it fails."""
    output = subprocess.PIPE if quiet else None
    result = subprocess.run(
        [str(part) for part in command], cwd=ROOT, text=True, stdout=output, stderr=output
    )
    if result.returncode != 0:
        detail = f"\n{result.stderr.strip() or result.stdout.strip()}" if quiet else ""
        raise SetupError(failure + detail)


def check_index(python: Path) -> None:
    """Raise SetupError, within a minute, when pip cannot fetch even a tiny package."""
    with tempfile.TemporaryDirectory() as scratch:
        options = ["--no-deps", "--retries", "1", "--timeout", "20", "-q", "-d", scratch]
        _run(
            [python, "-m", "pip", "download", *options, PROBE],
            f"pip cannot fetch {PROBE}: no network, or pip needs an index, proxy or certificate "
            "setting (`python3 -m pip config list`). A machine without any index installs from "
            "wheels collected elsewhere with `make wheelhouse`. pip said:",
            quiet=True,
        )


def create_environment(venv: Path = VENV) -> Path:
    """Create the environment unless a working one is there; return its interpreter.

    Raises:
        SetupError: no disk space, no index, or venv or pip fails.
    """
    python = venv / "bin" / "python"
    working = (
        python.exists()
        and subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode == 0
    )
    has_torch = any(venv.glob("lib/python3*/site-packages/torch/__init__.py"))
    if not has_torch:
        check_disk_space(venv)
    if not working:
        _run([sys.executable, "-m", "venv", venv], f"could not create {venv}; see above")
    if not has_torch:
        check_index(python)
        _run([python, "-m", "pip", "install", "-q", *BUILD_TOOLS], "pip failed; see above")
    return python


def install_packages(python: Path) -> None:
    """Install the pinned packages, Detectron2 where absent, and this package in editable form."""
    pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    print("Installing the pinned packages (3 GB to fetch the first time) ...", flush=True)
    _run(
        [*pip, "-r", "requirements.txt", "-r", "requirements-dev.txt"],
        "pip could not install the pinned packages; its message above says which one",
    )
    _run(
        [python, "tools/setup/install_detectron2.py", "--no-deps"],
        "Detectron2 is missing; see above",
    )
    _run(
        [*pip, "--no-build-isolation", "--no-deps", "-e", "."],
        "pip could not install this package itself:",
        quiet=True,
    )


def main() -> int:
    """Set everything up; returns the exit status."""
    start = time.monotonic()
    try:
        check_interpreter()
        python = create_environment()
        install_packages(python)
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    (VENV / STAMP).touch()
    print(f"Ready in {time.monotonic() - start:.0f} s: {python}")
    return 0


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()  # --help alone
    sys.exit(main())
