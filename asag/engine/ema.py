"""Exponential moving average of the weights, which often detects better than the latest weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn


class WeightAverage:
    """Exponential moving average w of a model's trainable weights p: w <- d w + (1 - d) p.

    The average is updated after every optimizer step t = 0, 1, ..., with d the smaller of `decay`
    and (1 + t) / (warmup + t), so that it forgets the random initialization and a short run still
    changes it. A step skipped for an overflow in float16 is not an update, except with a fused
    optimizer on CUDA, which skips it on the device: the average then moves toward the unchanged
    weights. Frozen weights and buffers (such as norm statistics) are not averaged; the average uses
    the model's own.

    All processes hold equal averages without communication, because their weights are equal after
    every step.
    """

    def __init__(self, model: nn.Module, *, decay: float, warmup: float = 1.0) -> None:
        """
        Args:
            model: not wrapped; the average is initialized with its weights.
            decay: limit of d, 0 to 1.
            warmup: at least 1; 1 uses `decay` from the start.
        """
        self.model = model
        self.decay = decay
        self.warmup = warmup
        self.updates = 0
        trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._names = [name for name, _ in trainable]
        self._weights = [p for _, p in trainable]
        self._averages = [p.detach().clone() for p in self._weights]

    @classmethod
    def from_config(cls, cfg: CfgNode, model: nn.Module) -> WeightAverage | None:
        """Builds the average from SOLVER.EMA.*; None if it is disabled."""
        ema = cfg.SOLVER.EMA
        return cls(model, decay=ema.DECAY, warmup=ema.WARMUP) if ema.ENABLED else None

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Registers the update as a hook that runs after every step of the optimizer."""
        optimizer.register_step_post_hook(lambda *_: self.update())

    @torch.no_grad()
    def update(self) -> None:
        """Updates the average with the present weights, in a few kernels."""
        decay = min(self.decay, (1 + self.updates) / (self.warmup + self.updates))
        torch._foreach_lerp_(self._averages, self._weights, 1 - decay)
        self.updates += 1

    @torch.no_grad()
    def restart(self) -> None:
        """Resets the average to the present weights."""
        torch._foreach_copy_(self._averages, self._weights)
        self.updates = 0

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Replaces the model's weights by the average within a block.

        Weights and averages exchange their storage, so nothing is copied. Must not be nested.
        """
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for i, weight in enumerate(self._weights):
            weight.data, self._averages[i] = self._averages[i], weight.data

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the whole `state_dict` of the model with averaged weights."""
        with self.applied():
            return self.model.state_dict()  # its tensors stay with the averages' storage

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Loads the averages; the caller restores the number of updates.

        Raises:
            ValueError: an average is missing or has another shape.
        """
        for name, average in zip(self._names, self._averages, strict=True):
            loaded = state.get(name)
            if loaded is None or loaded.shape != average.shape:
                shape = "missing" if loaded is None else f"of shape {tuple(loaded.shape)}"
                raise ValueError(
                    f"averaged weight {name} is {shape} in the checkpoint, the model's has shape "
                    f"{tuple(average.shape)}; it was written for another model"
                )
            average.copy_(loaded)
