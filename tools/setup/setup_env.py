#!/usr/bin/env python3
"""Creates `.venv` with all packages of the project; `make setup` calls it.

It can be repeated; existing parts are kept. It needs Python 3.10 or newer with venv and pip, a
package index that pip reaches (chosen by pip's own settings) and disk space, but no compiler, GPU
or code host. A stamp file in `.venv` tells make that the environment is complete.
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
"""Size of the finished environment, mostly the CUDA build of PyTorch."""
DOWNLOAD_GIGABYTES = 4
"""Size of pip's temporary files during the installation of PyTorch."""

# Editable installs without build isolation need current build tools; pip 25.3 is the last tested
# series that accepts the Detectron2 archive directly (see install_detectron2.py).
BUILD_TOOLS = ("pip==25.3", "setuptools==84.2.1", "wheel==0.48.0")
PROBE = "yacs==0.1.8"
"""A tiny package of requirements.txt, fetched to test that pip reaches an index."""


class SetupError(RuntimeError):
    """A problem that the user can fix; the message says how."""


def check_interpreter(version: Sequence[int] = sys.version_info) -> None:
    """Raises SetupError unless this Python is new enough and can create environments."""
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
    """Raises SetupError if there is no space for the environment or pip's temporary files."""
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
    """Runs a command from the repository root; raises SetupError with `failure` if it fails."""
    output = subprocess.PIPE if quiet else None
    result = subprocess.run(
        [str(part) for part in command], cwd=ROOT, text=True, stdout=output, stderr=output
    )
    if result.returncode != 0:
        detail = f"\n{result.stderr.strip() or result.stdout.strip()}" if quiet else ""
        raise SetupError(failure + detail)


def check_index(python: Path) -> None:
    """Raises SetupError within a minute if pip cannot fetch a tiny package."""
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
    """Creates the environment unless a working one exists; returns its interpreter.

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
    """Installs the pinned packages, Detectron2 where absent, and this package in editable form."""
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
    """Sets everything up; returns the exit code."""
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
