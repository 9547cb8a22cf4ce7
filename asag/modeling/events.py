"""Logging of the model's scalars to Detectron2's event storage."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from detectron2.utils.events import EventStorage, get_event_storage
from torch import Tensor

WRITE_PERIOD = 20
"""Iterations between two writes of Detectron2's `DefaultTrainer` and of ours."""


def put_scalars(scalars: Mapping[str, Tensor]) -> None:
    """Puts 0-d tensors into the event storage; does nothing outside of a training loop.

    GPU tensors are read only every `WRITE_PERIOD` iterations, when Detectron2's writers write,
    because each read synchronizes host and device.
    """
    storage = _storage()
    if storage is None or not scalars:
        return
    values = torch.stack([value.detach().float() for value in scalars.values()])
    if values.is_cuda and (storage.iter + 1) % WRITE_PERIOD:
        return
    storage.put_scalars(**dict(zip(scalars, values.tolist(), strict=True)))


def _storage() -> EventStorage | None:
    """Returns the current storage; None outside of a training loop (v0.5 has no query for it)."""
    try:
        return get_event_storage()
    except AssertionError:
        return None
