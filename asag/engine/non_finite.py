"""What becomes of a training step whose numbers are no numbers: found, left out, reported, kept.

A step is *bad* when a loss, a predicted box, a class logit or a gradient is NaN or infinite on any
process. Its update is left out on the device, where the finding is made; the host never waits for
it. On CUDA it learns of a bad step before the update of the next one, and by then the weights are
still those that the bad step met, so that what is written down reproduces it. On a CPU it learns of
it at once. (An overflow of gradients in float16 is not bad: the loss scaler deals with it.)
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from detectron2.utils import comm
from torch import Tensor, nn

from ..files import atomic_writer
from ..modeling.layers.buffers import training_buffers
from ..structures import NoisedPredictions, Predictions
from .bad_numbers import (
    BOXES,
    GRAD_NORM,
    LOGITS,
    bad_inputs,
    describe_gradients,
    describe_values,
    pack_sample,
)
from .loss_log import NonFiniteLossError, describe_step, divergence_message, file_names
from .rng import rng_state

LARGEST_BOX = 1e15  # pixels; the area of a larger box is no number in float32

logger = logging.getLogger(__name__)


class PredictionWatch:
    """Counts predictions that are no numbers, and hands on zeros in their place.

    Matching and losses then work as ever, also in other processes that wait for this one; the step
    itself is bad.
    """

    def __init__(self, model: nn.Module) -> None:
        """
        Args:
            model: not wrapped; one without `roi_heads` is not watched.
        """
        self.counts: dict[str, Tensor] = {}
        if hasattr(model, "roi_heads"):
            model.roi_heads.register_forward_hook(self._look)

    def _look(self, module: nn.Module, _inputs: Any, output: Any) -> Predictions | None:
        return self._clean(output) if module.training else None

    def _clean(self, found: Predictions) -> Predictions:
        valid = found.valid[..., None]
        good_boxes = found.boxes_xyxy.abs() <= LARGEST_BOX  # nor is this true of NaN
        good_logits = found.logits.isfinite()
        for name, good in ((BOXES, good_boxes), (LOGITS, good_logits)):
            self.counts[name] = self.counts.get(name, 0) + (~good & valid).sum()
        noised = found.noised
        if noised is not None:
            noised = NoisedPredictions(self._clean(noised.predictions), noised.gt)
        return replace(
            found,
            logits=torch.where(good_logits, found.logits, 0),
            boxes_xyxy=torch.where(good_boxes, found.boxes_xyxy, 0),
            noised=noised,
        )


@dataclass
class _Step:
    """What the report of a step needs. `numbers` holds losses, then counts, the norm of the
    gradient and, last, whether the step is bad on any process."""

    iteration: int
    batch: Sequence[dict[str, Any]]
    lr: float
    rng: dict[str, Any]
    names: tuple[str, ...] = ()
    numbers: Tensor | None = None
    arrived: torch.cuda.Event | None = None
    parameters: tuple[str, ...] = ()
    gradient_norms: Tensor | None = None


class NonFiniteGuard:
    """Watches the steps of a training.

    Example:
        >>> guard.begin(iteration, batch)
        >>> ...                                      # forward and backward
        >>> bad = guard.examine(losses)
        >>> update_unless(optimizer, bad)
        >>> guard.finish(bad)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        folder: str | Path,
        config: str,
        max_skips: int = 0,
    ) -> None:
        """
        Args:
            model: not wrapped.
            optimizer: of its parameters.
            folder: takes `non_finite_<iteration>.pth`, see `asag.diagnostics.replay`.
            config: as yaml, for that file.
            max_skips: bad steps that are left out before one ends the training.
        """
        self.model, self.optimizer = model, optimizer
        self.folder, self.config = Path(folder), config
        self.max_skips = max_skips
        self.num_skips = 0
        # Whether the host learns of a step in the next one only.
        self.late = next(model.parameters()).is_cuda
        self._watch = PredictionWatch(model)
        self._buffers = training_buffers(model)
        self._saved = [buffer.detach().clone() for buffer in self._buffers]
        self._parameters = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self._now: _Step | None = None
        self._pending: _Step | None = None
        self._skipped: list[int] = []

    # In the order of a step.

    def begin(self, iteration: int, batch: Sequence[dict[str, Any]]) -> None:
        """Remembers what a step starts from; `batch` is this process's."""
        lr = max(group["lr"] for group in self.optimizer.param_groups)
        self._now = _Step(iteration, batch, lr, rng_state())
        self._watch.counts = {}
        if self._buffers:
            torch._foreach_copy_(self._saved, self._buffers)

    @torch.no_grad()
    def examine(self, losses: Mapping[str, Tensor], gradients: bool = True) -> Tensor:
        """Looks at what forward and backward pass gave; then at how the step before came out.

        Args:
            losses: name -> 0-dim tensor.
            gradients: whether they have to be finite (not while they are scaled).

        Returns:
            0-dim bool on the device: whether the step is bad on any process.

        Raises:
            NonFiniteLossError: the step before was one bad step too many.
        """
        step = self._now
        present = [(n, p.grad) for n, p in self._parameters if gradients and p.grad is not None]
        norms = gradient_norms([gradient for _, gradient in present])
        counts = self._watch.counts
        values = torch.stack([x.detach().float() for x in losses.values()])
        wrong = torch.stack([x.float() for x in counts.values()]) if counts else values[:0]
        total = torch.linalg.vector_norm(norms)[None] if present else values[:0]
        bad = (~values.isfinite()).any() | (wrong > 0).any()
        bad = bad | ~total.isfinite().all()
        any_bad = bad.float()
        if comm.get_world_size() > 1:
            torch.distributed.all_reduce(any_bad, torch.distributed.ReduceOp.MAX)
        step.names = (*losses, *counts, *([GRAD_NORM] if present else []))
        step.parameters = tuple(name for name, _ in present)
        step.gradient_norms = norms
        self._send(step, torch.cat((values, wrong, total, any_bad[None])))
        self.settle()
        return any_bad > 0

    @torch.no_grad()
    def finish(self, bad: Tensor) -> None:
        """Undoes what a bad step left in the model's statistics and counters.

        Raises:
            NonFiniteLossError: on a CPU, if this was one bad step too many.
        """
        for buffer, saved in zip(self._buffers, self._saved, strict=True):
            buffer.copy_(torch.where(bad, saved, buffer))
        self._pending, self._now = self._now, None
        if not self.late:
            self.settle()

    def fail(self, error: FloatingPointError) -> None:
        """In place of `examine` and `finish`: the forward pass found out by itself.

        Raises:
            NonFiniteLossError: it was one bad step too many, or other processes wait for the rest
                of the step, which cannot be left out then.
        """
        alone = comm.get_world_size() == 1
        if alone:
            self.settle()
        for buffer, saved in zip(self._buffers, self._saved, strict=True):
            buffer.copy_(saved)
        step, self._now = self._now, None
        what = "; ".join((str(error).rstrip("."), *bad_inputs(step.batch)))
        self._report(step, what, final=not alone)

    def settle(self) -> None:
        """Learns how the last finished step came out.

        Raises:
            NonFiniteLossError: it was one bad step too many; on all processes.
        """
        step, self._pending = self._pending, None
        if step is None:
            return
        if step.arrived is not None:
            step.arrived.synchronize()
        numbers = step.numbers.tolist()
        if numbers[-1] == 0:
            return
        values = dict(zip(step.names, numbers, strict=False))
        own = _is_bad(values)
        # Every process comes here for the same step, so these collective calls are safe.
        found = comm.all_gather((own, file_names(step.batch), describe(step, values)))
        # Without a culprit it is the gradient, which is the same on all of them.
        culprits = [text for bad, _, text in found if bad]
        what = "; ".join(culprits or [found[0][2]])
        files = [name for _, names, _ in found for name in names]
        self._report(step, what, files=files, write=own or not culprits, values=values)

    def take_skipped(self) -> list[int]:
        """Iterations that were left out since the last call."""
        skipped, self._skipped = self._skipped, []
        return skipped

    # Details.

    @staticmethod
    def _send(step: _Step, numbers: Tensor) -> None:
        """Orders the copy to the host, without waiting for it."""
        if numbers.is_cuda:
            step.numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            step.numbers.copy_(numbers, non_blocking=True)
            step.arrived = torch.cuda.Event()
            step.arrived.record()
        else:
            step.numbers = numbers

    def _report(
        self,
        step: _Step,
        what: str,
        *,
        files: Sequence[str] | None = None,
        write: bool = True,
        values: Mapping[str, float] | None = None,
        final: bool = False,
    ) -> None:
        self.num_skips += 1
        final = final or self.num_skips > self.max_skips
        files = file_names(step.batch) if files is None else files
        # The first and the last: each is as large as a checkpoint.
        keep = write and (final or self.num_skips == 1)
        kept = self._keep(step, what, values or {}) if keep else ""
        if final:
            raise NonFiniteLossError(
                divergence_message(step.iteration, what, step.lr, files) + kept
            )
        self._skipped.append(step.iteration)
        logger.warning(
            f"step {self.num_skips} of at most {self.max_skips} (SOLVER.NON_FINITE.MAX_SKIPS) was "
            f"left out, iteration {step.iteration}: "
            f"{describe_step(what, step.lr, files)}{kept}"
        )

    def _keep(self, step: _Step, what: str, values: Mapping[str, float]) -> str:
        """Writes the file of a step; a sentence about it."""
        try:
            path = self._write(step, what, values)
        except (OSError, RuntimeError) as error:  # a full disk is either, depending on torch
            return f" The step could not be kept in {self.folder}: {error}"
        return f" To look into it: python tools/replay.py {path}"

    def _write(self, step: _Step, what: str, values: Mapping[str, float]) -> Path:
        rank = comm.get_rank()
        suffix = f"_rank{rank}" if rank else ""
        path = self.folder / f"non_finite_{step.iteration:07d}{suffix}.pth"
        self.folder.mkdir(parents=True, exist_ok=True)
        saved = {id(b): s for b, s in zip(self._buffers, self._saved, strict=True)}
        live = self.model.state_dict(keep_vars=True)
        state = {
            "iteration": step.iteration,
            "what": what,
            "values": dict(values),
            "parameters": bad_parameters(step),
            "learning_rate": step.lr,
            "batch": [pack_sample(sample) for sample in step.batch],
            "model": {name: saved.get(id(x), x).detach() for name, x in live.items()},
            "optimizer": self.optimizer.state_dict(),
            "rng": step.rng,
            "config": self.config,
        }
        with atomic_writer(path, "wb") as file:
            torch.save(state, file)
        return path


def gradient_norms(gradients: Sequence[Tensor]) -> Tensor:
    """L2 norm of each gradient, (P,)."""
    return torch.stack(torch._foreach_norm(list(gradients))) if gradients else torch.zeros(0)


def poison_gradients(parameters: Iterable[nn.Parameter], bad: Tensor) -> None:
    """Puts NaN into a gradient where `bad`, so that a loss scaler leaves the update out."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    min(gradients, key=Tensor.numel).masked_fill_(bad, math.nan)


def update_unless(optimizer: torch.optim.Optimizer, bad: Tensor) -> None:
    """An update, except where `bad`: then weights and state stay as they are.

    On CUDA, fused optimizers decide on the device. For others (SGD) the host waits for `bad`.
    """
    if bad.is_cuda and getattr(optimizer, "_step_supports_amp_scaling", False):
        update_on_device(optimizer, bad)
    elif not bad:
        optimizer.step()


def update_on_device(optimizer: torch.optim.Optimizer, bad: Tensor) -> None:
    """`update_unless` of a fused optimizer, which looks at `bad` in its kernel."""
    optimizer.found_inf = bad.float()
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf


def _is_bad(values: Mapping[str, float]) -> bool:
    """Whether losses or predictions of this process are; gradients are those of all processes."""
    return any(
        value > 0 if name in (BOXES, LOGITS) else not math.isfinite(value)
        for name, value in values.items()
        if name != GRAD_NORM
    )


def bad_parameters(step: _Step) -> list[str]:
    """Parameters whose gradient is NaN or infinite."""
    if not step.parameters:
        return []
    finite = step.gradient_norms.isfinite().tolist()
    return [name for name, good in zip(step.parameters, finite, strict=True) if not good]


def describe(step: _Step, values: Mapping[str, float]) -> str:
    """What is wrong with a step, in words."""
    gradients = describe_gradients(bad_parameters(step))
    return "; ".join((*bad_inputs(step.batch), *describe_values(values), *gradients))
