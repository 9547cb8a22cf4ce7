"""Imports point one way, see docs/architecture.md."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "asag"

# Lower numbers know nothing of higher ones; the longest matching prefix counts.
LEVELS = {
    "asag.files": 0,
    "asag.structures": 0,
    "asag.config": 0,
    "asag.checkpoint": 0,
    "asag.modeling.registry": 0,
    "asag.modeling.events": 0,
    "asag.modeling.layers": 1,
    "asag.modeling.backbone": 2,
    "asag.modeling.neck": 2,
    "asag.modeling.proposal_generator": 2,
    "asag.modeling.roi_heads": 2,
    "asag.modeling.matching": 2,
    "asag.modeling.criterion": 2,
    "asag.modeling.postprocess": 2,
    "asag.modeling": 3,
    "asag.data": 4,
    "asag.evaluation": 4,
    "asag.visualization": 5,
    "asag.model_zoo": 5,
    "asag.inference": 6,
    "asag.engine": 6,
    "asag.diagnostics": 7,
    "asag.report": 7,
    "asag.export": 7,
    "asag": 8,
}


def level(module):
    parts = module.split(".")
    while ".".join(parts) not in LEVELS:
        parts.pop()
    return LEVELS[".".join(parts)]


def module_name(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source, module, is_package):
    """Dotted names that a module imports, relative ones resolved; `from a import b` gives a.b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parts = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parts, *([node.module] if node.module else [])])
            for alias in node.names:
                known = PACKAGE.parent.joinpath(*base.split("."), alias.name)
                is_module = known.is_dir() or known.with_suffix(".py").is_file()
                yield (f"{base}.{alias.name}" if is_module else base), node.lineno


def upward(source, module, is_package=False):
    """Imports of the package's own modules that stand higher than `module`."""
    return [
        f"{module}:{line} imports {name}"
        for name, line in imports(source, module, is_package)
        if name.split(".")[0] == "asag" and level(name) > level(module)
    ]


def exists(name):
    path = PACKAGE.parent.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def test_every_level_is_of_a_module_that_exists():
    assert [name for name in LEVELS if not exists(name)] == []
    assert not exists("asag.modeling.necks")


def test_no_import_goes_up():
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        module = module_name(path)
        found += upward(path.read_text(encoding="utf-8"), module, path.name == "__init__.py")
    assert found == []


def test_package_imports_no_tool():
    names = {p.stem for p in (PACKAGE.parent / "tools").rglob("*.py")} | {"tools", "train_net"}
    for path in PACKAGE.rglob("*.py"):
        module = module_name(path)
        for name, line in imports(path.read_text(encoding="utf-8"), module, False):
            assert name.split(".")[0] not in names, f"{path}:{line}"
            assert not name.startswith("detectron2.model_zoo"), f"{path}:{line}"


@pytest.mark.parametrize(
    "source",
    [
        "from ..meta_arch import SparseDetector",
        "from .. import meta_arch",
        "import asag.engine.trainer",
        "def f():\n    from ...engine import trainer",
        "from asag import load_config",
    ],
)
def test_the_test_sees_imports_that_go_up(source):
    assert upward(source, "asag.modeling.neck.build")


@pytest.mark.parametrize(
    "source", ["from ..layers import boxes", "from ...structures import Targets", "import torch"]
)
def test_the_test_allows_imports_that_go_down(source):
    assert not upward(source, "asag.modeling.neck.build")
