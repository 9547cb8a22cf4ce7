"""The console script `asag`: one word for each of the repository's commands."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

_PACKAGE = Path(__file__).resolve().parent
# A checkout has the commands beside the package; an installed package holds copies of them.
INSTALLED = _PACKAGE / "commands"

COMMANDS = {
    "train": ("train_net.py", (), "train on COCO, on your own data, or on generated images"),
    "eval": ("train_net.py", ("--eval-only",), "evaluate weights"),
    "predict": ("demo/demo.py", (), "detect objects in images and videos"),
    "export": ("tools/export.py", (), "write an ONNX file and check it"),
    "report": ("tools/report.py", (), "write the HTML report of a run"),
    "doctor": ("tools/doctor.py", (), "say what this machine has and what is wrong"),
}
"""Word -> file of the repository, arguments in front of the user's, description."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `asag WORD ARGUMENTS`.

    Args:
        argv: arguments; default: those of the process.

    Returns:
        Exit code of the command; 2 for an unknown word.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0
    word, *arguments = words
    if word not in COMMANDS:
        print(f"asag: unknown command {word!r}\n\n{usage()}", file=sys.stderr)
        return 2
    file, first, _ = COMMANDS[word]
    sys.argv = [f"asag {word}", *first, *arguments]
    return load_command(file).main()


def usage() -> str:
    """Returns the list of commands."""
    lines = [f"  {word:<8} {text}" for word, (_, _, text) in COMMANDS.items()]
    return "\n".join(["usage: asag COMMAND ...", "", *lines, "", "asag COMMAND --help says more."])


def load_command(file: str) -> ModuleType:
    """Imports a command by its file in the repository.

    The folder goes on the import path, so that spawned processes find the module as well.
    """
    path = _PACKAGE.parent / file
    if not path.is_file():
        path = INSTALLED / Path(file).name
    sys.path.insert(0, str(path.parent))
    return importlib.import_module(path.stem)
