"""The trainer: Detectron2's interface around this library's step, loader and checkpoints."""

from __future__ import annotations

import logging
import os
import time
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.engine import HookBase, hooks
from detectron2.engine.train_loop import TrainerBase
from detectron2.evaluation import DatasetEvaluator, verify_results
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, EventWriter
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from ..checkpoint.checkpointer import AtomicCheckpointer
from ..data import SparseDetectionMapper, build_train_loader
from ..data.catalog import check_classes, check_registered, class_names, load_train_dicts
from ..evaluation import build_evaluator
from ..inference.deploy import merge_frozen_norms
from ..inference.tta import DetectorWithTTA, check_test_augmentation
from ..visualization.pictures import save_pictures
from .ema import WeightAverage
from .forecast import Forecast
from .hooks import BestResult, Checkpointing, Curves, EarlyStopping, Evaluation
from .memory import describe_batch, memory_advice, memory_check
from .non_finite import NonFiniteGuard
from .optimizer import build_clipper, build_optimizer
from .progress import TrainingProgress, watched
from .resuming import ResumableTrainer
from .rng import preserved_rng, set_rng_state
from .schedule import resolve_schedule
from .step import LossLog, TrainStep, amp_dtype, unwrap
from .validation import validation_losses
from .writers import build_writers, import_wandb

LOG_PERIOD = 20  # iterations between two lines of the log

logger = logging.getLogger(__name__)


class Trainer(ResumableTrainer):
    """Detectron2's `DefaultTrainer` as its users know it: `Trainer(cfg)`, `resume_or_load`,
    `train`, `test`, the `build_*` class methods and hooks.

    Its constructor is not Detectron2's, which refuses mixed precision and several processes on a
    CPU and, in v0.5, keeps no optimizer state in checkpoints. A resumed run equals an uninterrupted
    one: checkpoints hold optimizer, schedule, loss scale and the random state of every process, and
    the order of the data is a function of seed and iteration.
    """

    def __init__(
        self,
        cfg: CfgNode,
        *,
        recipe: CfgNode | None = None,
        dataset_dicts: Sequence[dict[str, Any]] | None = None,
    ) -> None:
        """
        Args:
            cfg: epochs are resolved to iterations here; `self.cfg` and `self.schedule` tell.
            recipe: the configuration file without overrides, to compare the learning rate with.
            dataset_dicts: training images; default: those of DATASETS.TRAIN.

        Raises:
            ValueError: a configuration that cannot work; the message names the key.
        """
        TrainerBase.__init__(self)
        own = dataset_dicts is not None
        self.dataset_dicts = dataset_dicts if own else load_train_dicts(cfg)
        self.cfg, self.schedule = resolve_schedule(cfg, len(self.dataset_dicts), recipe=recipe)
        cfg = self.cfg
        _check_batch(cfg)
        if cfg.LOGGING.WANDB:
            import_wandb(cfg.LOGGING.WANDB)  # on all processes, so that all of them end
        check_registered(cfg, need_train=not own)
        check_classes(cfg)
        if cfg.TEST.AUG.ENABLED:
            check_test_augmentation(cfg)

        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        self._trainer = TrainStep(
            _distributed(model),
            optimizer,
            amp_dtype=amp_dtype(cfg),
            accumulate_steps=cfg.SOLVER.ACCUMULATE_STEPS,
            clip=build_clipper(cfg),
            guard=NonFiniteGuard(
                model,
                optimizer,
                folder=cfg.OUTPUT_DIR,
                config=cfg.dump(),
            ),
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.ema = WeightAverage.from_config(cfg, model)
        states = {"trainer": weakref.proxy(self)}
        if self.ema is not None:
            self.ema.follow(optimizer)
            states["ema"] = self.ema
        self.checkpointer = AtomicCheckpointer(model, cfg.OUTPUT_DIR, **states)
        self.start_iter, self.max_iter = 0, cfg.SOLVER.MAX_ITER
        self.seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
        self.class_names = class_names(cfg.DATASETS.TRAIN[0]) if cfg.DATASETS.TRAIN else []
        self.best: BestResult | None = None
        self.results: dict[str, Any] | None = None
        self._stopping = False
        self._log = LossLog()
        self._batches: Iterator[list[dict[str, Any]]] | None = None
        self._rng_states: list[dict[str, Any]] = []
        self.register_hooks(self.build_hooks())

    # Parts, each replaceable in a subclass.

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """The detector on MODEL.DEVICE, frozen norms computed with the convolutions before them."""
        model = build_model(cfg)
        merge_frozen_norms(model)
        return model

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """See `asag.engine.optimizer`; the training step clips the gradients."""
        return build_optimizer(cfg, model, clip_in_step=False)

    @classmethod
    def build_train_loader(
        cls,
        cfg: CfgNode,
        dataset_dicts: Sequence[dict[str, Any]] | None = None,
        *,
        seed: int | None = None,
        start_iter: int = 0,
    ) -> DataLoader:
        """Endless loader of this process's batches, from iteration `start_iter` on.

        Args:
            cfg: INPUT.*, DATALOADER.*, SOLVER.IMS_PER_BATCH.
            dataset_dicts: default: those of DATASETS.TRAIN.
            seed: of order and augmentation; None draws one.
            start_iter: first iteration to deliver.
        """
        return build_train_loader(
            load_train_dicts(cfg) if dataset_dicts is None else dataset_dicts,
            SparseDetectionMapper(cfg, is_train=True),
            total_batch_size=cfg.SOLVER.IMS_PER_BATCH,
            num_workers=cfg.DATALOADER.NUM_WORKERS,
            seed=seed,
            start_iter=start_iter,
            aspect_ratio_grouping=cfg.DATALOADER.ASPECT_RATIO_GROUPING,
        )

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> DataLoader:
        """Detectron2's loader: every image once, shared out among the processes."""
        mapper = SparseDetectionMapper(cfg, is_train=False)
        return watched(build_detection_test_loader(cfg, dataset_name, mapper=mapper))

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None
    ) -> DatasetEvaluator:
        """By the data set's `evaluator_type`; writes into `output_folder`, default
        OUTPUT_DIR/inference."""
        folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference")
        if len(cfg.DATASETS.TEST) > 1:
            folder = os.path.join(folder, dataset_name)
        return build_evaluator(dataset_name, folder)

    def build_writers(self) -> list[EventWriter]:
        """Console, metrics.json, TensorBoard, and what LOGGING.* asks for."""
        per_epoch = self.schedule.images / self.schedule.batch
        return build_writers(
            self.cfg.OUTPUT_DIR,
            max_iter=self.max_iter,
            iters_per_epoch=per_epoch,
            cfg=self.cfg,
        )

    def build_hooks(self) -> list[HookBase | None]:
        """Timer, learning rate, progress bar, checkpoints, evaluation, writers, curves: in this
        order after a step.

        The checkpoint comes first: should the evaluation fail, nothing of the training is lost.
        """
        found: list[HookBase | None] = [
            hooks.IterationTimer(),
            hooks.LRScheduler(self.optimizer, self.scheduler),
            Forecast(),
            TrainingProgress.if_on_terminal(),
            Checkpointing(self.cfg.SOLVER.CHECKPOINT_PERIOD),
        ]
        if self.cfg.DATASETS.TEST:
            found.append(Evaluation(self.cfg.TEST.EVAL_PERIOD))
        found.append(EarlyStopping.from_config(self.cfg))
        if comm.is_main_process():
            found.append(hooks.PeriodicWriter(self.build_writers(), period=LOG_PERIOD))
            found.append(Curves(self.cfg.TEST.EVAL_PERIOD, LOG_PERIOD))
        return found

    # Running.

    def train(self) -> dict[str, Any] | None:
        """Trains to the end of the schedule.

        Returns:
            The results of the last evaluation on the main process, None without one.

        Raises:
            NonFiniteLossError: the training diverged.
            NotEnoughMemoryError: with advice on what to change.
        """
        if self.start_iter >= self.max_iter:
            logger.info(
                f"nothing left to train: {self.start_iter} of {self.max_iter} iterations are done. "
                "To go on, raise SOLVER.EPOCHS (or SOLVER.MAX_ITER); to start anew, leave out "
                "--resume or choose another OUTPUT_DIR."
            )
            return None
        early = next((hook for hook in self._hooks if isinstance(hook, EarlyStopping)), None)
        if early and (reason := early.ended(self.best, self.start_iter)):
            logger.info(f"nothing left to train, the run was stopped early: {reason}; raise it")
            return None
        self._trainer.data_loader = self.build_train_loader(
            self.cfg, self.dataset_dicts, seed=self.seed, start_iter=self.start_iter
        )
        try:
            self._loop()
        finally:
            self._batches = None  # stops the loader's processes
        if self.cfg.TEST.EXPECTED_RESULTS and comm.is_main_process():
            verify_results(self.cfg, self.results)
        return self.results

    def _loop(self) -> None:
        """As `TrainerBase.train`, which logs the traceback of an error that is raised anyway."""
        self.iter = self.start_iter
        with EventStorage(self.start_iter) as self.storage:
            try:
                self.before_train()
                for iteration in range(self.start_iter, self.max_iter):
                    self.iter = iteration
                    self.before_step()
                    self.run_step()
                    self.after_step()
                    if self._stopping:
                        break
                self.iter += 1
            except BaseException:
                try:
                    self.after_train()
                except Exception:
                    logger.exception("after the training had failed, so did its end")
                raise
            self.after_train()

    def stop(self) -> None:
        """Ends the training after the present iteration. Every process must call it."""
        self._stopping = True

    def before_train(self) -> None:
        """Hooks, then the first batch is ordered, then the random state of the checkpoint.

        Before all of them, the largest step is tried out (SOLVER.MEMORY_CHECK).
        """
        memory_check(self.cfg, self._trainer, self.dataset_dicts)
        super().before_train()
        self.model.train()
        self._batches = iter(self.data_loader)
        if self._rng_states:
            set_rng_state(self._rng_states[comm.get_rank()])

    def run_step(self) -> None:
        """One optimizer step; its scalars reach the host only when the log is written."""
        start = time.perf_counter()
        batch = next(self._batches)
        self.storage.put_scalar("data_time", time.perf_counter() - start)
        with memory_advice(self.cfg, f"iteration {self.iter}, {describe_batch(batch)}"):
            scalars = self._trainer(batch, self.iter)
        self._log.add(self.iter, scalars)
        # On a CPU nothing has to wait for the numbers: look at every step.
        done = self.iter + 1
        if self._on_cpu or done % LOG_PERIOD == 0 or done == self.max_iter:
            self.collect_log()

    @property
    def _on_cpu(self) -> bool:
        return self._trainer.device.type == "cpu"

    def collect_log(self) -> None:
        """Brings the scalars of recent steps to the host and into the storage.

        Raises:
            NonFiniteLossError: one of these steps is not finite.
        """
        self._trainer.guard.settle()
        for iteration, scalars in self._log.collect():
            self.storage.iter = iteration
            self.storage.put_scalars(**scalars)
        self.storage.iter = self.iter

    def evaluate(self) -> dict[str, Any]:
        """Evaluates on DATASETS.TEST without a trace in the random numbers of the training.

        Returns:
            What `test` returns; empty on all but the main process.
        """
        with preserved_rng(), self.evaluation_weights():
            self.results = self.test(self.cfg, unwrap(self.model))
        return self.results

    def validate(self) -> dict[str, float]:
        """Losses on the first data set of DATASETS.TEST; see `asag.engine.validation`."""
        with self.evaluation_weights():
            return validation_losses(self.cfg, unwrap(self.model))

    @classmethod
    def test(
        cls,
        cfg: CfgNode,
        model: nn.Module,
        evaluators: DatasetEvaluator | Sequence[DatasetEvaluator] | None = None,
    ) -> dict[str, Any]:
        """Evaluates a model and draws TEST.NUM_PICTURES images into OUTPUT_DIR/pictures.

        Args:
            cfg: DATASETS.TEST, INPUT.*, TEST.*.
            model: the detector, not wrapped.
            evaluators: one a data set; default: `build_evaluator`.

        Returns:
            task -> metric -> value, below the data set's name if there are several.
        """
        results = super().test(cfg, model, evaluators)
        if cfg.TEST.NUM_PICTURES > 0 and cfg.DATASETS.TEST and comm.is_main_process():
            save_pictures(cfg, model, cfg.DATASETS.TEST[0], Path(cfg.OUTPUT_DIR) / "pictures")
        return results

    @classmethod
    def test_with_TTA(cls, cfg: CfgNode, model: nn.Module) -> dict[str, Any]:
        """Evaluates with test-time augmentation (TEST.AUG.*); writes into OUTPUT_DIR/inference_TTA.

        Returns:
            As `test`, every first key with `_TTA` behind it.
        """
        cfg = cfg.clone()
        cfg.defrost()
        cfg.INPUT.MIN_SIZE_TEST = 0  # the original images: the wrapper resizes them
        folder = os.path.join(cfg.OUTPUT_DIR, "inference_TTA")
        evaluators = [cls.build_evaluator(cfg, name, folder) for name in cfg.DATASETS.TEST]
        results = super().test(cfg, DetectorWithTTA(cfg, model), evaluators)
        return {f"{key}_TTA": value for key, value in results.items()}


def _check_batch(cfg: CfgNode) -> None:
    batch, world = cfg.SOLVER.IMS_PER_BATCH, comm.get_world_size()
    parts = cfg.SOLVER.ACCUMULATE_STEPS
    if batch % (world * parts):
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH is {batch}; it must be a multiple of {world * parts}: {world} "
            f"process(es) x SOLVER.ACCUMULATE_STEPS {parts}"
        )


def _distributed(model: nn.Module) -> nn.Module:
    """Averages gradients over the processes, on CUDA and CPU alike."""
    if comm.get_world_size() == 1:
        return model
    device = next(model.parameters()).device
    return DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
    )
