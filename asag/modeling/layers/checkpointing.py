"""Activation checkpointing: memory for time, without a change of the numbers.

A module keeps its inputs only; what its backward pass needs is computed a second time (Chen et
al., "Training Deep Nets with Sublinear Memory Cost", 2016).
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .buffers import preserved_buffers

Situation = Callable[[], Callable[[], AbstractContextManager[None]]]
"""Called in the first pass; gives a function that restores, for the second pass, what the first one
found outside of the module."""


class Recomputed:
    """Mixed into a module's class: while training, the forward pass is computed twice.

    Dropout draws the same numbers both times, autocast is the same, and the statistics of norms
    move once.
    """

    situation: Situation | None

    def forward(self, *args: Any) -> Any:
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(*args)
        # The caller may go on and put the next layer's values into the same container.
        args = tuple(copy.copy(x) if dataclasses.is_dataclass(x) else x for x in args)
        again = self.situation() if self.situation is not None else nullcontext

        @contextmanager
        def second_pass() -> Iterator[None]:
            with ExitStack() as stack:
                stack.enter_context(preserved_buffers(self))
                stack.enter_context(again())
                yield

        return checkpoint(
            super().forward,
            *args,
            use_reentrant=False,
            context_fn=lambda: (nullcontext(), second_pass()),
        )


def recompute(module: nn.Module, situation: Situation | None = None) -> None:
    """Switches a module to activation checkpointing, in place; names of parameters stay.

    Args:
        module: whose `forward` takes positional arguments.
        situation: where the forward pass depends on more than its arguments.
    """
    # The class, not a `forward` of the instance: that one would go on to call the original in a
    # copy of the model.
    module.__class__ = _recomputed(type(module))
    module.situation = situation


@functools.cache
def _recomputed(cls: type[nn.Module]) -> type[nn.Module]:
    return type(f"Recomputed{cls.__name__}", (Recomputed, cls), {})
