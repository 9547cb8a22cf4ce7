"""Hooks for what happens between steps: checkpoints, evaluation, curves."""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from detectron2.engine import HookBase
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm

from ..files import atomic_writer
from ..visualization.pictures import save_curves

BEST_FILE = "best.json"
BEST_WEIGHTS = "model_best"
FINAL_WEIGHTS = "model_final"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BestResult:
    """The best evaluation so far: box AP in percent, and after how many iterations."""

    ap: float
    iterations: int

    @classmethod
    def read(cls, output_dir: str | Path) -> BestResult | None:
        """What an earlier part of the run noted in `best.json`; None if there is nothing usable."""
        with contextlib.suppress(OSError, ValueError, TypeError):
            return cls(**json.loads((Path(output_dir) / BEST_FILE).read_text(encoding="utf-8")))
        return None

    def write(self, output_dir: str | Path) -> None:
        """Notes it in `best.json`."""
        with atomic_writer(Path(output_dir) / BEST_FILE) as file:
            json.dump(asdict(self), file)


class Checkpointing(HookBase):
    """A checkpoint every `period` iterations, and `model_final` at the end.

    Runs on all processes, because a checkpoint holds the random state of each.
    """

    def __init__(self, period: int) -> None:
        """
        Args:
            period: iterations between checkpoints; 0 saves at the end only.
        """
        self._period = period

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done == self.trainer.max_iter:
            self.trainer.save_checkpoint(FINAL_WEIGHTS)
        elif self._period > 0 and done % self._period == 0:
            self.trainer.save_checkpoint(f"model_{self.trainer.iter:07d}")


class Evaluation(HookBase):
    """Evaluates every `period` iterations and at the end, logs the results, keeps the best weights.

    The best model is that of highest box AP on the first data set of DATASETS.TEST; its weights are
    in `model_best.pth`.
    """

    def __init__(self, period: int) -> None:
        """
        Args:
            period: iterations between evaluations; 0 evaluates at the end only.
        """
        self._period = period

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        last = done == self.trainer.max_iter
        if not last and not (self._period > 0 and done % self._period == 0):
            return
        self.trainer.collect_log()  # ends the run here if a recent step was not finite
        if self.trainer.cfg.TEST.LOSS:
            self._log_losses(self.trainer.validate())
        results = self.trainer.evaluate()
        if comm.is_main_process() and results:
            self._log(results)
            self._keep_best(results, done)
        comm.synchronize()  # the others wait instead of running into a collective's timeout

    def _log(self, results: Mapping[str, Any]) -> None:
        numbers = flatten_results_dict(results)
        finite = {k: float(v) for k, v in numbers.items() if math.isfinite(float(v))}
        self.trainer.storage.put_scalars(**finite, smoothing_hint=False)

    def _log_losses(self, losses: Mapping[str, float]) -> None:
        finite = {f"val_loss/{k}": v for k, v in losses.items() if math.isfinite(v)}
        self.trainer.storage.put_scalars(**finite, smoothing_hint=False)
        logger.info(f"validation loss {losses['total_loss']:.4g}")

    def _keep_best(self, results: Mapping[str, Any], done: int) -> None:
        ap = box_ap(results)
        best = self.trainer.best
        if ap is None or (best is not None and ap <= best.ap):
            return
        self.trainer.best = BestResult(ap, done)
        self.trainer.save_weights(BEST_WEIGHTS)
        self.trainer.best.write(self.trainer.cfg.OUTPUT_DIR)


class Curves(HookBase):
    """Draws `curves.png` anew once an evaluation's numbers are in `metrics.json`.

    Runs on the main process, behind the writers, under any of Detectron2's trainers. The last
    drawing is the program's, when all is written.
    """

    def __init__(self, eval_period: int, log_period: int) -> None:
        """
        Args:
            eval_period: iterations between evaluations; 0: no evaluation before the end.
            log_period: iterations between two lines of `metrics.json`.
        """
        self._eval_period, self._log_period = eval_period, log_period
        self._pending = False

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        self._pending |= self._eval_period > 0 and done % self._eval_period == 0
        if self._pending and done % self._log_period == 0 and done < self.trainer.max_iter:
            self._pending = False
            folder = Path(self.trainer.cfg.OUTPUT_DIR)
            metrics = folder / "metrics.json"
            if metrics.is_file() and metrics.stat().st_size:  # a writer may have another period
                save_curves(folder)


def box_ap(results: Mapping[str, Any]) -> float | None:
    """Box AP of the first data set in what `Trainer.test` returned; None if there is none."""
    if "bbox" not in results:  # several data sets: name -> results
        nested = [value for value in results.values() if isinstance(value, Mapping)]
        if not nested or "bbox" not in nested[0]:
            return None
        results = nested[0]
    ap = float(results["bbox"].get("AP", math.nan))
    return ap if math.isfinite(ap) else None
