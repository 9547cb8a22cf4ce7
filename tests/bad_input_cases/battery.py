"""All cases of malformed input: collecting, running and tabulating them."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import asag  # noqa: F401  registers data sets and components

from . import annotations, checkpoints, command_line, configuration, crowdhuman, formats, images
from .common import Case, judge

SUITES = (images, annotations, formats, crowdhuman, configuration, checkpoints, command_line)
INTRODUCTION = """\
# Malformed inputs

How broken images, data sets, configurations and checkpoints are treated. `handled` means
that the program goes on as described; `error` means that it stops with exit code 2 and a message
that names the file, key or entry and says what to do. Nothing is dropped without being counted in
the report of the data.

Written by `python tools/bad_inputs.py --markdown docs/bad_inputs.md` from the cases that
`python tools/bad_inputs.py` runs.
"""


def all_cases(seed: int = 0) -> list[Case]:
    """Returns every case of every kind.

    Args:
        seed: of positions and random content; it does not change the number of cases.

    Raises:
        ValueError: two cases have the same name.
    """
    cases = [case for suite in SUITES for case in suite.cases(seed)]
    names = Counter((case.kind, case.title, case.name) for case in cases)
    repeated = [name for name, count in names.items() if count > 1]
    if repeated:
        raise ValueError(f"cases with the same name: {repeated}")
    return cases


def failures(cases: list[Case]) -> list[str]:
    """Runs cases one after the other; returns a sentence for each that did not end as declared."""
    sentences = []
    with tempfile.TemporaryDirectory(prefix="bad_inputs_") as root:
        for number, case in enumerate(cases):
            folder = Path(root) / str(number)
            folder.mkdir()
            with _silence():
                problem = judge(case, folder)
            if problem is not None:
                sentences.append(f"{case.kind}: {case.title} ({case.name}) {problem}")
    return sentences


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Suppresses the reports and warnings of the cases, which would hide the summary."""
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def summary(cases: list[Case]) -> str:
    """Counts cases by kind and declared outcome, as a table in plain text."""
    lines = [f"{'kind':<16} {'handled':>8} {'error':>8} {'all':>8}"]
    kinds = list(dict.fromkeys(case.kind for case in cases))
    for kind in [*kinds, "all"]:
        of_kind = [case for case in cases if kind in (case.kind, "all")]
        handled = sum(case.remedy is None for case in of_kind)
        lines.append(f"{kind:<16} {handled:>8} {len(of_kind) - handled:>8} {len(of_kind):>8}")
    return "\n".join(lines)


def markdown(cases: list[Case]) -> str:
    """Returns the page of the documentation, with a row for each title."""
    parts = [INTRODUCTION]
    rows: dict[str, dict[tuple[str, str, str], int]] = {}
    for case in cases:
        outcome = "handled" if case.remedy is None else "error"
        row = (case.title, outcome, case.happens)
        counts = rows.setdefault(case.kind, {})
        counts[row] = counts.get(row, 0) + 1
    for kind, counts in rows.items():
        parts.append(f"## {kind[0].upper()}{kind[1:]}\n")
        parts.append("| input | cases | outcome | what happens |\n|---|---|---|---|")
        for (title, outcome, happens), count in counts.items():
            parts.append(f"| {title} | {count} | {outcome} | {happens} |")
        parts.append("")
    return "\n".join(parts)
