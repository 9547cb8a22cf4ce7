#!/usr/bin/env python
"""Runs a training step with NaN or infinite numbers again, and shows where they come up.

    python tools/replay.py OUTPUT_DIR/non_finite_0001234.pth

A training writes the file when it meets such a step: its images, the weights before it, and the
random state. Exit code 0: the step came out as in the training; 1: it did not; 2: no such file.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from asag.diagnostics.replay import load_step, replay, report


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="non_finite_<iteration>.pth")
    parser.add_argument("--device", help="cpu or cuda; default: as in the training, if it is here")
    args = parser.parse_args(arguments)
    try:
        state = load_step(args.file)
        found = replay(state, args.device)
    except (ValueError, KeyError, OSError) as error:
        print(f"replay: {error.args[0] if isinstance(error, KeyError) else error}", file=sys.stderr)
        return 2
    print("\n".join(report(state, found)))
    return 0 if found.reproduced else 1


if __name__ == "__main__":
    sys.exit(main())
