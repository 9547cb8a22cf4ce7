#!/usr/bin/env python
"""Train or evaluate a detector; `train_net.py --help` shows how, `asag.engine.launch` does it."""

import sys
import warnings

# fvcore's losses are scripted; torch's advice is for its authors, not for those who train.
warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)

from asag.engine.launch import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
