"""Hooks that run between steps: checkpoints, evaluation, early stopping, curves."""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
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
    """The best evaluation so far.

    Attributes:
        ap: box AP in percent.
        iterations: number of iterations after which it was reached.
    """

    ap: float
    iterations: int

    @classmethod
    def read(cls, output_dir: str | Path) -> BestResult | None:
        """Reads `best.json` of an earlier part of the run; None if it is missing or damaged."""
        with contextlib.suppress(OSError, ValueError, TypeError):
            return cls(**json.loads((Path(output_dir) / BEST_FILE).read_text(encoding="utf-8")))
        return None

    def write(self, output_dir: str | Path) -> None:
        """Writes `best.json`."""
        with atomic_writer(Path(output_dir) / BEST_FILE) as file:
            json.dump(asdict(self), file)


class Checkpointing(HookBase):
    """Saves a checkpoint every `period` iterations, and `model_final` at the end.

    Runs in all processes, because a checkpoint holds the random state of each.
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
    """Evaluates every `period` iterations and at the end, logs the results, saves the best weights.

    The best model has the highest box AP on the first data set of DATASETS.TEST; its weights are
    saved as `model_best.pth`.
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
            self._save_best(results, done)
        comm.synchronize()  # the others wait here and do not run into a collective's timeout

    def _log(self, results: Mapping[str, Any]) -> None:
        numbers = flatten_results_dict(results)
        finite = {k: float(v) for k, v in numbers.items() if math.isfinite(float(v))}
        self.trainer.storage.put_scalars(**finite, smoothing_hint=False)

    def _log_losses(self, losses: Mapping[str, float]) -> None:
        finite = {f"val_loss/{k}": v for k, v in losses.items() if math.isfinite(v)}
        self.trainer.storage.put_scalars(**finite, smoothing_hint=False)
        logger.info(f"validation loss {losses['total_loss']:.4g}")

    def _save_best(self, results: Mapping[str, Any], done: int) -> None:
        ap = box_ap(results)
        best = self.trainer.best
        if ap is None or (best is not None and ap <= best.ap):
            return
        self.trainer.best = BestResult(ap, done)
        self.trainer.save_weights(BEST_WEIGHTS)
        self.trainer.best.write(self.trainer.cfg.OUTPUT_DIR)


class EarlyStopping(HookBase):
    """Ends training after `patience` evaluations in a row without a better box AP.

    Saves a final checkpoint. Must follow `Evaluation` in the list of hooks. The number of
    evaluations since the best one is computed from `best.json`, so that a resumed run stops at the
    same iteration as an uninterrupted one.
    """

    def __init__(self, *, patience: int, period: int) -> None:
        """
        Args:
            patience: evaluations without a better result, 1 or more.
            period: iterations between evaluations, 1 or more.
        """
        self._patience = patience
        self._period = period
        self._stopped = False

    @classmethod
    def from_config(cls, cfg: CfgNode) -> EarlyStopping | None:
        """Builds the hook from SOLVER.EARLY_STOP_PATIENCE; None if that is 0.

        Raises:
            ValueError: training has no evaluations.
        """
        patience, period = cfg.SOLVER.EARLY_STOP_PATIENCE, cfg.TEST.EVAL_PERIOD
        if patience == 0:
            return None
        if period == 0 or not cfg.DATASETS.TEST:
            raise ValueError(
                f"SOLVER.EARLY_STOP_PATIENCE is {patience}, but nothing is evaluated while "
                "training: set TEST.EVAL_PERIOD above 0 and name a data set in DATASETS.TEST, or "
                "set SOLVER.EARLY_STOP_PATIENCE 0"
            )
        return cls(patience=patience, period=period)

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done % self._period or done == self.trainer.max_iter:
            return
        reason = comm.all_gather(self._reason(self.trainer.best, done))[0]  # of the main process
        if reason is None:
            return
        self._stopped = True
        logger.info(f"stopped early after {done} of {self.trainer.max_iter} iterations: {reason}")
        self.trainer.save_checkpoint(FINAL_WEIGHTS)
        self.trainer.stop()

    def ended(self, best: BestResult | None, done: int) -> str | None:
        """Returns why a run resumed after `done` iterations is complete; None if it is not."""
        return comm.all_gather(self._reason(best, done) if self._stopped else None)[0]

    def _reason(self, best: BestResult | None, done: int) -> str | None:
        """Returns the reason for stopping after `done` iterations; None if there is none."""
        waited = (done - (best.iterations if best else 0)) // self._period
        if waited < self._patience:
            return None
        than = (
            f" better than {best.ap:.2f}, reached after {best.iterations} iterations"
            if best
            else ""
        )
        return f"{waited} evaluations without a box AP{than} (SOLVER.EARLY_STOP_PATIENCE)"

    def state_dict(self) -> dict[str, Any]:
        """Marks the checkpoint of a run that was stopped."""
        return {"stopped": True} if self._stopped else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._stopped = state_dict["stopped"]


class Curves(HookBase):
    """Redraws `curves.png` when the results of an evaluation are in `metrics.json`.

    Runs in the main process, after the writers, under any of Detectron2's trainers. The command
    line draws the curves once more at the end of a run.
    """

    def __init__(self, eval_period: int, log_period: int) -> None:
        """
        Args:
            eval_period: iterations between evaluations; 0: only one at the end.
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
    """Box AP of the first data set in the results of `Trainer.test`; None if there is none."""
    if "bbox" not in results:  # several data sets: name -> results
        nested = [value for value in results.values() if isinstance(value, Mapping)]
        if not nested or "bbox" not in nested[0]:
            return None
        results = nested[0]
    ap = float(results["bbox"].get("AP", math.nan))
    return ap if math.isfinite(ap) else None
