"""Scalars of the model in Detectron2's event storage."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from detectron2.utils.events import EventStorage, get_event_storage
from torch import Tensor

WRITE_PERIOD = 20
"""Iterations between two lines of the log, in Detectron2's `DefaultTrainer` and in ours."""


def put_scalars(scalars: Mapping[str, Tensor]) -> None:
    """Puts 0-dim tensors into the event storage of the training loop, if there is one.

    Tensors of a GPU are read only in the iterations in which Detectron2's writers look at them,
    because each read makes the host wait: one read every `WRITE_PERIOD` iterations.
    """
    storage = _storage()
    if storage is None or not scalars:
        return
    values = torch.stack([value.detach().float() for value in scalars.values()])
    if values.is_cuda and (storage.iter + 1) % WRITE_PERIOD:
        return
    storage.put_scalars(**dict(zip(scalars, values.tolist(), strict=True)))


def _storage() -> EventStorage | None:
    """Returns the current storage; None outside of a training loop (v0.5 cannot be asked)."""
    try:
        return get_event_storage()
    except AssertionError:
        return None
