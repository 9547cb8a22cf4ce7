"""Progress bars on a terminal.

While a bar is shown, log lines for the terminal are written above it. Log files contain no bars,
and without a terminal none are shown.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

from detectron2.engine import HookBase
from detectron2.utils import comm
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from .writers import WINDOW, time_left

REFRESH = 0.2  # seconds between two updates of a bar
LAYOUT = "{desc} {n_fmt}/{total_fmt} |{bar}| {percentage:3.0f}%{postfix}"


def on_terminal() -> bool:
    """Returns True if bars are shown.

    They are shown in the main process if stdout is a terminal of known size that can redraw a line
    (TERM is not "dumb") and the environment variable NO_COLOR is empty.
    """
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    try:
        size = os.get_terminal_size(sys.stdout.fileno())
    except (AttributeError, OSError, ValueError):  # no stdout, no terminal, no file
        return False
    return min(size) > 0 and comm.is_main_process()


@contextlib.contextmanager
def progress_bar(name: str, *, total: int, initial: int = 0) -> Iterator[tqdm]:
    """Shows a bar below the log lines, which disappears at the end of the block.

    Args:
        name: label of the bar.
        total: number of steps.
        initial: number of steps already done.
    """
    with (
        logging_redirect_tqdm(_console_loggers()),
        tqdm(
            total=total,
            initial=initial,
            desc=name,
            bar_format=LAYOUT,
            file=sys.stdout,
            mininterval=REFRESH,
            dynamic_ncols=True,
            leave=False,
        ) as bar,
    ):
        yield bar


def _console_loggers() -> list[logging.Logger]:
    """Loggers with a handler of their own for stdout or stderr."""
    known = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
    return [
        logger
        for logger in known
        if isinstance(logger, logging.Logger)
        and any(getattr(h, "stream", None) in (sys.stdout, sys.stderr) for h in logger.handlers)
    ]


class TrainingProgress(HookBase):
    """Shows a bar with iteration, loss, box AP of the latest evaluation and remaining time."""

    def __init__(self) -> None:
        self._shown = contextlib.ExitStack()
        self._drawn = 0.0

    @classmethod
    def if_on_terminal(cls) -> TrainingProgress | None:
        """Builds the hook; None where no bar is shown."""
        return cls() if on_terminal() else None

    def before_train(self) -> None:
        start, end = self.trainer.start_iter, self.trainer.max_iter
        self._bar = self._shown.enter_context(progress_bar("train", total=end, initial=start))

    def after_step(self) -> None:
        now, done = time.monotonic(), self.trainer.iter + 1
        if now - self._drawn < REFRESH and done < self.trainer.max_iter:
            return
        self._drawn = now
        self._bar.n = done
        self._bar.set_postfix_str(self._text(self.trainer.max_iter - done))  # draws

    def after_train(self) -> None:
        self._shown.close()

    def _text(self, left: int) -> str:
        histories = self.trainer.storage.histories()
        parts = []
        if "total_loss" in histories:
            parts.append(f"loss {histories['total_loss'].median(WINDOW):.4g}")
        # With several data sets, the keys start with their names.
        aps = [history for name, history in histories.items() if name.endswith("bbox/AP")]
        if aps:
            parts.append(f"AP {aps[0].latest():.1f}")
        remaining = time_left(histories, left)
        if remaining is not None:
            parts.append(f"eta {remaining}")
        return ", ".join(parts)


class WatchedLoader:
    """Wraps a loader of known length and shows a bar while it is read."""

    def __init__(self, loader: Any, name: str) -> None:
        self._loader = loader
        self._name = name

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        with progress_bar(self._name, total=len(self)) as bar:
            for batch in self._loader:
                yield batch
                bar.update()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


def watched(loader: Any, name: str = "evaluate") -> Any:
    """Returns the loader, wrapped in a `WatchedLoader` if bars are shown.

    Args:
        loader: iterable with a length.
        name: label of the bar.
    """
    return WatchedLoader(loader, name) if on_terminal() else loader
