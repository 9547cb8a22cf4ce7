"""Where the numbers of a training go: console, metrics.json, TensorBoard, Weights & Biases."""

from __future__ import annotations

import datetime
import importlib.util
import logging
import os
import re
import sys
from collections.abc import Mapping

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

from .wandb_writer import WandbWriter

# Losses of the final stage and of the proposal generator; those of earlier stages end with a digit.
EARLIER_STAGE = re.compile(r"_\d+$")
WINDOW = 20  # steps that values are smoothed over (median)
PACE_WINDOW = 1000  # steps that the pace of the training is taken from (median)

logger = logging.getLogger(__name__)


class ConsolePrinter(EventWriter):
    """One line of progress: iteration, epoch, losses, learning rate, speed, time to go, memory."""

    def __init__(self, *, max_iter: int, iters_per_epoch: float) -> None:
        """
        Args:
            max_iter: length of the training.
            iters_per_epoch: iterations of one pass over the data.
        """
        self._max_iter = max_iter
        self._iters_per_epoch = iters_per_epoch
        self._last_iter = -1

    def write(self) -> None:
        """Prints the line, once an iteration."""
        storage = get_event_storage()
        done = storage.iter + 1
        if storage.iter <= self._last_iter or done > self._max_iter:
            return
        losses = storage.histories().get("total_loss")
        if losses is None or losses.values()[-1][1] != storage.iter:
            return  # the step did not come to its end
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
    """Whole seconds that so many iterations will take; None before the first was timed.

    Args:
        histories: of an `EventStorage`, with "time".
        iterations: to go.
    """
    if "time" not in histories:
        return None
    return datetime.timedelta(seconds=int(histories["time"].median(PACE_WINDOW) * iterations))


def peak_memory_gib() -> float:
    """Most memory used so far: of the CUDA device if there is one in use, else of the process."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20


def build_writers(
    output_dir: str, *, max_iter: int, iters_per_epoch: float, cfg: CfgNode | None = None
) -> list[EventWriter]:
    """Console, `metrics.json` (a JSON object a line), TensorBoard if it is installed, and Weights &
    Biases if LOGGING.WANDB says so.

    Args:
        output_dir: for files.
        max_iter: length of the training.
        iters_per_epoch: iterations of one pass over the data.
        cfg: of the training, with LOGGING.*; None writes to none but the first three.

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
