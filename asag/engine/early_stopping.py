"""Ending a training that no longer improves."""

from __future__ import annotations

import logging
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils import comm

from .hooks import FINAL_WEIGHTS, BestResult

logger = logging.getLogger(__name__)


class EarlyStopping(HookBase):
    """Ends the training, with a final checkpoint, when `patience` evaluations in a row brought no
    better box AP. Stands behind `Evaluation` among the hooks.

    How long the best result is ago follows from where it stands in `best.json`, so that a resumed
    run stops where an uninterrupted one does.
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
        """By SOLVER.EARLY_STOP_PATIENCE; None when it is 0.

        Raises:
            ValueError: there are no evaluations to judge by.
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
        reason = comm.all_gather(self._reason(self.trainer.best, done))[0]  # the main process's
        if reason is None:
            return
        self._stopped = True
        logger.info(f"stopped early after {done} of {self.trainer.max_iter} iterations: {reason}")
        self.trainer.save_checkpoint(FINAL_WEIGHTS)
        self.trainer.stop()

    def ended(self, best: BestResult | None, done: int) -> str | None:
        """Why a run that was resumed after `done` iterations is over; None if it is not."""
        return comm.all_gather(self._reason(best, done) if self._stopped else None)[0]

    def _reason(self, best: BestResult | None, done: int) -> str | None:
        """The numbers that speak for stopping after `done` iterations, None if they do not."""
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
        """Whether a checkpoint is the end of a run."""
        return {"stopped": True} if self._stopped else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._stopped = state_dict["stopped"]
