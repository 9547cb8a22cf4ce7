"""What a case is, and how it is judged."""

from __future__ import annotations

import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from asag.data import SampleError

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 30.0  # seconds a case may take; none needs a tenth of it

# What the command line prints without a traceback.
USER_ERRORS = (ValueError, KeyError, OSError, SampleError)


class WrongResult(Exception):
    """Malformed input was taken, but not as the case says."""


class Refused(Exception):
    """What the command line printed before it ended with the exit code for users' errors."""


class Hang(BaseException):
    """Not an Exception, so that the code under test cannot catch it."""


@dataclass(frozen=True)
class Case:
    """One malformed input and what has to become of it.

    Attributes:
        kind: section of the table.
        title: row of the table; cases that differ in a number or a place share one.
        name: unique in its kind and title.
        happens: for the table: how it is handled, or what the error says.
        run: does it in a folder of its own. Returns what the user is told when it is handled;
            raises `WrongResult` when it is handled wrongly.
        says: what the user must be told: file, key or entry.
        remedy: what the message must tell the user to do; None: the input is handled.
    """

    kind: str
    title: str
    name: str
    happens: str
    run: Callable[[Path], str]
    says: tuple[str, ...] = ()
    remedy: str | None = None


def judge(case: Case, folder: Path) -> str | None:
    """Runs a case in an empty folder.

    Returns:
        None if all is as declared, otherwise a sentence about what is not.
    """
    try:
        with _time_limit():
            text = case.run(folder)
    except Hang:
        return f"did not end within {TIMEOUT:.0f} s"
    except WrongResult as error:
        return f"was taken, but wrongly: {error}"
    except Refused as issue:
        return _lacking((*case.says, case.remedy or ""), str(issue))
    except Exception as error:
        return _judge_error(case, error)
    if case.remedy is not None:
        return "was accepted, an error was expected"
    return _lacking(case.says, text)


def expect(condition: bool, otherwise: str) -> None:
    """Raises `WrongResult` unless the condition holds."""
    if not condition:
        raise WrongResult(otherwise)


def _judge_error(case: Case, error: Exception) -> str | None:
    described = f"{type(error).__name__}: {error}"
    if case.remedy is None:
        return f"was refused: {described}"
    # A sample's error names image and position around what went wrong.
    origin = error.__cause__ if isinstance(error, SampleError) and error.__cause__ else error
    if not isinstance(origin, USER_ERRORS):
        return f"ended in {type(origin).__name__}, which users see as a traceback: {described}"
    if not _raised_by_library(origin):
        place = traceback.extract_tb(origin.__traceback__)[-1]
        return f"ended in an error of {place.filename}:{place.lineno}: {described}"
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    return _lacking((*case.says, case.remedy), text)


def _raised_by_library(error: BaseException) -> bool:
    """Whether the message is the library's own, and not one that came from far below it."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).is_relative_to(ROOT / "asag")


def _lacking(wanted: tuple[str, ...], text: str) -> str | None:
    lacking = [part for part in wanted if part not in text]
    return f"does not say {lacking}: {text}" if lacking else None


@contextmanager
def _time_limit() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, TIMEOUT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
