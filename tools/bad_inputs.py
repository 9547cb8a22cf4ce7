#!/usr/bin/env python
"""Feeds malformed images, annotations, configurations and checkpoints, and checks what is said.

    python tools/bad_inputs.py                              # all cases, a summary
    python tools/bad_inputs.py --markdown docs/bad_inputs.md  # writes the table of the cases

Each case declares what has to become of it: it is handled, in the way the table says, or it ends in
an error of a kind that the command line prints without a traceback, raised by this library, that
names the file, key or entry and what to do. A case fails if it hangs, ends otherwise, or loses
something without telling. Cases are generated from a seed.

Exit code: 0 if every case ended as declared, 1 with a list otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bad_input_cases import (
    annotations,
    checkpoints,
    command_line,
    configuration,
    crowdhuman,
    formats,
    images,
)
from bad_input_cases.common import Case, judge

SUITES = (images, annotations, formats, crowdhuman, configuration, checkpoints, command_line)
INTRODUCTION = """\
# Malformed inputs

What happens to broken images, data sets, configurations and checkpoints. `handled` goes on
as described; `error` stops with exit code 2 and a message that names the file, key or entry and
says what to do about it. Nothing is dropped without being counted in the report of the data.

Made by `python tools/bad_inputs.py --markdown docs/bad_inputs.md` from the cases that
`python tools/bad_inputs.py` runs.
"""


def all_cases(seed: int = 0) -> list[Case]:
    """Every case of every kind; the seed chooses places and garbage, never how many there are."""
    found = [case for suite in SUITES for case in suite.cases(seed)]
    names = Counter((case.kind, case.title, case.name) for case in found)
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise ValueError(f"cases with the same name: {twice}")
    return found


def failures(cases: list[Case]) -> list[str]:
    """Runs cases one after the other; a sentence for each that did not end as declared."""
    found = []
    with tempfile.TemporaryDirectory(prefix="bad_inputs_") as root:
        for number, case in enumerate(cases):
            folder = Path(root) / str(number)
            folder.mkdir()
            with _silence():
                problem = judge(case, folder)
            if problem is not None:
                found.append(f"{case.kind}: {case.title} ({case.name}) {problem}")
    return found


@contextlib.contextmanager
def _silence():
    """Reports and warnings of hundreds of cases would bury the summary."""
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def summary(cases: list[Case]) -> str:
    """Cases by kind and declared outcome."""
    lines = [f"{'kind':<16} {'handled':>8} {'error':>8} {'all':>8}"]
    kinds = list(dict.fromkeys(case.kind for case in cases))
    for kind in [*kinds, "all"]:
        of_kind = [case for case in cases if kind in (case.kind, "all")]
        handled = sum(case.remedy is None for case in of_kind)
        lines.append(f"{kind:<16} {handled:>8} {len(of_kind) - handled:>8} {len(of_kind):>8}")
    return "\n".join(lines)


def markdown(cases: list[Case]) -> str:
    """The table of the documentation: a row for each title."""
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


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument("--only", metavar="KIND", help="cases of one kind")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table and stop")
    args = parser.parse_args()
    cases = all_cases(args.seed)
    if args.markdown:
        args.markdown.write_text(markdown(cases))
        return 0
    if args.only:
        kinds = sorted({case.kind for case in cases})
        if args.only not in kinds:
            parser.error(f"--only {args.only}: the kinds are {', '.join(kinds)}")
        cases = [case for case in cases if case.kind == args.only]
    start = time.monotonic()
    found = failures(cases)
    print(summary(cases))
    for problem in found:
        print(f"FAILED {problem}")
    print(f"{len(found)} of {len(cases)} cases failed, {time.monotonic() - start:.0f} s")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
