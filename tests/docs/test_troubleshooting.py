"""docs/troubleshooting.md: its tests, messages, keys, options and links are there."""

from __future__ import annotations

import argparse
import ast
import functools
import re
import shlex
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from detectron2.config import CfgNode
from detectron2.utils import comm
from engine_support import CONFIG, register_tiny_shapes, tiny_options, write_coco_folder

import train_net
from asag import get_asag_cfg
from train_net import build_parser, main

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"
SOURCES = ("asag", "tools", "demo")

FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
TEST = re.compile(r"(tests/[\w/]+\.py)::(\w+)")
LINK = re.compile(r"\[[^\]]*\]\(([^)]+)\)")
KEY = re.compile(r"\b[A-Z][A-Z_0-9]*(?:\.[A-Z][A-Z_0-9]*)+\b")
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
PLACEHOLDER = re.compile(r"<[a-z ]+>")
MIN_WORDS = 6  # letters that a part of a message must have to be looked for
TORCHRUN = {"--standalone", "--nproc-per-node", "--max-restarts"}


@pytest.fixture(scope="module")
def page() -> str:
    return PAGE.read_text(encoding="utf-8")


def fenced(page: str, language: str) -> list[str]:
    """Lines in the blocks of a language."""
    blocks = [text for kind, text in FENCE.findall(page) if kind == language]
    return [line.strip() for block in blocks for line in block.splitlines() if line.strip()]


def rows(page: str) -> list[list[str]]:
    """Cells of the first table, without its head."""
    lines = [line for line in page.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def slug(title: str) -> str:
    """Anchor of a heading on the usual hosts."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


# Messages: every string of the program, a formatted one with {} for its values.


@functools.cache
def program_strings() -> tuple[str, ...]:
    found: set[str] = set()
    for folder in SOURCES:
        for path in (ROOT / folder).rglob("*.py"):
            found.update(strings_in(ast.parse(path.read_text(encoding="utf-8"))))
    return tuple(found)


def strings_in(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield words(node.value)
        elif isinstance(node, ast.JoinedStr):
            parts = [x.value if isinstance(x, ast.Constant) else "{}" for x in node.values]
            yield words("".join(parts))


def words(text: str) -> str:
    """With single spaces, and values next to each other as one."""
    return re.sub(r"(\{\}\W{0,2})+\{\}", "{}", " ".join(text.split()))


def is_said(line: str, strings: tuple[str, ...]) -> bool:
    """Returns True if each part of a line, cut at every "...", is inside of one of the strings."""
    parts = [words(PLACEHOLDER.sub("{}", part)) for part in line.split("...")]
    told = [part for part in parts if len(part.replace("{}", "")) > MIN_WORDS]
    return bool(told) and all(any(part in text for text in strings) for part in told)


def test_every_message_is_one_of_the_program(page):
    messages = fenced(page, "message")
    assert len(messages) > 30
    missing = [line for line in messages if not is_said(line, program_strings())]
    assert not missing


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("nothing left to train: <done> of <all> iterations are done.", True),
        ("nothing left to train: <done> of <all> iterations are finished.", False),
        ("<file>", False),
        ("as long as a message of this program, but none of its own", False),
    ],
)
def test_invented_messages_are_noticed(line, said):
    strings = (
        *strings_in(ast.parse('f"nothing left to train: {a} of {b} " f"iterations are done. x"')),
    )
    assert is_said(line, strings) == said


# Everything else that is named.


def test_every_row_has_a_section_and_an_existing_test(page):
    table = rows(page)
    assert len(table) >= 15 and all(len(row) == 4 for row in table)
    for symptom, *_, cell in table:
        assert LINK.search(symptom), f"{symptom}: no section"
        named = TEST.findall(cell)
        assert named, f"{symptom}: no test"
        for file, function in named:
            known = functions_of(ROOT / file) if (ROOT / file).is_file() else ()
            assert function in known, f"{symptom}: no {file}::{function}"


def functions_of(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_links_lead_somewhere(page):
    outside = FENCE.sub("", page)
    anchors = {slug(title) for title in re.findall(r"^## (.+)$", outside, re.MULTILINE)}
    targets = LINK.findall(outside)
    for target in targets:
        if target.startswith("#"):
            assert target[1:] in anchors
        else:
            assert (PAGE.parent / target).exists(), target
    assert anchors == {target[1:] for target in targets if target.startswith("#")}


def test_every_key_exists(page):
    cfg = get_asag_cfg()
    named = set(KEY.findall(page))
    assert len(named) > 20
    missing = {key for key in named if not has_key(cfg, key)}
    assert not missing


def has_key(cfg: CfgNode, key: str) -> bool:
    node = cfg
    for part in key.split("."):
        if not isinstance(node, CfgNode) or part not in node:
            return False
        node = node[part]
    return True


def test_every_option_exists(page):
    text = FENCE.sub("", page)
    named = set(OPTION.findall(text))
    known = TORCHRUN | {"--print-edits"} | train_options()
    known |= {x for path in scripts().values() for x in options_of(path)}
    assert named and named <= known


def test_every_command_fits_its_script(page):
    commands = [shlex.split(line, comments=True) for line in fenced(page, "bash")]
    seen = set()
    for command in commands:
        script = command[1] if command[1] != "-m" else command[2].replace(".", "/") + ".py"
        path = ROOT / script
        assert command[0] == "python" and path.is_file(), command
        seen.add(path.name)
        known = train_options() if path.name == "train_net.py" else options_of(path)
        assert set(OPTION.findall(" ".join(command[2:]))) <= known, command
    assert {"train_net.py", "doctor.py", "replay.py", "export.py", "demo.py"} <= seen


def train_options() -> set[str]:
    actions: list[argparse.Action] = build_parser()._actions
    return {option for action in actions for option in action.option_strings}


def scripts() -> dict[str, Path]:
    paths = [*(ROOT / "tools").rglob("*.py"), ROOT / "demo/demo.py"]
    return {path.name: path for path in paths}


def options_of(path: Path) -> set[str]:
    """Strings in a script that are an option by themselves."""
    return {x for x in strings_in(ast.parse(path.read_text("utf-8"))) if OPTION.fullmatch(x)}


# What the page promises and no other test covers.


def test_a_refused_resume_leaves_the_run_as_it_is(tmp_path, capsys):
    data = ["--config-file", str(CONFIG), "--data", str(write_coco_folder(tmp_path / "mine"))]
    register_tiny_shapes()
    run = tmp_path / "run"
    assert main([*data, *tiny_options(run, SOLVER__MAX_ITER=1)]) == 0
    files = {path: path.read_bytes() for path in run.iterdir() if path.suffix in (".yaml", ".pth")}
    assert run / "config.yaml" in files
    larger = tiny_options(run, SOLVER__MAX_ITER=2, MODEL__DECODER__FFN_DIM=32)
    assert main([*data, "--resume", *larger]) == 2
    assert "tensors have other shapes than in the model" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in files} == files


@pytest.mark.parametrize("first", [True, False])
def test_a_process_that_fails_alone_says_why(tmp_path, monkeypatch, capsys, first):
    """The first process speaks at once, others only if it has not ended them meanwhile."""
    waited = []
    monkeypatch.setattr(comm, "is_main_process", lambda: first)
    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.setattr(train_net, "default_setup", lambda cfg: None)
    args = build_parser().parse_args(["--eval-only", *tiny_options(tmp_path)])
    cfg, recipe = train_net.configure(args)
    assert train_net.run(args, cfg, recipe) == 2
    assert "error: --eval-only needs the weights" in capsys.readouterr().err
    assert waited == ([] if first else [train_net.GRACE])
