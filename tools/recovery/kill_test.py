#!/usr/bin/env python
"""Kills training with SIGKILL repeatedly, resumes it, and compares with an uninterrupted run.

    python tools/recovery/kill_test.py --kills 50

A tiny detector trains on generated images with a checkpoint after every iteration. Each attempt is
a process of its own, which runs train_net.py with --resume and is killed at a random instant of one
of three kinds:

    saving    while a scratch file is being written (more than half of the kills)
    training  some time after an iteration
    starting  before the first iteration

After every kill the last checkpoint must be complete. At the end every loss of every attempt, the
final weights and the evaluation must equal those of the uninterrupted run bit for bit, and no
unfinished checkpoint may be left. Attempts are forked from a process that has imported everything
and started no thread, so that one takes a second or two instead of ten.

Exit code: 0 if all of this holds, 1 with a list of the problems.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from asag.checkpoint.checkpointer import SCRATCH_FILES
from asag.data import ShapesSpec
from asag.data.shapes import make_shapes

import torch
from recorded_training import main as train
from recorded_training import read_losses

CONFIG = "SparseRCNN/sparse_rcnn_tiny.yaml"
CHECKPOINT_PERIOD = 1  # iterations
KINDS = {"saving": 0.6, "training": 0.3, "starting": 0.1}  # probabilities
TIMEOUT = 1800.0  # seconds of an attempt; an idle machine needs a minute at most

OPTIONS = {
    "MODEL.DEVICE": "cpu",
    "MODEL.SLIM_RESNET.WIDTH": 16,
    "MODEL.FPN.OUT_CHANNELS": 16,
    "MODEL.PROPOSAL_GENERATOR.NUM_QUERIES": 6,
    "MODEL.DECODER.NUM_STAGES": 2,
    "MODEL.DECODER.HIDDEN_DIM": 16,
    "MODEL.DECODER.NUM_HEADS": 2,
    "MODEL.DECODER.FFN_DIM": 16,
    "MODEL.DECODER.DYNAMIC_DIM": 4,
    "MODEL.DECODER.DROPOUT": 0.1,  # so that the losses depend on the random state
    "DATALOADER.NUM_WORKERS": 0,
    "INPUT.MIN_SIZE_TRAIN": "(48, 64)",
    "INPUT.MAX_SIZE_TRAIN": 80,
    "INPUT.MIN_SIZE_TEST": 64,
    "INPUT.MAX_SIZE_TEST": 80,
    "SOLVER.EPOCHS": 0.0,
    "SOLVER.WARMUP_ITERS": 10,
    "SOLVER.CHECKPOINT_PERIOD": CHECKPOINT_PERIOD,
    "TEST.NUM_PICTURES": 0,
    "SEED": 7,
}


@dataclass
class Outcome:
    """Result of the test.

    Attributes:
        kills: by kind; an attempt that finished first is not counted.
        mid_write: kills that left an unfinished scratch file behind.
        redone: iterations that were trained more than once.
        iterations: length of the run.
        problems: one sentence for each violated condition.
    """

    kills: collections.Counter[str]
    mid_write: int
    redone: int
    iterations: int
    problems: list[str]

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.kills.items()))
        lines = [
            f"{self.kills.total()} kills ({kinds}), {self.mid_write} of them left an unfinished "
            f"file; {self.iterations} iterations, {self.redone} done again",
            *(f"PROBLEM: {problem}" for problem in self.problems),
        ]
        verdict = "the killed run differs" if self.problems else "equal to the uninterrupted run"
        return "\n".join([*lines, verdict])


def run(kills: int, seed: int, folder: Path) -> Outcome:
    """Runs the whole test.

    Args:
        kills: number of kills.
        seed: of kinds and instants (the scheduler adds its own randomness).
        folder: empty; gets data, both runs and a log of each attempt.
    """
    torch.set_num_threads(1)  # a process with threads cannot be forked
    data = _make_data(folder)
    iterations = CHECKPOINT_PERIOD * (kills + 6)
    whole, broken = folder / "whole", folder / "broken"
    rng = random.Random(seed)
    outcome = Outcome(collections.Counter(), 0, 0, iterations, [])

    code = _wait(_start(data, whole, iterations, folder / "whole.log"))
    if code != 0:
        raise RuntimeError(f"the uninterrupted run failed: see {folder / 'whole.log'}")
    attempt, unfinished = 0, set()
    while outcome.kills.total() < kills:
        attempt += 1
        # The earliest instant moves forward with every kill, so that the run makes progress.
        earliest = CHECKPOINT_PERIOD * outcome.kills.total()
        kind = rng.choices(list(KINDS), weights=list(KINDS.values()))[0]
        log = folder / f"attempt{attempt}.log"
        child = _start(data, broken, iterations, log)
        _await_instant(child, kind, earliest, broken, rng)
        if _finished(child):
            outcome.problems.append(f"attempt {attempt} ended by itself: see {log}")
            break
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        outcome.kills[kind] += 1
        unfinished, known = set(broken.glob(SCRATCH_FILES)), unfinished
        outcome.mid_write += bool(unfinished - known)
        if problem := broken_checkpoint(broken):
            outcome.problems.append(f"after kill {outcome.kills.total()} ({kind}): {problem}")
            break
    if not outcome.problems:
        log = folder / "last.log"
        if _wait(_start(data, broken, iterations, log)) != 0:
            outcome.problems.append(f"the last attempt failed: see {log}")
        outcome.problems += differences(whole, broken)
    outcome.redone = len(read_losses(broken)) - len(dict(read_losses(broken)))
    return outcome


def broken_checkpoint(folder: Path) -> str | None:
    """Describes the fault of the checkpoint that --resume would load; None if there is no fault."""
    tag = folder / "last_checkpoint"
    if not tag.is_file():
        return None
    path = folder / tag.read_text()
    try:
        state = torch.load(path, weights_only=True)
        iteration = state["trainer"]["iteration"]
        finite = all(torch.isfinite(v).all() for v in state["model"].values())
    except Exception as error:  # of any kind: the checkpoint cannot be read
        return f"{path} cannot be read: {type(error).__name__}: {error}"
    if path.stem != "model_final" and path.stem != f"model_{iteration:07d}":
        return f"{path} holds iteration {iteration}"
    return None if finite else f"{path} holds numbers that are not finite"


def differences(whole: Path, broken: Path) -> list[str]:
    """Lists the differences between the finished run `broken` and the uninterrupted one."""
    expected = dict(read_losses(whole))
    found = read_losses(broken)
    problems = [
        f"loss of iteration {iteration} is {loss!r}, not {expected.get(iteration)!r}"
        for iteration, loss in found
        if loss != expected.get(iteration)
    ]
    missing = sorted(expected.keys() - dict(found).keys())
    if missing:
        problems.append(f"no loss of iterations {missing}")
    ours, theirs = (_weights(run) for run in (broken, whole))
    changed = [name for name in theirs if not torch.equal(ours[name], theirs[name])]
    if changed:
        problems.append(f"{len(changed)} final weights differ, first {changed[0]}")
    results = "inference/coco_instances_results.json"
    if (whole / results).read_bytes() != (broken / results).read_bytes():
        problems.append("the final detections differ")
    problems += [f"{path} is left over" for path in broken.glob(SCRATCH_FILES)]
    for number, line in enumerate((broken / "metrics.json").read_text().splitlines(), start=1):
        try:
            json.loads(line)
        except ValueError:
            problems.append(f"line {number} of metrics.json is cut short")
    return problems


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "model_final.pth", weights_only=True)["model"]


def _make_data(folder: Path) -> Path:
    spec = ShapesSpec(
        name="kill_test",
        class_names=("circle", "square"),
        height=64,
        width=80,
        objects=(1, 3),
        sizes=(0.3, 0.7),
        images=(("train", 10), ("val", 2)),
    )
    data = folder / "data"
    for split in ("train", "val"):
        shutil.copytree(make_shapes(spec, split, folder / "cache"), data / split)
    return data


def _start(data: Path, output: Path, iterations: int, log: Path) -> int:
    """Forks a process that trains; returns its id."""
    options = OPTIONS | {"SOLVER.MAX_ITER": iterations, "OUTPUT_DIR": output}
    words = [str(word) for pair in options.items() for word in pair]
    arguments = ["--config-file", CONFIG, "--data", str(data), "--resume", *words]
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, 1)
        os.dup2(file, 2)
        code = train(arguments)
    except BaseException:
        traceback.print_exc()
    finally:  # an exception must not return into the code of the parent
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _await_instant(child: int, kind: str, earliest: int, folder: Path, rng: random.Random) -> None:
    """Waits for the instant to kill, or for the end of the child.

    "saving" and "training" wait until `earliest` iterations are done.
    """
    deadline = time.monotonic() + TIMEOUT

    def reached() -> bool:
        done = max((i + 1 for i, _ in read_losses(folder)), default=0)
        return done >= earliest and _seen_in(folder) > before

    before = _seen_in(folder)
    stale = set(folder.glob(SCRATCH_FILES))
    if kind == "starting":
        time.sleep(rng.uniform(0, 0.5))
        return
    while not reached() and not _finished(child):
        _tick(deadline, 0.005)
    if kind == "training":
        time.sleep(rng.uniform(0, 0.2))
        return
    while not set(folder.glob(SCRATCH_FILES)) - stale and not _finished(child):
        _tick(deadline, 0.0002)
    time.sleep(rng.choice([0.0, rng.uniform(0, 0.005), rng.uniform(0, 0.1)]))


def _seen_in(folder: Path) -> int:
    """Counts the recorded losses, which grow with every iteration of an attempt."""
    return len(read_losses(folder))


def _finished(child: int) -> bool:
    """Returns True if a child has ended; it can still be waited for."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _wait(child: int) -> int:
    deadline = time.monotonic() + TIMEOUT
    while not _finished(child):
        try:
            _tick(deadline, 0.02)
        except TimeoutError:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _tick(deadline: float, seconds: float) -> None:
    if time.monotonic() > deadline:
        raise TimeoutError(f"an attempt took more than {TIMEOUT:.0f} s")
    time.sleep(seconds)


def main() -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="default 50")
    parser.add_argument("--seed", type=int, default=0, help="of kinds and instants, default 0")
    parser.add_argument("--folder", type=Path, help="keeps the runs; must not exist yet")
    args = parser.parse_args()
    if args.kills < 1:
        parser.error(f"--kills {args.kills}: need 1 or more")
    start = time.monotonic()
    if args.folder:
        args.folder.mkdir(parents=True)
        outcome = run(args.kills, args.seed, args.folder.resolve())
    else:
        with tempfile.TemporaryDirectory(prefix="kill_test_") as folder:
            outcome = run(args.kills, args.seed, Path(folder))
    print(f"{outcome}\n{time.monotonic() - start:.0f} s")
    return 1 if outcome.problems else 0


if __name__ == "__main__":
    sys.exit(main())
