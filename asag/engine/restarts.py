"""Processes that torchrun starts again after a failure (`--max-restarts`) go on by themselves."""

from __future__ import annotations

import os
from pathlib import Path

from .processes import started_by_torchrun

LAST = "last_checkpoint"
EARLIER = "last_checkpoint_of_earlier_run"


def resume_if_restarted(output_dir: str, resume: bool) -> bool:
    """Whether to resume: when asked for, or when torchrun has restarted this process.

    A job that may be restarted and starts anew in the folder of an earlier run first sets that
    run's mark aside (as `last_checkpoint_of_earlier_run`); otherwise a failure before the first
    checkpoint would go on with the earlier run.

    Args:
        output_dir: OUTPUT_DIR, seen by all processes.
        resume: whether --resume was given.
    """
    if resume or not started_by_torchrun():
        return resume
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0:
        return True
    may_restart = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0
    mark = Path(output_dir) / LAST
    if may_restart and os.environ["RANK"] == "0" and mark.is_file():
        mark.replace(mark.with_name(EARLIER))
    return False
