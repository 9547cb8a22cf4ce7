"""Processes of a run: started here or by torchrun, and restarted by torchrun; NCCL on CUDA, gloo on
a CPU."""

from __future__ import annotations

import json
import logging
import os
import socket
import time
import uuid
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.utils import comm

# A process that waits this long for another one gives up. One that has died is noticed at once; the
# others may still be silent, as long as the first evaluates or a file system is stuck.
TIMEOUT = timedelta(minutes=30)
# Advice of torch to Detectron2 and to this library, which each process would print.
NOISE = ("TypedStorage is deprecated", "`broadcast_buffers` is deprecated")
POLL = 0.02  # seconds between two reads of the store
LAST_CHECKPOINT = "last_checkpoint"
EARLIER = "last_checkpoint_of_earlier_run"
TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

logger = logging.getLogger(__name__)


class _Place(NamedTuple):
    """Rank of a process among all, and among those of its machine."""

    rank: int
    world_size: int
    local_rank: int
    local_size: int


def started_by_torchrun() -> bool:
    """Returns True if the environment names this process's rank in a group."""
    return all(name in os.environ for name in TORCHRUN_VARIABLES)


def launch(
    function: Callable[..., int],
    args: tuple[Any, ...],
    *,
    processes: int,
    machines: int = 1,
    machine_rank: int = 0,
    dist_url: str = "auto",
    cuda: bool = False,
) -> int:
    """Runs `function(*args)` in every process of the training and waits for all of them.

    Under torchrun the group of the environment is joined and the counts are not looked at. A group
    of one process is this process.

    Args:
        function: returns an exit code; must be importable, as the processes are spawned.
        args: picklable.
        processes: of each machine, one a GPU.
        machines: taking part.
        machine_rank: of this one, 0 to machines - 1.
        dist_url: where rank 0 listens, "tcp://host:port"; "auto" is a free port of this machine.
        cuda: one GPU a process and NCCL; otherwise gloo.

    Returns:
        The exit code of this process's call, or of the first spawned process that failed.

    Raises:
        ValueError: counts that do not fit each other, the machine, or the address.
    """
    if started_by_torchrun():
        place = _Place(
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
            local_rank=int(os.environ["LOCAL_RANK"]),
            local_size=int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])),
        )
        return _run_in_group(place, "env://", cuda, function, args)
    if processes < 1 or machines < 1 or not 0 <= machine_rank < machines:
        raise ValueError(
            f"--num-gpus {processes}, --num-machines {machines}, --machine-rank {machine_rank}: "
            "need at least one process and machine, and a rank below the number of machines"
        )
    if processes * machines == 1:
        return function(*args)
    if cuda and processes > torch.cuda.device_count():
        raise ValueError(f"--num-gpus {processes}: there are {torch.cuda.device_count()} here")
    if dist_url == "auto":
        if machines > 1:
            raise ValueError("--num-machines above 1 needs --dist-url tcp://HOST:PORT of machine 0")
        dist_url = f"tcp://127.0.0.1:{_free_port()}"
    first = _Place(machine_rank * processes, machines * processes, 0, processes)
    try:
        mp.spawn(_spawned, (first, dist_url, cuda, function, args), nprocs=processes)
    except mp.ProcessExitedException as error:  # an ordinary exit code, its reason is printed
        return error.exit_code
    return 0


def _spawned(
    local_rank: int,
    first: _Place,
    dist_url: str,
    cuda: bool,
    function: Callable[..., int],
    args: tuple[Any, ...],
) -> None:
    place = first._replace(rank=first.rank + local_rank, local_rank=local_rank)
    code = _run_in_group(place, dist_url, cuda, function, args)
    if code:
        raise SystemExit(code)


def _run_in_group(
    place: _Place,
    dist_url: str,
    cuda: bool,
    function: Callable[..., int],
    args: tuple[Any, ...],
) -> int:
    if cuda:
        torch.cuda.set_device(place.local_rank)
    store, _, _ = next(dist.rendezvous(dist_url, place.rank, place.world_size, timeout=TIMEOUT))
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=fresh_store(store, place.rank, place.world_size, TIMEOUT),
        rank=place.rank,
        world_size=place.world_size,
        timeout=TIMEOUT,
    )
    try:
        _make_local_group(place.local_size)
        with warnings.catch_warnings():
            for message in NOISE:
                warnings.filterwarnings("ignore", message)
            return function(*args)
    finally:
        dist.destroy_process_group()


def _make_local_group(local_size: int) -> None:
    """Tells Detectron2 which processes share this machine."""
    if hasattr(comm, "create_local_process_group"):
        comm.create_local_process_group(local_size)
        return
    # v0.5 has no function for it; its own launcher sets the variable like this.
    for first in range(0, dist.get_world_size(), local_size):
        group = dist.new_group(list(range(first, first + local_size)))
        if first <= dist.get_rank() < first + local_size:
            comm._LOCAL_PROCESS_GROUP = group


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def fresh_store(
    store: dist.Store, rank: int, world_size: int, timeout: timedelta
) -> dist.PrefixStore:
    """Returns a part of a store that no earlier process has written to, the same for all ranks.

    torchrun keeps the key-value store of a job when it restarts the processes, and without this
    gloo connects to addresses of dead processes. Every rank writes a random word. Rank 0 answers
    with a name for the new part and the words it has read, repeatedly, until each rank has found
    its own word in the answer and confirmed it. Leftovers cannot be mistaken for this: no running
    process has written those words.

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
    """Returns a value, empty if there is none (`get` alone would wait for it)."""
    return store.get(key).decode() if store.check([key]) else ""


def resume_if_restarted(output_dir: str, resume: bool) -> bool:
    """Returns True to resume: on request, or if torchrun has restarted any of the processes.

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
    mark = Path(output_dir) / LAST_CHECKPOINT
    may_restart = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0
    if may_restart and comm.is_main_process() and mark.is_file():
        mark.replace(mark.with_name(EARLIER))
        logger.warning(f"{mark} is now called {EARLIER}: restarts go on with the new run")
    comm.synchronize()
    return False
