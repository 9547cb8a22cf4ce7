"""Definition and judgment of a case."""

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
TIMEOUT = 30.0  # seconds of a case; none needs a tenth of it

# Errors that the command line prints without a traceback.
USER_ERRORS = (ValueError, KeyError, OSError, SampleError)


class WrongResult(Exception):
    """Malformed input was accepted, but not handled as declared."""


class Refused(Exception):
    """The command line ended with the exit code for user errors; the text is its output."""


class Hang(BaseException):
    """Time limit exceeded; no Exception, so that the code under test cannot catch it."""


@dataclass(frozen=True)
class Case:
    """One malformed input and its declared outcome.

    Attributes:
        kind: section of the table.
        title: row of the table, shared by cases that differ in a number or position.
        name: unique among the cases of its kind and title.
        happens: description for the table.
        run: executes the case in an empty folder. Returns the message to the user if the input is
            handled; raises `WrongResult` if it is handled wrongly.
        says: texts that the message must contain: file, key or entry.
        remedy: advice that the message must contain; None: the input is handled.
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
        None if the outcome is as declared, otherwise a sentence about the difference.
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
    # SampleError adds image and position to the original error.
    origin = error.__cause__ if isinstance(error, SampleError) and error.__cause__ else error
    if not isinstance(origin, USER_ERRORS):
        return f"ended in {type(origin).__name__}, which users see as a traceback: {described}"
    if not _raised_by_library(origin):
        place = traceback.extract_tb(origin.__traceback__)[-1]
        return f"ended in an error of {place.filename}:{place.lineno}: {described}"
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    return _lacking((*case.says, case.remedy), text)


def _raised_by_library(error: BaseException) -> bool:
    """Returns True if the error was raised by this library and not by one of its dependencies."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).is_relative_to(ROOT / "asag")


def _lacking(required: tuple[str, ...], text: str) -> str | None:
    lacking = [part for part in required if part not in text]
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
