"""Progress bars on a terminal; where there is none, nothing.

Log lines keep their place: while a bar is shown, those for the terminal are written above it. Files
of logs never see a bar.
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

REFRESH = 0.2  # seconds between two looks of a bar
LAYOUT = "{desc} {n_fmt}/{total_fmt} |{bar}| {percentage:3.0f}%{postfix}"


def on_terminal() -> bool:
    """Whether bars are shown: on the main process, when stdout is a terminal of known size that can
    redraw a line (TERM is not "dumb") and the environment variable NO_COLOR is empty."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    try:
        size = os.get_terminal_size(sys.stdout.fileno())
    except (AttributeError, OSError, ValueError):  # no stdout, no terminal, no file
        return False
    return min(size) > 0 and comm.is_main_process()


@contextlib.contextmanager
def progress_bar(name: str, *, total: int, initial: int = 0) -> Iterator[tqdm]:
    """A bar below the log lines, which vanishes in the end.

    Args:
        name: what is going on.
        total: steps.
        initial: steps that are done.
    """
    with (
        logging_redirect_tqdm(_loggers_of_the_console()),
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


def _loggers_of_the_console() -> list[logging.Logger]:
    """Those that write to the terminal by themselves."""
    known = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
    return [
        logger
        for logger in known
        if isinstance(logger, logging.Logger)
        and any(getattr(h, "stream", None) in (sys.stdout, sys.stderr) for h in logger.handlers)
    ]


class TrainingProgress(HookBase):
    """A bar with iteration, loss, box AP of the latest evaluation and the time to go."""

    def __init__(self) -> None:
        self._shown = contextlib.ExitStack()
        self._drawn = 0.0

    @classmethod
    def if_on_terminal(cls) -> TrainingProgress | None:
        """None where no bar can be shown."""
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
        # With several data sets, the name of the first stands in front.
        aps = [history for name, history in histories.items() if name.endswith("bbox/AP")]
        if aps:
            parts.append(f"AP {aps[0].latest():.1f}")
        remaining = time_left(histories, left)
        if remaining is not None:
            parts.append(f"eta {remaining}")
        return ", ".join(parts)


class WatchedLoader:
    """A loader of known length that shows how far it has been read; otherwise the loader itself."""

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
    """The loader, with a bar where there is a terminal.

    Args:
        loader: iterable with a length.
        name: what it is read for.
    """
    return WatchedLoader(loader, name) if on_terminal() else loader
