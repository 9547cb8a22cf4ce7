"""What a training does where torchrun starts its processes again (`--max-restarts`).

torchrun keeps the key-value store of a job over restarts. A new process must neither take what a
dead predecessor left in it for an address, nor start the training anew.
"""

from __future__ import annotations

import json
import logging
import os
import time
import uuid
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from detectron2.utils import comm

LAST = "last_checkpoint"
EARLIER = "last_checkpoint_of_earlier_run"
POLL = 0.02  # seconds between two looks at the store

logger = logging.getLogger(__name__)


def fresh_store(
    store: dist.Store, rank: int, world_size: int, timeout: timedelta
) -> dist.PrefixStore:
    """A part of a store that no earlier process has written to, the same for all ranks.

    Every rank leaves a random word. Rank 0 answers with a name for the new part and the words it
    has read, again and again, until each rank has found its own word in the answer and said so.
    Leftovers cannot be mistaken for this: nobody alive has said those words.

    Args:
        store: shared by all ranks.
        rank: of this process.
        world_size: number of ranks.
        timeout: how long to wait for the others.

    Raises:
        TimeoutError: a rank did not come.
    """
    word = uuid.uuid4().hex
    store.set(f"word/{rank}", word)
    deadline = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < deadline:
        if rank == 0:
            words = [_read(store, f"word/{other}") for other in range(world_size)]
            store.set("answer", json.dumps([word, words]))
            said = [_read(store, f"agreed/{other}") for other in range(1, world_size)]
            if all(name == word for name in said):
                return dist.PrefixStore(word, store)
        else:
            name, words = json.loads(_read(store, "answer") or '["", []]')
            if len(words) == world_size and words[rank] == word:
                store.set(f"agreed/{rank}", name)
                return dist.PrefixStore(name, store)
        time.sleep(POLL)
    raise TimeoutError(
        f"process {rank} of {world_size} waited {timeout} for the others: see why they did not "
        "start, and whether this machine reaches theirs"
    )


def _read(store: dist.Store, key: str) -> str:
    """A value, empty if there is none (`get` alone would wait for it)."""
    return store.get(key).decode() if store.check([key]) else ""


def resume_if_restarted(output_dir: str, resume: bool) -> bool:
    """Whether to resume: when asked for, or when torchrun has restarted any of the processes.

    A job that may be restarted and starts anew in the folder of an earlier run first sets that
    run's mark aside (as `last_checkpoint_of_earlier_run`); otherwise a failure before the first
    checkpoint would go on with the earlier run. All processes have to call this.

    Args:
        output_dir: OUTPUT_DIR.
        resume: whether --resume was given.
    """
    # Agents count the failures of their own machine only.
    restarts = max(comm.all_gather(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))))
    if resume or restarts:
        return True
    mark = Path(output_dir) / LAST
    may_restart = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0
    if may_restart and comm.is_main_process() and mark.is_file():
        mark.replace(mark.with_name(EARLIER))
        logger.warning(f"{mark} is now called {EARLIER}: restarts go on with the new run")
    comm.synchronize()
    return False
