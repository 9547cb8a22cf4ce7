"""The part of a model's state that a forward pass changes: statistics of norms, step counters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase


def training_buffers(model: nn.Module) -> list[Tensor]:
    """Buffers that training may change, each once.

    Left out are buffers that no checkpoint holds, which are constants, and those of norms with
    fixed statistics (`FrozenBatchNorm2d` and its kin).
    """
    found: dict[int, Tensor] = {}
    for module in model.modules():
        if hasattr(module, "running_mean") and not isinstance(module, _NormBase):
            continue
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                found[id(buffer)] = buffer
    return list(found.values())


@contextmanager
def preserved_buffers(model: nn.Module) -> Iterator[None]:
    """Runs a block after which the buffers hold what they held before."""
    buffers = training_buffers(model)
    saved = [buffer.detach().clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, saved, strict=True):
                buffer.copy_(value)
