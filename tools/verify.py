#!/usr/bin/env python
"""Compares this library with tensors made by the official implementations.

DIR is a folder of suites (`sparse_rcnn/`, `iou_sparse_rcnn/`, `mmdet/`, `ota/`, ...) or one suite.
Each case is rebuilt with this library's modules, the published-format weights go through the
checkpoint mapping, and every tensor is compared. One line a tensor: case, tensor, largest absolute
error, tolerance, verdict. The exit status is 1 if anything fails or a case is not recognized.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import torch
import verify_suites
from verify_suites.common import Check, MissingCheckpoint, UnknownCase, compare

DATA_SUFFIXES = {".pt", ".json"}
Verifier = Callable[[Path], Iterator[Check]]


def suite_modules() -> list[ModuleType]:
    """The modules of `verify_suites` that are suites."""
    modules = (
        importlib.import_module(f"verify_suites.{info.name}")
        for info in pkgutil.iter_modules(verify_suites.__path__)
    )
    return [m for m in modules if hasattr(m, "SUITE")]


def load_suites() -> dict[str, Verifier]:
    """Suite name -> function that checks one of its files."""
    return {m.SUITE: m.verify for m in suite_modules()}


def suite_of(path: Path, root: Path, suites: dict[str, Verifier]) -> str | None:
    """The nearest folder above a file, up to and including `root`, that names a suite; else the
    suite that knows the file by its name."""
    for folder in path.parents:
        if folder.name in suites:
            return folder.name
        if folder == root:
            break
    return next((m.SUITE for m in suite_modules() if hasattr(m, "claims") and m.claims(path)), None)


def verify_file(
    path: Path, root: Path, suites: dict[str, Verifier], quiet: bool
) -> tuple[int, int]:
    """Prints the comparisons of one file; returns (passed, failed)."""
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


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--quiet", action="store_true", help="print failures and the summary only")
    options = parser.parse_args(arguments)
    root = options.folder.resolve()
    paths = sorted(p for p in root.rglob("*") if p.suffix in DATA_SUFFIXES)
    if not paths:
        print(f"{options.folder}: no reference cases (*.pt, *.json) found")
        return 1
    torch.manual_seed(0)
    suites = load_suites()
    totals = [verify_file(path, root, suites, options.quiet) for path in paths]
    passed, failed = (sum(x) for x in zip(*totals, strict=True))
    cases = sum(map(any, totals))  # beside which other files may stand
    print(f"{cases} cases: {passed} comparisons ok, {failed} failed")
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main())
