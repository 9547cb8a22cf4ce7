"""Writers of a run's numbers: console, metrics.json, TensorBoard, Weights & Biases."""

from __future__ import annotations

import datetime
import importlib
import importlib.util
import logging
import os
import re
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import yaml
from detectron2.config import CfgNode
from detectron2.utils.events import (
    EventStorage,
    EventWriter,
    JSONWriter,
    TensorboardXWriter,
    get_event_storage,
)
from fvcore.common.history_buffer import HistoryBuffer

from ..files import atomic_writer
from .memory import GIB, resident_peak

# Losses of earlier stages end with a digit; those of the last stage and the generator do not.
EARLIER_STAGE = re.compile(r"_\d+$")
WINDOW = 20  # steps over which values are smoothed (median)
PACE_WINDOW = 1000  # steps from which the speed is estimated (median)
RUN_FILE = "wandb_run.txt"  # in OUTPUT_DIR: id of the Weights & Biases run, to resume it
ITERATION = "iteration"  # x axis of all curves on Weights & Biases
ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")  # terminal colors and the like (ECMA-48, 5.4)

logger = logging.getLogger(__name__)


class ConsolePrinter(EventWriter):
    """Logs a line of progress: iteration, epoch, losses, learning rate, speed, ETA, memory."""

    def __init__(self, *, max_iter: int, iters_per_epoch: float) -> None:
        """
        Args:
            max_iter: iterations of the run.
            iters_per_epoch: iterations of one pass over the data.
        """
        self._max_iter = max_iter
        self._iters_per_epoch = iters_per_epoch
        self._last_iter = -1

    def write(self) -> None:
        """Logs the line, at most once an iteration."""
        storage = get_event_storage()
        done = storage.iter + 1
        if storage.iter <= self._last_iter or done > self._max_iter:
            return
        losses = storage.histories().get("total_loss")
        if losses is None or losses.values()[-1][1] != storage.iter:
            return  # the step was not completed
        self._last_iter = storage.iter
        logger.info(self._line(storage, done))

    def _line(self, storage: EventStorage, done: int) -> str:
        histories = storage.histories()
        parts = [f"{done}/{self._max_iter} (epoch {done / self._iters_per_epoch:.2f})"]
        terms = [
            f"{name.removeprefix('loss_')} {history.median(WINDOW):.3g}"
            for name, history in histories.items()
            if name.startswith("loss_") and not EARLIER_STAGE.search(name)
        ]
        total = histories["total_loss"].median(WINDOW)
        parts.append(f"loss {total:.4g} ({', '.join(terms)})")
        if "lr" in histories:
            parts.append(f"lr {histories['lr'].latest():.3g}")
        if "time" in histories:
            seconds = histories["time"].median(PACE_WINDOW)
            waiting = histories["data_time"].median(WINDOW) if "data_time" in histories else 0.0
            left = time_left(histories, self._max_iter - done)
            parts.append(f"{seconds:.3f} s/iter (data {waiting:.3f})  eta {left}")
        parts.append(f"mem {peak_memory_gib():.1f} GiB")
        return "  ".join(parts)


def time_left(histories: Mapping[str, HistoryBuffer], iterations: int) -> datetime.timedelta | None:
    """Estimates the time for the remaining iterations, in whole seconds.

    Args:
        histories: of an `EventStorage`, with "time".
        iterations: to go.

    Returns:
        None before the first iteration was timed.
    """
    if "time" not in histories:
        return None
    return datetime.timedelta(seconds=int(histories["time"].median(PACE_WINDOW) * iterations))


def peak_memory_gib() -> float:
    """Peak memory so far: of the CUDA device if one is in use, else of the process."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / GIB
    return resident_peak() / GIB


def import_wandb(project: str) -> ModuleType:
    """Imports the package wandb.

    Args:
        project: LOGGING.WANDB.

    Raises:
        ValueError: the package is not installed.
    """
    try:
        wandb = importlib.import_module("wandb")
        wandb.init  # noqa: B018  (a folder of that name can be imported too)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"LOGGING.WANDB is {project!r}, but the package wandb cannot be used ({error}): "
            "pip install wandb, or leave LOGGING.WANDB empty"
        ) from error
    return wandb


class WandbWriter(EventWriter):
    """Sends all scalars to a run of Weights & Biases, which starts with the first of them.

    A run continued with `--resume` continues its Weights & Biases run, whose id is stored in
    OUTPUT_DIR. The environment variables of wandb apply, such as WANDB_MODE=offline.
    """

    def __init__(
        self, *, project: str, output_dir: str, config: Mapping[str, Any], window: int
    ) -> None:
        """
        Args:
            project: LOGGING.WANDB.
            output_dir: OUTPUT_DIR, whose name becomes the name of the run.
            config: stored with the run.
            window: steps over which values are smoothed (median).

        Raises:
            ValueError: wandb is not installed.
        """
        self._wandb = import_wandb(project)
        self._project = project
        self._folder = Path(output_dir)
        self._config = dict(config)
        self._window = window
        self._run: Any = None
        self._last = -1

    def write(self) -> None:
        """Sends the scalars that are new since the last call.

        Raises:
            ValueError: the run could not be started.
        """
        storage = get_event_storage()
        latest = storage.latest_with_smoothing_hint(self._window)
        new: dict[int, dict[str, float]] = defaultdict(dict)
        for name, (value, iteration) in latest.items():
            if iteration > self._last:
                new[iteration][name] = value
        if not new:
            return
        if self._run is None:
            self._run = self._start(resumed=_first_iteration(storage) > 0)
        for iteration in sorted(new):
            # Not as wandb's own step, which must not decrease: a resumed run starts before the
            # last iteration that was sent.
            self._run.log({ITERATION: iteration, **new[iteration]})
        self._last = max(new)

    def close(self) -> None:
        """Ends the run, as failed if an exception is being handled."""
        if self._run is not None:
            self._run.finish(exit_code=int(sys.exc_info()[0] is not None))
            self._run = None

    def _start(self, *, resumed: bool) -> Any:
        file = self._folder / RUN_FILE
        known = file.read_text(encoding="utf-8").strip() if resumed and file.is_file() else None
        again = {"id": known, "resume": "allow"} if known else {}
        try:
            run = self._wandb.init(
                project=self._project,
                name=self._folder.resolve().name,
                dir=str(self._folder),
                config=self._config,
                **again,
            )
        except Exception as error:
            raise ValueError(
                f"LOGGING.WANDB is {self._project!r}, but the run could not be started: {error}. "
                "Log in with `wandb login`, or set the environment variable WANDB_MODE=offline, or "
                "leave LOGGING.WANDB empty"
            ) from error
        with atomic_writer(file) as out:
            out.write(f"{run.id}\n")
        run.define_metric(ITERATION)
        run.define_metric("*", step_metric=ITERATION)
        return run


def _first_iteration(storage: EventStorage) -> int:
    """First iteration of the training process that fills the storage."""
    return min(int(history.values()[0][1]) for history in storage.histories().values())


def build_writers(
    output_dir: str, *, max_iter: int, iters_per_epoch: float, cfg: CfgNode | None = None
) -> list[EventWriter]:
    """Builds the writers for console, `metrics.json` (a JSON object a line), TensorBoard if it is
    installed, and Weights & Biases if LOGGING.WANDB is set.

    Args:
        output_dir: for files.
        max_iter: iterations of the run.
        iters_per_epoch: iterations of one pass over the data.
        cfg: the configuration with LOGGING.*; None builds the first three only.

    Raises:
        ValueError: LOGGING.WANDB is set, but wandb is not installed.
    """
    os.makedirs(output_dir, exist_ok=True)
    writers: list[EventWriter] = [
        ConsolePrinter(max_iter=max_iter, iters_per_epoch=iters_per_epoch),
        JSONWriter(os.path.join(output_dir, "metrics.json")),
    ]
    if importlib.util.find_spec("tensorboard") is not None:
        writers.append(TensorboardXWriter(output_dir, window_size=WINDOW))
    if cfg is not None and cfg.LOGGING.WANDB:
        writers.append(
            WandbWriter(
                project=cfg.LOGGING.WANDB,
                output_dir=output_dir,
                config=yaml.safe_load(cfg.dump()),
                window=WINDOW,
            )
        )
    return writers


class PlainFormatter(logging.Formatter):
    """Formats records with another formatter and removes escape sequences."""

    def __init__(self, inner: logging.Formatter) -> None:
        super().__init__()
        self._inner = inner

    def format(self, record: logging.LogRecord) -> str:
        return ESCAPES.sub("", self._inner.format(record))


def keep_files_plain(logger: logging.Logger) -> None:
    """Removes escape sequences from all that a logger writes elsewhere than to stdout and stderr.

    Detectron2 colors some messages if stdout is a terminal, for all handlers.
    """
    for handler in logger.handlers:
        console = getattr(handler, "stream", None) in (sys.stdout, sys.stderr)
        if not console and not isinstance(handler.formatter, PlainFormatter):
            handler.setFormatter(PlainFormatter(handler.formatter or logging.Formatter()))
