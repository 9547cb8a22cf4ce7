"""Where the numbers of a training go: console, metrics.json, TensorBoard."""

from __future__ import annotations

import datetime
import importlib.util
import logging
import os
import re
import sys

import torch
from detectron2.utils.events import (
    EventStorage,
    EventWriter,
    JSONWriter,
    TensorboardXWriter,
    get_event_storage,
)

# Losses of the final stage and of the proposal generator; those of earlier stages end with a digit.
EARLIER_STAGE = re.compile(r"_\d+$")
WINDOW = 20  # steps that console values are smoothed over (median)

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
            seconds = histories["time"].median(1000)
            waiting = histories["data_time"].median(WINDOW) if "data_time" in histories else 0.0
            left = datetime.timedelta(seconds=int(seconds * (self._max_iter - done)))
            parts.append(f"{seconds:.3f} s/iter (data {waiting:.3f})  eta {left}")
        parts.append(f"mem {peak_memory_gib():.1f} GiB")
        return "  ".join(parts)


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


def build_writers(output_dir: str, *, max_iter: int, iters_per_epoch: float) -> list[EventWriter]:
    """Console, `metrics.json` (a JSON object a line) and, if it is installed, TensorBoard."""
    os.makedirs(output_dir, exist_ok=True)
    writers: list[EventWriter] = [
        ConsolePrinter(max_iter=max_iter, iters_per_epoch=iters_per_epoch),
        JSONWriter(os.path.join(output_dir, "metrics.json")),
    ]
    if importlib.util.find_spec("tensorboard") is not None:
        writers.append(TensorboardXWriter(output_dir))
    return writers
