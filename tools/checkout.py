"""Access to the test material of this checkout, which is not installed with the library."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]


def import_from_tests(name: str) -> ModuleType:
    """Imports a module of a package in `tests/`.

    Args:
        name: dotted, such as "conformance.runner".

    Raises:
        FileNotFoundError: there is no such package beside the tools.
    """
    package = name.partition(".")[0]
    if package not in sys.modules:
        spec = importlib.machinery.PathFinder.find_spec(package, [str(ROOT / "tests")])
        if spec is None or spec.loader is None:
            raise FileNotFoundError(
                f"{ROOT / 'tests' / package} is missing; run this tool from a complete checkout"
            )
        sys.modules[package] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[package])
    return importlib.import_module(name)
