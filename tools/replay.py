#!/usr/bin/env python
"""Repeats a training step with non-finite numbers and names the module where they appear first.

    python tools/replay.py OUTPUT_DIR/non_finite_0001234.pth

Training writes the file at such a step: its images, the weights before it, and the random state.
Exit code 0: the step has the same result as in training; 1: it has another; 2: there is no such
file.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from asag.diagnostics.replay import load_step, replay, report


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="non_finite_<iteration>.pth")
    parser.add_argument("--device", help="cpu or cuda; default: as in training, if available")
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
