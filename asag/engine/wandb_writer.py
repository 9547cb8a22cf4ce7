"""The numbers of a training on Weights & Biases."""

from __future__ import annotations

import importlib
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from detectron2.utils.events import EventStorage, EventWriter, get_event_storage

from ..files import atomic_writer

RUN_FILE = "wandb_run.txt"  # in OUTPUT_DIR: the id of the run, to go on with it
ITERATION = "iteration"  # what all curves are drawn over


def import_wandb(project: str) -> ModuleType:
    """The package wandb.

    Args:
        project: LOGGING.WANDB.

    Raises:
        ValueError: it is not installed.
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
    """Sends all scalars to a run of Weights & Biases, which begins with the first of them.

    A training that goes on with `--resume` goes on with its run; its id is kept in OUTPUT_DIR.
    The package's own environment variables hold, such as WANDB_MODE=offline.
    """

    def __init__(
        self, *, project: str, output_dir: str, config: Mapping[str, Any], window: int
    ) -> None:
        """
        Args:
            project: LOGGING.WANDB.
            output_dir: folder of the training, whose name the run takes.
            config: kept with the run.
            window: steps that values are smoothed over (median).

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
        """Sends what is new.

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
            # Not as wandb's own step, which must not go back: a resumed training begins before
            # the last that was sent.
            self._run.log({ITERATION: iteration, **new[iteration]})
        self._last = max(new)

    def close(self) -> None:
        """Ends the run, as failed if an exception is on its way."""
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
    """Where the training that fills the storage began."""
    return min(int(history.values()[0][1]) for history in storage.histories().values())
