#!/usr/bin/env python
"""Compares this library with tensors made by the reference implementations.

    python tools/verify.py DIR

DIR is a folder of suites (`sparse_rcnn/`, `iou_sparse_rcnn/`, `mmdet/`, `ota/`, ...) or one
suite. Each case is rebuilt with this library's modules, the weights in their published layout go
through the checkpoint mapping, and every tensor is compared. One line is printed for each tensor:
case, tensor, largest absolute error, tolerance, verdict. The exit code is 1 if a comparison fails
or a case is not recognized. The suites are in `tests/conformance/`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from checkout import import_from_tests


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--quiet", action="store_true", help="print failures and the summary only")
    options = parser.parse_args(arguments)
    return import_from_tests("conformance.runner").verify_folder(options.folder, options.quiet)


if __name__ == "__main__":
    sys.exit(main())
