"""Exponential moving average of the weights, which often detects better than the latest weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn


class WeightAverage:
    """Average w of a model's trainable weights p, one update an optimizer step:
    w <- d w + (1 - d) p.

    At update t = 0, 1, ... d is the smaller of `decay` and (1 + t) / (warmup + t), so that the
    average forgets the random start (and a short training still moves it). Steps that are left out
    (an overflow in float16, NaN) are no updates, except on CUDA, where a fused optimizer leaves
    them out unknown to the host: the average then comes closer to the unchanged weights. Frozen
    weights and buffers (such as a norm's statistics) are not
    averaged: the model's own belong to the average too.

    The processes of a distributed training hold equal averages without any communication, because
    their weights are equal after every step.
    """

    def __init__(self, model: nn.Module, *, decay: float, warmup: float = 1.0) -> None:
        """
        Args:
            model: not wrapped; the average starts from its weights.
            decay: d in the long run, 0 to 1.
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
        """By SOLVER.EMA.*; None if it is switched off."""
        ema = cfg.SOLVER.EMA
        return cls(model, decay=ema.DECAY, warmup=ema.WARMUP) if ema.ENABLED else None

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Updates the average after every step that the optimizer takes from now on."""
        optimizer.register_step_post_hook(lambda *_: self.update())

    @torch.no_grad()
    def update(self) -> None:
        """Takes the present weights in, in a few kernels for all of them together."""
        decay = min(self.decay, (1 + self.updates) / (self.warmup + self.updates))
        torch._foreach_lerp_(self._averages, self._weights, 1 - decay)
        self.updates += 1

    @torch.no_grad()
    def restart(self) -> None:
        """Starts anew from the model's present weights."""
        torch._foreach_copy_(self._averages, self._weights)
        self.updates = 0

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model computes with the average; afterwards it is as it was.

        Nothing is copied: weights and averages exchange their storage. Not to be nested.
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
        """The model's whole `state_dict` with averaged weights; any loader of weights can read
        it."""
        with self.applied():
            return self.model.state_dict()  # its tensors stay with the averages' storage

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over the averages in `state`; the count of updates is the caller's.

        Raises:
            ValueError: an average is missing or has another shape.
        """
        for name, average in zip(self._names, self._averages, strict=True):
            found = state.get(name)
            if found is None or found.shape != average.shape:
                shape = "missing" if found is None else f"of shape {tuple(found.shape)}"
                raise ValueError(
                    f"averaged weight {name} is {shape} in the checkpoint, the model's has shape "
                    f"{tuple(average.shape)}; it was written for another model"
                )
            average.copy_(found)
