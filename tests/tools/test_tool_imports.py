"""Command lines are quiet: nothing stands on the terminal but what they have to say."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = [
    ROOT / "train_net.py",
    *(x for folder in ("tools", "demo", "projects") for x in sorted((ROOT / folder).rglob("*.py"))),
]
# Importing it first, without the library, prints torch's advice to its authors.
NOISY = {"detectron2", "fvcore"}


def imported(node: ast.AST) -> list[str]:
    """Packages that a statement imports, in order."""
    if isinstance(node, ast.ImportFrom):
        return [node.module.partition(".")[0]] if node.module and not node.level else []
    return [x.name.partition(".")[0] for x in node.names] if isinstance(node, ast.Import) else []


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda x: str(x.relative_to(ROOT)))
def test_the_library_is_imported_before_detectron2(script):
    body = ast.parse(script.read_text(encoding="utf-8")).body
    names = [name for node in body for name in imported(node)]
    is_program = "__main__" in script.read_text(encoding="utf-8") or "asag" in names
    if is_program and NOISY & set(names):
        first = next(x for x in names if x in NOISY | {"asag"})
        assert first == "asag", f"{script}: import asag before {first}"


@pytest.mark.parametrize("name", ["doctor", "report", "setup/setup_env"])
def test_help_prints_nothing_but_the_help(name):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONWARNINGS"}
    command = [sys.executable, str(ROOT / "tools" / f"{name}.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0
    assert done.stderr == ""
    assert done.stdout.startswith("usage:")
