"""Progress bars: on a terminal, above it the log lines; elsewhere plain lines."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import logging
import os
import pty
import re
import struct
import sys
import termios
import threading
import time
import uuid
from pathlib import Path
from types import SimpleNamespace

import pytest
from detectron2.utils.events import EventStorage
from detectron2.utils.logger import setup_logger

from asag.engine import progress
from asag.engine.progress import WatchedLoader, on_terminal, watched
from asag.engine.writers import keep_files_plain, time_left

LINES = ["line 2", "line 3", "line 4", "image 7", "image 8", "image 9", "line 5", "the end"]
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f]")  # all but the end of a line


def story(folder: Path) -> None:
    """A training with an evaluation, in small, with the hook, the loader and the loggers that the
    real one uses."""
    name = f"progress_{uuid.uuid4().hex}"
    logger = setup_logger(str(folder), name=name, color=False)
    hook = progress.TrainingProgress.if_on_terminal()
    try:
        with EventStorage(2) as storage:
            trainer = SimpleNamespace(start_iter=2, max_iter=6, storage=storage)
            if hook:
                hook.trainer = trainer
                hook.before_train()
            for trainer.iter in range(2, 6):
                storage.put_scalars(total_loss=8.0 / trainer.iter, time=30.0)
                if hook:
                    hook.after_step()
                logger.info(f"line {trainer.iter}")
                if trainer.iter == 4:
                    for batch in watched([7, 8, 9]):
                        logger.info(f"image {batch}")
                        time.sleep(0.05)
                    storage.put_scalar("bbox/AP", 32.1)
            if hook:
                hook.after_train()
        logger.info("the end")
    finally:
        for handler in logger.handlers:
            handler.flush()
        logging.Logger.manager.loggerDict.pop(name)


@pytest.fixture
def told(monkeypatch, tmp_path):
    """Tells the story to a terminal of 100 columns or to a pipe; returns what arrived there."""

    def tell(terminal=True, rows=24, **environment):
        monkeypatch.delenv("NO_COLOR", raising=False)
        for key, value in ({"TERM": "xterm"} | environment).items():
            monkeypatch.setenv(key, value)
        monkeypatch.setattr(progress, "REFRESH", 0.0)
        reading, writing = pty.openpty() if terminal else os.pipe()
        if terminal:
            fcntl.ioctl(writing, termios.TIOCSWINSZ, struct.pack("HHHH", rows, 100, 0, 0))
        seen = []
        reader = threading.Thread(target=read_all, args=(reading, seen))
        reader.start()
        with open(writing, "w", encoding="utf-8") as stream, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            patch.setattr(sys, "stderr", stream)
            story(tmp_path)
        reader.join(timeout=60)
        return b"".join(seen).decode()

    return tell


def read_all(reading: int, seen: list[bytes]) -> None:
    with contextlib.suppress(OSError):  # Linux ends a terminal without a writer so
        while chunk := os.read(reading, 65536):
            seen.append(chunk)
    os.close(reading)


def messages(text: str) -> list[str]:
    """The log lines, without time and name; a line of another form stays as it is."""
    return [re.sub(r"^\[[^]]*\] \S+ INFO: ", "", line) for line in text.splitlines()]


def rows(text):
    """Text on a terminal in the end: carriage returns and cursor movements carried out."""
    screen, row, column = [[]], 0, 0
    for token in re.findall(r"\x1b\[[\d;]*[A-Za-z]|.", text, flags=re.DOTALL):
        if token == "\n":
            row += 1
        elif token == "\r":
            column = 0
        elif token == "\x1b[A":
            row -= 1
        elif not token.startswith("\x1b"):
            while len(screen) <= row:
                screen.append([])
            line = screen[row]
            line.extend(" " * (column + 1 - len(line)))
            line[column] = token
            column += 1
    return ["".join(line).rstrip() for line in screen]


def test_terminal_shows_bars_and_keeps_the_log_lines(told, tmp_path):
    text = told()
    for part in ("train 3/6", "loss 4,", "eta 0:01:30", "AP 32.1", "train 6/6", "evaluate 2/3"):
        assert part in text, part
    # Bars vanish in the end, and no line was overwritten or has a piece of a bar in it.
    standing = [row for row in rows(text) if row]
    assert messages("\n".join(standing)) == LINES and len(standing) == len(LINES)
    log = (tmp_path / "log.txt").read_text()
    assert CONTROL.search(log) is None and messages(log) == LINES


@pytest.mark.parametrize("options", [{"NO_COLOR": "1"}, {"TERM": "dumb"}, {"rows": 0}])
def test_terminal_without_bars_is_plain(told, options):
    text = told(**options).replace("\r\n", "\n")
    assert CONTROL.search(text) is None and messages(text) == LINES


def test_pipe_gets_plain_lines(told):
    text = told(terminal=False)
    assert CONTROL.search(text) is None and messages(text) == LINES


def test_other_processes_show_nothing(told, monkeypatch):
    monkeypatch.setattr(progress.comm, "is_main_process", lambda: False)
    assert messages(told()) == LINES


def test_there_may_be_no_stdout(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys, "stdout", None)
    assert not on_terminal() and progress.TrainingProgress.if_on_terminal() is None


def test_files_of_logs_lose_colors_and_nothing_else(tmp_path, capsys):
    logger = logging.Logger("plain")
    with open(tmp_path / "log.txt", "w", encoding="utf-8") as file:
        for stream in (sys.stdout, file):
            logger.addHandler(logging.StreamHandler(stream))
            logger.handlers[-1].setFormatter(logging.Formatter("[%(levelname)s] %(message)s"))
        for _ in range(2):  # set up twice, as a second training of a process does
            keep_files_plain(logger)
        logger.warning("a \x1b[36mtable\x1b[0m [5m\x1b[1;32m\x1b[K of %s", "things")
    assert (tmp_path / "log.txt").read_text() == "[WARNING] a table [5m of things\n"
    assert "\x1b[36mtable" in capsys.readouterr().out


def test_loader_stays_what_it_is(monkeypatch):
    class Loader(list):
        dataset = "images"

    loader = Loader([1, 2, 3])
    assert watched(loader) is loader
    monkeypatch.setattr(progress, "on_terminal", lambda: True)
    wrapped = watched(loader)
    assert isinstance(wrapped, WatchedLoader) and wrapped.dataset == "images"
    assert len(wrapped) == 3 and list(wrapped) == [1, 2, 3] == list(wrapped)


def test_time_left_follows_the_median_pace():
    with EventStorage(0) as storage:
        assert time_left(storage.histories(), 10) is None
        for seconds in (2.0, 2.0, 900.0):  # an evaluation does not count
            storage.put_scalar("time", seconds)
        assert time_left(storage.histories(), 10) == datetime.timedelta(seconds=20)
