"""Buffers that a forward pass in training changes: running statistics, step counters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase


def training_buffers(model: nn.Module) -> list[Tensor]:
    """Returns the buffers that training may change, each once.

    Excluded are non-persistent buffers, which are constants, and those of norms with fixed
    statistics such as `FrozenBatchNorm2d`.
    """
    buffers: dict[int, Tensor] = {}
    for module in model.modules():
        if hasattr(module, "running_mean") and not isinstance(module, _NormBase):
            continue
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                buffers[id(buffer)] = buffer
    return list(buffers.values())


@contextmanager
def preserved_buffers(model: nn.Module) -> Iterator[None]:
    """Context manager that restores the values of the training buffers on exit."""
    buffers = training_buffers(model)
    saved = [buffer.detach().clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, saved, strict=True):
                buffer.copy_(value)
