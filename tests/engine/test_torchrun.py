"""torchrun with two processes: the losses of one process, death of one of them, restarts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from engine_support import CONFIG, tiny_options, write_coco_folder
from recorded_training import PROCESS_FILE, read_losses
from torch.distributed import HashStore

from asag.engine import launch
from asag.engine.launch import EARLIER, fresh_store, resume_if_restarted

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
START = 300  # seconds that a busy machine may take to start two processes
GONE = 60  # seconds after the death of one process in which all others have to be gone
STEPS = 30  # enough for one process to die in the middle


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_coco_folder(tmp_path_factory.mktemp("torchrun") / "mine")


def arguments(data: Path, output: Path, **changes: object) -> list[str]:
    # SGD, because AdamW's first steps turn the sign of a gradient that is mere rounding into a
    # whole step; and slowly, because a matching that rounding decides sends two runs apart.
    settings = {"SOLVER__OPTIMIZER": "SGD", "SOLVER__BASE_LR": 0.0005}
    settings |= {"SOLVER__CHECKPOINT_PERIOD": 1, **changes}
    options = tiny_options(output, **settings)
    return ["--config-file", str(CONFIG), "--data", str(data), *options]


@contextmanager
def started(command: list[str], log: Path) -> Iterator[subprocess.Popen]:
    """A program in a session of its own, of which nothing is left at the end."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with open(log, "w") as file:
        job = subprocess.Popen(
            command, stdout=file, stderr=file, env=environment, start_new_session=True
        )
    try:
        yield job
    finally:
        if job.poll() is None:
            job.terminate()  # torchrun passes it on; after SIGKILL its workers would live on
            job.wait(GONE)


def wait_for(condition: Callable[[], bool], job: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + START
    while not condition():
        assert job.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.05)


def process(folder: Path, rank: int) -> int:
    return int((folder / PROCESS_FILE.format(rank=rank)).read_text())


def alive(pid: int) -> bool:
    """Returns True if a process runs; one that has ended and waits to be noticed does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def ready(folder: Path) -> Callable[[], bool]:
    """Returns a check that both processes train and a checkpoint is written."""
    names = ["last_checkpoint", *(PROCESS_FILE.format(rank=rank) for rank in (0, 1))]
    return lambda: all((folder / name).is_file() for name in names)


def test_restart_goes_on_and_losses_equal_those_of_one_process(data, tmp_path):
    one, two, log = tmp_path / "one", tmp_path / "two", tmp_path / "log.txt"
    tool = str(ROOT / "tools/recovery/recorded_training.py")
    changes = {"SOLVER__MAX_ITER": STEPS}
    command = [*TORCHRUN, "--max-restarts", "1", tool, *arguments(data, two, **changes)]
    with started(command, log) as job:
        wait_for(ready(two), job, log)
        os.kill(process(two, 1), signal.SIGKILL)
        assert job.wait(START) == 0, log.read_text()[-3000:]
    said = (two / "log.txt").read_text()
    assert "resumed at iteration" in said
    assert (two / "model_final.pth").is_file()

    with started([sys.executable, tool, *arguments(data, one, **changes)], log) as job:
        assert job.wait(START) == 0, log.read_text()[-3000:]
    expected = dict(read_losses(one))
    found = read_losses(two)
    assert set(dict(found)) == set(expected) == set(range(STEPS))
    # Sums over images in another order: rounding at first, which grows from step to step.
    early = [loss / expected[iteration] for iteration, loss in found if iteration < 10]
    np.testing.assert_allclose(early, 1, rtol=1e-5)
    np.testing.assert_allclose([x / expected[i] for i, x in found], 1, rtol=1e-2)


@pytest.mark.parametrize("launcher", ["torchrun", "train_net"])
def test_death_of_one_process_ends_the_job(data, tmp_path, launcher):
    out, log = tmp_path / "out", tmp_path / "log.txt"
    words = arguments(data, out, SOLVER__MAX_ITER=100000)
    if launcher == "torchrun":
        command = [*TORCHRUN, str(ROOT / "tools/recovery/recorded_training.py"), *words]
    else:
        command = [sys.executable, str(ROOT / "train_net.py"), "--num-gpus", "2", *words]
    with started(command, log) as job:
        if launcher == "torchrun":
            wait_for(ready(out), job, log)
            workers = [process(out, rank) for rank in (0, 1)]
        else:
            wait_for((out / "last_checkpoint").is_file, job, log)
            workers = spawned(job.pid)
        assert len(workers) == 2 and all(alive(pid) for pid in workers)
        os.kill(workers[1], signal.SIGKILL)
        assert job.wait(GONE) != 0
        assert not any(alive(pid) for pid in workers)


def spawned(parent: int) -> list[int]:
    """Processes that multiprocessing has spawned for a parent, by rising id."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent_id = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent_id == parent and b"spawn_main" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except FileNotFoundError:
            continue
    return sorted(found)


def test_a_restart_resumes(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    assert not resume_if_restarted(str(tmp_path), False)
    assert resume_if_restarted(str(tmp_path), True)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert resume_if_restarted(str(tmp_path), False)


def test_a_restart_of_any_process_resumes_all(tmp_path, monkeypatch):
    monkeypatch.setattr(launch.comm, "all_gather", lambda mine: [mine, 1, 0])
    assert resume_if_restarted(str(tmp_path), False)


@pytest.mark.parametrize(
    ("max_restarts", "resume", "kept"), [("2", False, False), ("0", False, True), ("2", True, True)]
)
def test_a_new_start_sets_the_earlier_run_aside(tmp_path, monkeypatch, max_restarts, resume, kept):
    """So that a restart before the first checkpoint does not go on with it."""
    (tmp_path / "last_checkpoint").write_text("model_final.pth")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", max_restarts)
    assert resume_if_restarted(str(tmp_path), resume) == resume
    assert (tmp_path / "last_checkpoint").is_file() == kept
    assert (tmp_path / EARLIER).is_file() != kept


def test_leftovers_of_dead_processes_are_not_read():
    """Three generations over one store; in the second, a process dies before it has agreed."""
    store = HashStore()
    names = set()
    for _ in range(2):
        with ThreadPoolExecutor(3) as pool:
            wait = timedelta(seconds=60)
            # The later ranks come first and find what the generation before has left.
            parts = [pool.submit(fresh_store, store, rank, 3, wait) for rank in (2, 1, 0)]
        for rank, part in zip((2, 1, 0), parts, strict=True):
            assert not part.result().check(["address"])
            part.result().set(f"address{rank}", "here")
        parts = [part.result() for part in parts]
        assert all(part.check([f"address{rank}" for rank in range(3)]) for part in parts)
        names.add(store.get("answer"))
        with pytest.raises(TimeoutError, match="process 1 of 3"):
            fresh_store(store, 1, 3, timedelta(seconds=0.1))
    assert len(names) == 2
