"""Expected duration of a run: estimated before the start, and measured in its first steps."""

from __future__ import annotations

import logging
import math
import time
from typing import Any

import torch
from detectron2.data import DatasetCatalog
from detectron2.engine import HookBase
from detectron2.utils import comm

from .memory import LargestBatch, dry_step

# The first steps are slower: memory is allocated, kernels are chosen.
SKIPPED, MEASURED = 3, 10
# Of the time that an image takes in training, its share in an evaluation: no backward pass.
EVALUATION_SHARE = 0.5

logger = logging.getLogger(__name__)


class Forecast(HookBase):
    """Logs the remaining minutes after the first steps, evaluations included."""

    def __init__(self) -> None:
        self._start = 0.0

    def after_step(self) -> None:
        steps = self.trainer.iter + 1 - self.trainer.start_iter
        if steps == SKIPPED:
            self._start = time.perf_counter()
        if steps != SKIPPED + MEASURED or not comm.is_main_process():
            return
        seconds = (time.perf_counter() - self._start) / MEASURED
        cfg, done = self.trainer.cfg, self.trainer.iter + 1
        images = sum(len(DatasetCatalog.get(name)) for name in cfg.DATASETS.TEST)
        logger.info(
            forecast(
                seconds,
                iterations=self.trainer.max_iter - done,
                evaluations=_evaluations(done, self.trainer.max_iter, cfg.TEST.EVAL_PERIOD),
                images=images,
                batch=cfg.SOLVER.IMS_PER_BATCH,
            )
        )


def estimate(trainer: Any) -> str:
    """Times a forward and backward pass before the start; leaves no trace in the model.

    The images are synthetic and as large as the configuration permits, so the estimate is rather
    too long; `Forecast` corrects it after the first steps.

    Args:
        trainer: an `asag.engine.Trainer`.

    Returns:
        The expected time as a sentence, evaluations included.
    """
    cfg, step = trainer.cfg, trainer._trainer
    largest = LargestBatch.from_config(cfg, trainer.dataset_dicts)
    samples = largest.samples(cfg.MODEL.ROI_HEADS.NUM_CLASSES)
    dry_step(step, samples)  # allocates memory and chooses kernels
    _wait(step.device)
    start = time.perf_counter()
    dry_step(step, samples)
    _wait(step.device)
    seconds = (time.perf_counter() - start) * cfg.SOLVER.ACCUMULATE_STEPS
    return forecast(
        seconds,
        iterations=trainer.max_iter - trainer.start_iter,
        evaluations=_evaluations(trainer.start_iter, trainer.max_iter, cfg.TEST.EVAL_PERIOD),
        images=sum(len(DatasetCatalog.get(name)) for name in cfg.DATASETS.TEST),
        batch=cfg.SOLVER.IMS_PER_BATCH,
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def forecast(seconds: float, *, iterations: int, evaluations: int, images: int, batch: int) -> str:
    """Remaining time as a sentence.

    Args:
        seconds: of a step.
        iterations: to go.
        evaluations: to go.
        images: of one evaluation.
        batch: images of a step.
    """
    testing = evaluations * images * EVALUATION_SHARE * seconds / batch
    minutes = (iterations * seconds + testing) / 60
    length = "less than a minute" if minutes < 1 else f"about {minutes:.3g} minutes"
    return (
        f"{length} to go: {iterations} iterations of {seconds:.2f} s"
        f"{f' and {evaluations} evaluations of {images} images' if images else ''}"
    )


def _evaluations(done: int, end: int, period: int) -> int:
    """Evaluations between two iterations, with the one at the end."""
    return 1 if period < 1 else math.ceil(end / period) - done // period
