#!/usr/bin/env python
"""Train or evaluate a detector; `train_net.py --help` shows how, `asag.engine.commands` does it."""

import sys

from asag.engine.commands import main

if __name__ == "__main__":
    sys.exit(main())
