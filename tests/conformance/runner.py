"""Runs the suites over folders of reference cases.

A suite is a module of `conformance.suites` with a name (`SUITE`) and a function `verify` that
rebuilds one case with this library's modules and yields its comparisons.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import torch

import asag  # noqa: F401  registers the components

from . import suites as suite_package
from .suites.common import Check, MissingCheckpoint, UnknownCase, compare

DATA_SUFFIXES = {".pt", ".json"}
Verifier = Callable[[Path], Iterator[Check]]


def suite_modules() -> list[ModuleType]:
    """Returns the modules of `conformance.suites` that are suites."""
    modules = (
        importlib.import_module(f"{suite_package.__name__}.{info.name}")
        for info in pkgutil.iter_modules(suite_package.__path__)
    )
    return [m for m in modules if hasattr(m, "SUITE")]


def load_suites() -> dict[str, Verifier]:
    """Returns the function that verifies a case, by suite name."""
    return {m.SUITE: m.verify for m in suite_modules()}


def suite_of(path: Path, root: Path, suites: dict[str, Verifier]) -> str | None:
    """Returns the suite of a file.

    It is named by the nearest folder above the file, up to and including `root`; otherwise it is
    the suite that recognizes the file name.
    """
    for folder in path.parents:
        if folder.name in suites:
            return folder.name
        if folder == root:
            break
    return next((m.SUITE for m in suite_modules() if hasattr(m, "claims") and m.claims(path)), None)


def verify_file(
    path: Path, root: Path, suites: dict[str, Verifier], quiet: bool
) -> tuple[int, int]:
    """Prints the comparisons of one file.

    Args:
        path: the file of a case.
        root: the folder that was asked for.
        suites: see `load_suites`.
        quiet: print failures only.

    Returns:
        Numbers of comparisons that passed and failed.
    """
    case = path.relative_to(root.parent if path.parent == root else root).with_suffix("")
    suite = suite_of(path, root, suites)
    passed = failed = 0
    try:
        if suite is None:
            raise UnknownCase(f"no folder above it names a suite ({', '.join(sorted(suites))})")
        for item in suites[suite](path):
            check = Check(*item)
            error, good = compare(check)
            passed, failed = passed + good, failed + (not good)
            if not (quiet and good):
                print(
                    f"{case}  {check.name}  max_abs_error {error:.2e}  tolerance {check.atol:.1e}"
                    f" + {check.rtol:.1e} * |expected|  {'ok' if good else 'FAIL'}"
                )
    except MissingCheckpoint as reason:
        print(f"{case}  LEFT OUT: {reason}")
    except UnknownCase as issue:
        print(f"{case}  UNKNOWN CASE: {issue}")
        failed += 1
    except Exception as error:  # a broken case must not hide the others
        print(f"{case}  ERROR: {type(error).__name__}: {error}")
        failed += 1
    return passed, failed


def verify_folder(folder: Path, quiet: bool = False) -> int:
    """Verifies every case below a folder and prints the result.

    Args:
        folder: of suites, or one suite.
        quiet: print failures and the summary only.

    Returns:
        0 if every comparison passed, otherwise 1 (also for an unknown case, or no comparison).
    """
    root = folder.resolve()
    paths = sorted(p for p in root.rglob("*") if p.suffix in DATA_SUFFIXES)
    if not paths:
        print(f"{folder}: no reference cases (*.pt, *.json) found")
        return 1
    torch.manual_seed(0)
    suites = load_suites()
    totals = [verify_file(path, root, suites, quiet) for path in paths]
    passed, failed = (sum(x) for x in zip(*totals, strict=True))
    cases = sum(map(any, totals))  # beside which other files may stand
    print(f"{cases} cases: {passed} comparisons ok, {failed} failed")
    return 1 if failed or not passed else 0
