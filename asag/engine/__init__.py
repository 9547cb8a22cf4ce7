"""Training: `Trainer`, the schedule in epochs, and the command line of train_net.py."""

from .loss_log import NonFiniteLossError
from .optimizer import build_optimizer
from .schedule import Schedule, resolve_schedule
from .step import TrainStep
from .trainer import Trainer

__all__ = [
    "NonFiniteLossError",
    "Schedule",
    "TrainStep",
    "Trainer",
    "build_optimizer",
    "resolve_schedule",
]
