"""Training: `Trainer`, and its parts for use with Detectron2's `DefaultTrainer` or a loop of your
own."""

from ..checkpoint.checkpointer import AtomicCheckpointer
from ..data import SparseDetectionMapper
from .ema import WeightAverage
from .hooks import Curves
from .non_finite import NonFiniteLossError
from .optimizer import build_clipper, build_optimizer
from .progress import TrainingProgress
from .schedule import Schedule, resolve_schedule
from .step import TrainStep
from .trainer import Trainer

__all__ = [
    "AtomicCheckpointer",
    "Curves",
    "NonFiniteLossError",
    "Schedule",
    "SparseDetectionMapper",
    "TrainStep",
    "Trainer",
    "TrainingProgress",
    "WeightAverage",
    "build_clipper",
    "build_optimizer",
    "resolve_schedule",
]
