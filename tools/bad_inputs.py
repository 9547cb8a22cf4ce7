#!/usr/bin/env python
"""Feeds malformed images, annotations, configurations and checkpoints and checks the outcome.

    python tools/bad_inputs.py                              # all cases, a summary
    python tools/bad_inputs.py --markdown docs/bad_inputs.md  # writes the table of the cases

Each case declares its outcome: the input is handled as the table describes, or it ends in an error
that the command line prints without a traceback, raised by this library, that names the file, key
or entry and says what to do. A case fails if it hangs, ends otherwise, or loses something silently.
Cases are generated from a seed; they are in `tests/bad_input_cases/`.

Exit code: 0 if every case ended as declared, 1 with a list otherwise.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from checkout import import_from_tests


def main() -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument("--only", metavar="KIND", help="run the cases of one kind")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table and stop")
    args = parser.parse_args()
    battery = import_from_tests("bad_input_cases.battery")
    cases = battery.all_cases(args.seed)
    if args.markdown:
        args.markdown.write_text(battery.markdown(cases))
        return 0
    if args.only:
        kinds = sorted({case.kind for case in cases})
        if args.only not in kinds:
            parser.error(f"--only {args.only}: the kinds are {', '.join(kinds)}")
        cases = [case for case in cases if case.kind == args.only]
    start = time.monotonic()
    failed = battery.failures(cases)
    print(battery.summary(cases))
    for problem in failed:
        print(f"FAILED {problem}")
    print(f"{len(failed)} of {len(cases)} cases failed, {time.monotonic() - start:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
