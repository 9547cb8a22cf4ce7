"""Detection and handling of non-finite losses, predictions and gradients.

A step is *bad* if a loss, a predicted box, a class logit or a gradient is NaN or infinite in any
process. Its update is skipped, its batch, weights and random state are written to a file for
`asag.diagnostics.replay`, and training ends with `NonFiniteLossError`.

On CUDA the update is skipped on the device and the host never waits for the result of a step: it
reads it during the next step, before that step's update. By then the weights are still those that
the bad step started from, so the file reproduces the step. On a CPU the result is read at once.
Gradients that overflow in float16 are not bad; the loss scaler handles them.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from detectron2.utils import comm
from torch import Tensor, nn

from ..files import atomic_writer
from ..modeling.layers.buffers import training_buffers
from ..structures import NoisedPredictions, Predictions
from .rng import rng_state

BOXES, LOGITS, GRAD_NORM = "predicted boxes", "class logits", "grad_norm"
LARGEST_BOX = 1e15  # pixels; the area of a larger box overflows float32
MAX_LISTED_PARAMETERS = 8
MAX_LISTED_FILES = 32


class NonFiniteLossError(FloatingPointError):
    """Training diverged; the message names iteration, terms, learning rate and images."""


@contextlib.contextmanager
def watch_predictions(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Counts the non-finite predictions of the ROI heads and replaces them by zeros.

    Matching and losses then work as usual, also in other processes that wait for this one.

    Args:
        model: not wrapped; a model without `roi_heads` is not watched.

    Yields:
        `BOXES` and `LOGITS` -> number of non-finite values so far, 0-dim tensors on the device;
        empty before the first forward pass.
    """
    counts: dict[str, Tensor] = {}
    if not hasattr(model, "roi_heads"):
        yield counts
        return
    handle = model.roi_heads.register_forward_hook(lambda *args: _replace_bad(args[-1], counts))
    try:
        yield counts
    finally:
        handle.remove()


def _replace_bad(predictions: Predictions, counts: dict[str, Tensor]) -> Predictions:
    valid = predictions.valid[..., None]
    good_boxes = predictions.boxes_xyxy.abs() <= LARGEST_BOX  # False for NaN
    good_logits = predictions.logits.isfinite()
    for name, good in ((BOXES, good_boxes), (LOGITS, good_logits)):
        counts[name] = counts.get(name, 0) + (~good & valid).sum()
    noised = predictions.noised
    if noised is not None:
        noised = NoisedPredictions(_replace_bad(noised.predictions, counts), noised.gt)
    return replace(
        predictions,
        logits=torch.where(good_logits, predictions.logits, 0),
        boxes_xyxy=torch.where(good_boxes, predictions.boxes_xyxy, 0),
        noised=noised,
    )


@dataclass
class _Step:
    """State and results of one step.

    Attributes:
        buffers: the values of the model's training buffers before the step.
        counts: of `watch_predictions`.
        numbers: losses, counts, gradient norm and, last, 1 if the step is bad in any process.
        names: of `numbers` but the last.
        arrived: recorded behind the copy of `numbers` to the host; None on a CPU.
        parameters: names of the parameters with a gradient.
        gradient_norms: (P,) norms of their gradients, on the device.
    """

    iteration: int
    batch: Sequence[dict[str, Any]]
    lr: float
    rng: dict[str, Any]
    buffers: list[Tensor]
    counts: dict[str, Tensor]
    numbers: Tensor | None = None
    names: tuple[str, ...] = ()
    arrived: torch.cuda.Event | None = None
    parameters: tuple[str, ...] = ()
    gradient_norms: Tensor | None = None

    def bad_parameters(self) -> list[str]:
        """Names of the parameters with a NaN or infinite gradient."""
        if not self.parameters:
            return []
        finite = self.gradient_norms.isfinite().tolist()
        return [name for name, good in zip(self.parameters, finite, strict=True) if not good]

    def describe(self, values: Mapping[str, float]) -> str:
        """Phrases for everything that is wrong with the step."""
        gradients = describe_gradients(self.bad_parameters())
        return "; ".join((*bad_inputs(self.batch), *describe_values(values), *gradients))


class NonFiniteGuard:
    """Ends training at the first bad step, before its update.

    Example:
        >>> with guard.step(iteration, batch):
        ...     losses = ...                        # forward and backward pass
        ...     bad = guard.examine(losses)
        ...     update_unless(optimizer, bad)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        folder: str | Path | None = None,
        config: str = "",
    ) -> None:
        """
        Args:
            model: not wrapped.
            optimizer: of the model's parameters.
            folder: receives `non_finite_<iteration>.pth`; None writes no file.
            config: the configuration as YAML, stored in that file.
        """
        self.model, self.optimizer = model, optimizer
        self.folder = None if folder is None else Path(folder)
        self.config = config
        # True: the host reads the result of a step during the next one.
        self.late = next(model.parameters()).is_cuda
        self._buffers = training_buffers(model)
        # Of this step and of the one before, whose result may still be pending.
        self._saved = [[x.detach().clone() for x in self._buffers] for _ in range(2)]
        self._parameters = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self._current: _Step | None = None
        self._pending: _Step | None = None

    @contextlib.contextmanager
    def step(self, iteration: int, batch: Sequence[dict[str, Any]]) -> Iterator[None]:
        """Surrounds one step: records what it starts from and watches its predictions.

        Args:
            iteration: number of the step.
            batch: images of this process.

        Raises:
            NonFiniteLossError: the block raised a `FloatingPointError`, as matchers do for costs
                that are not finite.
        """
        self._saved.reverse()
        if self._buffers:
            torch._foreach_copy_(self._saved[0], self._buffers)
        lr = max(group["lr"] for group in self.optimizer.param_groups)
        with watch_predictions(self.model) as counts:
            self._current = _Step(iteration, batch, lr, rng_state(), self._saved[0], counts)
            try:
                yield
            except NonFiniteLossError:
                raise
            except FloatingPointError as error:
                if comm.get_world_size() == 1:  # other processes do not get here
                    self.settle()
                what = "; ".join((str(error).rstrip("."), *bad_inputs(batch)))
                self._stop(self._current, what, file_names(batch), {})

    @torch.no_grad()
    def examine(self, losses: Mapping[str, Tensor], gradients: bool = True) -> Tensor:
        """Checks the results of forward and backward pass.

        Args:
            losses: name -> 0-dim tensor.
            gradients: check them too; False while they are scaled.

        Returns:
            0-dim bool on the device: True if the step is bad in any process.

        Raises:
            NonFiniteLossError: this step (on a CPU) or the one before (on CUDA) is bad.
        """
        step = self._current
        present = [(n, p.grad) for n, p in self._parameters if gradients and p.grad is not None]
        norms = gradient_norms([gradient for _, gradient in present])
        values = torch.stack([x.detach().float() for x in losses.values()])
        empty = values[:0]
        counts = torch.stack([x.float() for x in step.counts.values()]) if step.counts else empty
        total = torch.linalg.vector_norm(norms)[None] if present else empty
        bad = (~values.isfinite()).any() | (counts > 0).any() | (~total.isfinite()).any()
        any_bad = bad.float()
        if comm.get_world_size() > 1:
            torch.distributed.all_reduce(any_bad, torch.distributed.ReduceOp.MAX)
        step.names = (*losses, *step.counts, *([GRAD_NORM] if present else []))
        step.parameters = tuple(name for name, _ in present)
        step.gradient_norms = norms
        self._send(step, torch.cat((values, counts, total, any_bad[None])))
        self.settle()
        self._pending = step
        if not self.late:
            self.settle()
        return any_bad > 0

    def settle(self) -> None:
        """Reads the result of the last examined step, if it is still pending.

        Raises:
            NonFiniteLossError: the step is bad; raised in all processes.
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
        # Gradients are the same in all processes, everything else is a process's own.
        own = bool(bad_values(values) - {GRAD_NORM})
        # Every process gets here for the same step, so this collective call is safe.
        reports = comm.all_gather((own, file_names(step.batch), step.describe(values)))
        culprits = [text for bad, _, text in reports if bad]
        what = "; ".join(culprits or [reports[0][2]])
        files = [name for _, names, _ in reports for name in names]
        self._stop(step, what, files, values, write=own or not culprits)

    @staticmethod
    def _send(step: _Step, numbers: Tensor) -> None:
        """Starts the copy of the numbers to the host, without waiting for it."""
        if numbers.is_cuda:
            step.numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            step.numbers.copy_(numbers, non_blocking=True)
            step.arrived = torch.cuda.Event()
            step.arrived.record()
        else:
            step.numbers = numbers

    def _stop(
        self,
        step: _Step,
        what: str,
        files: Sequence[str],
        values: Mapping[str, float],
        write: bool = True,
    ) -> None:
        listed = ", ".join((*files[:MAX_LISTED_FILES], *["..."] * (len(files) > MAX_LISTED_FILES)))
        message = (
            f"training diverged at iteration {step.iteration}: {what}. Learning rate {step.lr:.4g};"
            f" images: {listed}. Lower SOLVER.BASE_LR or lengthen SOLVER.WARMUP_ITERS, keep "
            "SOLVER.CLIP_GRADIENTS on, and prefer SOLVER.AMP.DTYPE bfloat16 to float16."
        )
        if write and self.folder is not None:
            try:
                path = self._write(step, what, values)
                message += f" To reproduce the step: python tools/replay.py {path}"
            except (OSError, RuntimeError) as error:  # a full disk is either, depending on torch
                message += f" The step could not be written to {self.folder}: {error}"
        raise NonFiniteLossError(message)

    def _write(self, step: _Step, what: str, values: Mapping[str, float]) -> Path:
        rank = comm.get_rank()
        suffix = f"_rank{rank}" if rank else ""
        path = self.folder / f"non_finite_{step.iteration:07d}{suffix}.pth"
        saved = {id(b): s for b, s in zip(self._buffers, step.buffers, strict=True)}
        live = self.model.state_dict(keep_vars=True)
        state = {
            "iteration": step.iteration,
            "what": what,
            "values": dict(values),
            "parameters": step.bad_parameters(),
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
    """Writes NaN into a gradient where `bad` is True, so that a loss scaler skips the update."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    min(gradients, key=Tensor.numel).masked_fill_(bad, math.nan)


def update_unless(optimizer: torch.optim.Optimizer, bad: Tensor) -> None:
    """Updates the parameters unless `bad` is True; then weights and optimizer state are kept.

    On CUDA, fused optimizers decide on the device. For others (SGD) the host waits for `bad`.
    """
    if bad.is_cuda and getattr(optimizer, "_step_supports_amp_scaling", False):
        update_on_device(optimizer, bad)
    elif not bad:
        optimizer.step()


def update_on_device(optimizer: torch.optim.Optimizer, bad: Tensor) -> None:
    """`update_unless` for a fused optimizer, which reads `bad` in its kernel."""
    optimizer.found_inf = bad.float()
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf


def bad_values(values: Mapping[str, float]) -> set[str]:
    """Names of the non-finite losses and norms, and of the counts above 0."""
    return {
        name
        for name, value in values.items()
        if (value > 0 if name in (BOXES, LOGITS) else not math.isfinite(value))
    }


def describe_values(values: Mapping[str, float]) -> list[str]:
    """Phrases for bad predictions, non-finite losses and the gradient norm."""
    counts = {name: int(values[name]) for name in (BOXES, LOGITS) if values.get(name)}
    losses = {k: v for k, v in values.items() if k not in (BOXES, LOGITS, GRAD_NORM)}
    bad = [f"{name} = {value}" for name, value in losses.items() if not math.isfinite(value)]
    good = [f"{name} = {value:.4g}" for name, value in losses.items() if math.isfinite(value)]
    phrases = [f"{count} NaN or infinite number(s) in the {name}" for name, count in counts.items()]
    if bad:
        phrases.append(", ".join(bad) + (f" (finite: {', '.join(good)})" if good else ""))
    if GRAD_NORM in values:
        phrases.append(f"gradient norm {values[GRAD_NORM]:.4g}")
    return phrases


def describe_gradients(names: Sequence[str]) -> list[str]:
    """A phrase for the parameters with a bad gradient; an empty list if there are none."""
    if not names:
        return []
    more = len(names) - MAX_LISTED_PARAMETERS
    rest = f" and {more} more" if more > 0 else ""
    listed = ", ".join(names[:MAX_LISTED_PARAMETERS])
    return [f"NaN or infinite gradient of {listed}{rest}"]


def bad_inputs(batch: Sequence[Mapping[str, Any]]) -> list[str]:
    """Phrases for images and ground-truth boxes that are not finite."""
    phrases = []
    for sample, name in zip(batch, file_names(batch), strict=True):
        tensors = {"image": sample.get("image")}
        if "instances" in sample:
            tensors["ground-truth boxes"] = sample["instances"].gt_boxes.tensor
        for kind, tensor in tensors.items():
            if isinstance(tensor, Tensor) and not tensor.isfinite().all():
                count = int((~tensor.isfinite()).sum())
                phrases.append(f"the {kind} of {name} came with {count} NaN or infinite number(s)")
    return phrases


def file_names(batch: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Names of the images of a batch, for messages."""
    return tuple(str(x.get("file_name", x.get("image_id", "without a name"))) for x in batch)


def pack_sample(sample: Mapping[str, Any]) -> dict[str, Any]:
    """Converts a training sample to tensors, numbers and strings."""
    packed = {k: v for k, v in sample.items() if isinstance(v, Tensor | str | int | float)}
    if "instances" in sample:
        instances = sample["instances"]
        packed["instances"] = {
            "image_size": tuple(int(side) for side in instances.image_size),
            "gt_boxes": instances.gt_boxes.tensor.clone(),
            "gt_classes": instances.gt_classes.clone(),
        }
    return packed
