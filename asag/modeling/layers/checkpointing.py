"""Activation checkpointing: less memory for more computation, with the same results.

A module saves only its inputs; its activations are computed again in the backward pass (Chen et
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
"""Called in the first pass. Returns a function that restores, for the second pass, the state
outside of the module on which its result depends."""


class Recomputed:
    """Mixin for modules whose forward pass is computed again in the backward pass.

    Dropout masks and autocast are the same in both passes, and running statistics are updated once.
    """

    situation: Situation | None

    def forward(self, *args: Any) -> Any:
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(*args)
        # The caller may store the output of the next layer in the same container.
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
    """Switches a module to activation checkpointing in place; parameter names stay the same.

    Args:
        module: its `forward` takes positional arguments.
        situation: restores other inputs of the forward pass, if it has any.
    """
    # Changing the class instead of the instance's `forward` keeps copies of the model correct: a
    # bound method would call the original module.
    module.__class__ = _recomputed(type(module))
    module.situation = situation


@functools.cache
def _recomputed(cls: type[nn.Module]) -> type[nn.Module]:
    return type(f"Recomputed{cls.__name__}", (Recomputed, cls), {})
