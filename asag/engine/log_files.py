"""Files of logs without what is meant for terminals."""

from __future__ import annotations

import logging
import re
import sys

ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")  # colors and the like (ECMA-48, 5.4)


class PlainFormatter(logging.Formatter):
    """What another formatter makes of a record, without escape sequences."""

    def __init__(self, inner: logging.Formatter) -> None:
        super().__init__()
        self._inner = inner

    def format(self, record: logging.LogRecord) -> str:
        return ESCAPES.sub("", self._inner.format(record))


def keep_files_plain(logger: logging.Logger) -> None:
    """Leaves escape sequences out of all that a logger writes elsewhere than to stdout and stderr:
    Detectron2 colors some messages when stdout is a terminal, wherever they go."""
    for handler in logger.handlers:
        console = getattr(handler, "stream", None) in (sys.stdout, sys.stderr)
        if not console and not isinstance(handler.formatter, PlainFormatter):
            handler.setFormatter(PlainFormatter(handler.formatter or logging.Formatter()))
