"""Content of training checkpoints, and resuming from them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer
from detectron2.engine.train_loop import TrainerBase
from detectron2.solver import LRMultiplier
from detectron2.utils import comm

from ..checkpoint.checkpointer import AtomicCheckpointer
from ..checkpoint.settings import with_settings
from ..config.loading import differences
from .ema import WeightAverage
from .hooks import BestResult
from .rng import rng_state
from .step import TrainStep

# The entry in which Detectron2's `DefaultTrainer` (main) keeps the state of its inner trainer.
INNER = "_trainer"

logger = logging.getLogger(__name__)


class ResumableTrainer(DefaultTrainer):
    """The part of `Trainer` that writes checkpoints and goes on from them.

    A resumed run equals an uninterrupted one: checkpoints hold optimizer, schedule, loss scale,
    averaged weights ("ema" beside "model") and the random state of every process. Where SOLVER.*
    was changed in between, the new values hold.
    """

    cfg: CfgNode
    scheduler: Any
    checkpointer: AtomicCheckpointer
    seed: int
    class_names: list[str]
    best: BestResult | None
    ema: WeightAverage | None
    _trainer: TrainStep
    _rng_states: list[dict[str, Any]]

    def save_checkpoint(self, name: str) -> None:
        """Writes all that `--resume` needs; every process must call it."""
        self.collect_log()  # never keep the weights of a training that diverged unnoticed
        self._rng_states = comm.gather(rng_state())
        self.checkpointer.save(name, class_names=self.class_names)

    def save_weights(self, name: str) -> None:
        """Writes the model (averaged where SOLVER.EMA is on) and its class names only."""
        with self.evaluation_weights():
            self.checkpointer.save_weights(name, class_names=self.class_names)

    def evaluation_weights(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the model has the weights that evaluations and `model_best` use: the averaged
        ones where SOLVER.EMA is on."""
        use = self.ema is not None and self.cfg.TEST.EMA_WEIGHTS
        return self.ema.applied() if use else contextlib.nullcontext()

    def state_dict(self) -> dict[str, Any]:
        """Iteration, hooks (with the learning rate schedule) and optimizer as Detectron2's main
        keeps them, so that its `DefaultTrainer` can resume, and what it leaves out."""
        return TrainerBase.state_dict(self) | {
            INNER: {
                "iteration": self.iter,
                "optimizer": self.optimizer.state_dict(),
                "grad_scaler": self._trainer.grad_scaler.state_dict(),
            },
            "rng": self._rng_states,
            "seed": self.seed,
            "ema_updates": self.ema.updates if self.ema else 0,
            "config": self.cfg.dump(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from `state_dict()`.

        Raises:
            ValueError: the state is not one of this trainer.
        """
        inner = state_dict.get(INNER, state_dict)  # runs of version 0.1 had no inner entry
        if "optimizer" not in inner:
            raise ValueError(
                "the checkpoint has no state of the optimizer, so it cannot be resumed "
                "(DefaultTrainer of Detectron2 v0.5 keeps none). Pass it as MODEL.WEIGHTS, without "
                "--resume, to start from its weights."
            )
        configured = [dict(group) for group in self.optimizer.param_groups]
        TrainerBase.load_state_dict(self, state_dict)
        try:
            self.optimizer.load_state_dict(inner["optimizer"])
        except ValueError as error:
            raise ValueError(
                f"the checkpoint is of another optimizer ({error}). Pass it as MODEL.WEIGHTS, "
                "without --resume, to start from its weights."
            ) from error
        self._keep_configured(configured)
        if "grad_scaler" in inner:
            self._trainer.grad_scaler.load_state_dict(inner["grad_scaler"])
        self._load_random_state(state_dict)
        if self.ema is not None:
            self.ema.restart()  # from the weights; the checkpoint's average follows, if it has one
            self.ema.updates = state_dict.get("ema_updates", 0)
        if "config" in state_dict:
            self._adopt_settings()
            changes = differences(CfgNode.load_cfg(state_dict["config"]), self.cfg)
            for key, (old, new) in changes.items():
                logger.warning(f"changed since the checkpoint: {key}: {old} -> {new}")

    def _load_random_state(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over seed and random numbers where the checkpoint has them for these processes."""
        self.seed = state_dict.get("seed", self.seed)
        self._rng_states = state_dict.get("rng", [])
        if not self._rng_states:
            logger.warning(
                "the checkpoint was written by Detectron2's DefaultTrainer: the order of the "
                "images and random numbers start anew"
            )
        elif len(self._rng_states) != comm.get_world_size():
            logger.warning(
                f"the checkpoint was written by {len(self._rng_states)} process(es), now there are "
                f"{comm.get_world_size()}: random numbers (dropout) go on differently, and images "
                "may share a batch with others; schedule and images of a step stay"
            )
            self._rng_states = []

    def _keep_configured(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Puts rates, decay and the like of the configuration into the optimizer's groups, which
        have just been overwritten by a checkpoint's; its schedule stands where the checkpoint's
        did."""
        for group, configured in zip(self.optimizer.param_groups, groups, strict=True):
            group.update({k: v for k, v in configured.items() if k not in ("params", "lr")})
        if not isinstance(self.scheduler, LRMultiplier):
            return  # one of a subclass's own choice knows by itself
        self.scheduler.base_lrs = [group["initial_lr"] for group in groups]
        rates = self.scheduler.get_lr()
        for group, lr in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = lr

    def _adopt_settings(self) -> None:
        """Lets the run's configuration say what the loaded weights made the model compute with."""
        if self.checkpointer.settings:
            self.cfg = with_settings(self.cfg, self.checkpointer.settings)
            self._trainer.guard.config = self.cfg.dump()

    def resume_or_load(self, resume: bool = True) -> None:
        """Continues the run in OUTPUT_DIR, or starts from MODEL.WEIGHTS.

        Args:
            resume: go on from OUTPUT_DIR's last checkpoint if there is one.

        Raises:
            ValueError: the checkpoint to resume belongs to other classes or another model, or is no
                resumable one.
        """
        found = self.checkpointer.has_checkpoint()
        if found and not resume:
            logger.warning(
                f"{self.cfg.OUTPUT_DIR} holds an earlier run, whose files will be overwritten; "
                "to go on with it use --resume"
            )
        # Going on needs the latest weights, a new start the best ones.
        self.checkpointer.use_average = self.cfg.TEST.EMA_WEIGHTS and not (resume and found)
        # A new start may be from weights of other classes or a part; a run goes on with its own.
        self.checkpointer.class_names = None if resume and found else self.class_names or None
        self.checkpointer.whole = resume and found
        extra = self.checkpointer.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=resume)
        self._adopt_settings()
        if not (resume and found):
            if self.ema is not None:
                self.ema.restart()
            if resume:
                logger.info(f"no checkpoint in {self.cfg.OUTPUT_DIR}: training from the start")
            return
        names = extra.get("class_names", self.class_names)  # DefaultTrainer keeps none
        if names != self.class_names:
            raise ValueError(
                f"the run in OUTPUT_DIR = {self.cfg.OUTPUT_DIR} was trained on the classes "
                f"{names}, the data has {self.class_names}; choose another OUTPUT_DIR"
            )
        # A checkpoint holds the number of the step it was written after.
        self.start_iter = self.iter + 1
        self.best = BestResult.read(self.cfg.OUTPUT_DIR)
        logger.info(f"resumed at iteration {self.start_iter} of {self.max_iter}")
