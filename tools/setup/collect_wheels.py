#!/usr/bin/env python3
"""Collects wheels for a machine that has PyTorch but no package index.

The target is a Linux machine whose Python already has torch, torchvision, numpy and Pillow, as GPU
images usually do. Everything else of `requirements.txt`, with all its dependencies, is fetched for
that Python (not for the one running this script), source-only packages are built into wheels, and
Detectron2 comes from `install_detectron2.py`.

    make wheelhouse PYTHON=3.12
    make wheelhouse PYTHON=3.12 WITHOUT="opencv-python-headless matplotlib"

then, in the checkout carried to the target together with `wheelhouse/` (the first line is printed
at the end; it differs when something that others ask for was left out):

    python -m pip install --no-index --find-links wheelhouse -r wheelhouse/requirements.txt
    python -m pip install --no-index --no-build-isolation --no-deps -e .

pip evaluates environment markers for the Python it runs under, even with `--python-version`.
Dependencies are therefore followed here, with the target's markers, and pip only fetches.
"""

from __future__ import annotations

import argparse
import email.parser
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import install_detectron2
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name, parse_wheel_filename
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]

ON_TARGET = frozenset({"torch", "torchvision", "numpy", "pillow", "setuptools", "wheel"})
"""Present wherever torch and torchvision are installed; never collected."""
SOURCE_ONLY = frozenset({"fvcore", "iopath", "antlr4-python3-runtime"})
"""Pure-Python packages the index has no wheels of."""
MANYLINUX = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014", "manylinux1")
MAX_ROUNDS = 12


class WheelhouseError(RuntimeError):
    """A problem that the user can fix; the message says how."""


@dataclass
class Requested:
    """Accumulated requirements on one package."""

    specifier: SpecifierSet = field(default_factory=SpecifierSet)
    extras: set[str] = field(default_factory=set)


def target_environment(python: str, machine: str) -> dict[str, str]:
    """Returns the marker variables (PEP 508) of CPython `python` (such as "3.12") on Linux."""
    return {
        "implementation_name": "cpython",
        "implementation_version": f"{python}.0",
        "os_name": "posix",
        "platform_machine": machine,
        "platform_python_implementation": "CPython",
        "platform_release": "",
        "platform_system": "Linux",
        "platform_version": "",
        "python_full_version": f"{python}.0",
        "python_version": python,
        "sys_platform": "linux",
    }


def direct_requirements(
    text: str, environment: Mapping[str, str], without: Iterable[str] = ()
) -> list[Requirement]:
    """Parses the requirements that apply to the target and that it does not have yet.

    Args:
        text: content of the requirements file (requirements and comments only).
        environment: marker variables, see `target_environment`.
        without: further canonical names to leave out.
    """
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    skipped = ON_TARGET | set(without)
    return [
        requirement
        for requirement in map(Requirement, filter(None, lines))
        if canonicalize_name(requirement.name) not in skipped and _holds(requirement, environment)
    ]


def _holds(requirement: Requirement, environment: Mapping[str, str], extra: str = "") -> bool:
    marker = requirement.marker
    return marker is None or marker.evaluate({**environment, "extra": extra})


def wheels_in(folder: Path) -> dict[str, tuple[Version, Path]]:
    """Returns version and file of every wheel in `folder` by canonical name."""
    found = {}
    for path in sorted(folder.glob("*.whl")):
        name, version, _, _ = parse_wheel_filename(path.name)
        found[str(name)] = (version, path)
    return found


def wheel_requirements(path: Path) -> list[Requirement]:
    """Reads the `Requires-Dist` entries of a wheel."""
    with zipfile.ZipFile(path) as archive:
        name = next(n for n in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", n))
        metadata = email.parser.BytesHeaderParser().parsebytes(archive.read(name))
    return [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]


def unmet(
    folder: Path,
    direct: Sequence[Requirement],
    environment: Mapping[str, str],
    without: Iterable[str] = (),
) -> dict[str, Requested]:
    """Finds requirements of the wheels and the direct requirements that `folder` does not satisfy.

    Args:
        folder: wheels collected so far.
        direct: requirements to start from.
        environment: marker variables of the target.
        without: canonical names to leave out, beside `ON_TARGET`.

    Returns:
        Requirements by canonical name; empty if the folder is complete.
    """
    skipped = ON_TARGET | set(without)
    wheels = wheels_in(folder)
    requested: dict[str, Requested] = {}
    visited: set[tuple[str, str]] = set()
    queue = list(direct)
    while queue:
        requirement = queue.pop()
        name = str(canonicalize_name(requirement.name))
        if name in skipped:
            continue
        request = requested.setdefault(name, Requested())
        request.specifier &= requirement.specifier
        request.extras |= requirement.extras
        if name not in wheels:
            continue
        for extra in {"", *requirement.extras}:
            if (name, extra) not in visited:
                visited.add((name, extra))
                needs = wheel_requirements(wheels[name][1])
                queue += [need for need in needs if _holds(need, environment, extra)]
    return {
        name: request
        for name, request in sorted(requested.items())
        if name not in wheels or not request.specifier.contains(wheels[name][0], prereleases=True)
    }


def _pip(arguments: Sequence[str], what: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    result = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if result.returncode != 0:
        tail = "\n".join(result.stdout.strip().splitlines()[-6:])
        raise WheelhouseError(f"pip could not fetch {what}:\n{tail}")


def fetch(folder: Path, requested: Mapping[str, Requested], python: str, machine: str) -> None:
    """Fetches the wheels of one round into `folder`, replacing those of another version."""
    wheels = wheels_in(folder)
    for name in requested:
        if name in wheels:
            wheels[name][1].unlink()
    built = [f"{n}{w.specifier}" for n, w in requested.items() if n in SOURCE_ONLY]
    ready = [f"{n}{w.specifier}" for n, w in requested.items() if n not in SOURCE_ONLY]
    if built:
        _pip(["wheel", "--no-deps", "-w", str(folder), *built], ", ".join(built))
    if ready:
        options = ["--no-deps", "--only-binary=:all:", "--implementation", "cp"]
        options += ["--python-version", python, "-d", str(folder)]
        for abi in (f"cp{python.replace('.', '')}", "abi3", "none"):
            options += ["--abi", abi]
        for level in MANYLINUX:
            options += ["--platform", f"{level}_{machine}"]
        _pip(["download", *options, *ready], ", ".join(ready))


def collect(
    folder: Path, python: str, machine: str, without: Iterable[str] = ()
) -> list[Requirement]:
    """Fills `folder` with all wheels that the target lacks; returns the direct requirements.

    Raises:
        WheelhouseError: a package cannot be fetched, or requirements contradict each other.
        install_detectron2.InstallError: the Detectron2 wheel cannot be built.
    """
    environment = target_environment(python, machine)
    direct = direct_requirements((ROOT / "requirements.txt").read_text(), environment, without)
    if "detectron2" not in without:
        install_detectron2.make_wheel(folder)
        direct.append(Requirement(f"detectron2=={install_detectron2.VERSION}"))
    for _ in range(MAX_ROUNDS):
        requested = unmet(folder, direct, environment, without)
        if not requested:
            return direct
        print(f"Fetching {', '.join(requested)}", flush=True)
        fetch(folder, requested, python, machine)
    raise WheelhouseError(
        "the requirements of these packages contradict each other: "
        + ", ".join(f"{name}{request.specifier}" for name, request in requested.items())
        + ". Relax a pin in requirements.txt or leave one out with --without."
    )


def install_command(folder: str, absent: Iterable[str] = ()) -> str:
    """Returns the install command for the target.

    Args:
        folder: the wheelhouse.
        absent: required packages that were left out; if there are any, pip must ignore
            dependencies, since it would refuse to install without them.
    """
    pip = "python -m pip install --no-index"
    if absent:
        return f"{pip} --no-deps {folder}/*.whl   (required but left out: {', '.join(absent)})"
    return f"{pip} --find-links {folder} -r {folder}/requirements.txt"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    running = f"{sys.version_info.major}.{sys.version_info.minor}"
    parser = argparse.ArgumentParser(
        description="Collects wheels for a machine without a package index."
    )
    parser.add_argument("--python", default=running, metavar="X.Y", help="Python of the target")
    parser.add_argument("--machine", default=platform.machine(), help="its architecture")
    parser.add_argument("--without", nargs="*", default=[], metavar="NAME", help="leave these out")
    parser.add_argument("--output", type=Path, default=ROOT / "wheelhouse", metavar="DIR")
    args = parser.parse_args(argv)
    python = args.python if re.fullmatch(r"3\.\d+", args.python) else running
    if python != args.python and args.python not in ("", "3"):
        parser.error(f"--python {args.python!r} is not a version such as 3.12")
    without = {str(canonicalize_name(name)) for name in args.without}

    with tempfile.TemporaryDirectory(prefix="wheelhouse-") as scratch:
        try:
            direct = collect(Path(scratch), python, args.machine, without)
        except (WheelhouseError, install_detectron2.InstallError) as error:
            print(f"wheelhouse: {error}", file=sys.stderr)
            return 1
        lines = [f"{requirement.name}{requirement.specifier}\n" for requirement in direct]
        (Path(scratch) / "requirements.txt").write_text("".join(lines))
        shutil.rmtree(args.output, ignore_errors=True)
        shutil.copytree(scratch, args.output)

    wheels = sorted(args.output.glob("*.whl"), key=lambda path: -path.stat().st_size)
    for path in wheels:
        print(f"{path.stat().st_size / 1e6:8.2f} MB  {path.name}")
    total = sum(path.stat().st_size for path in wheels) / 1e6
    print(f"{total:8.2f} MB  in {len(wheels)} wheels for Python {python} in {args.output}")
    absent = unmet(args.output, direct, target_environment(python, args.machine))
    print(f"On the target: {install_command(args.output.name, absent)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
