"""One optimizer step and the log of its scalars, without waiting for the device.

A step covers mixed precision, gradient accumulation over A micro-batches, clipping and the check
for non-finite numbers.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..modeling.registry import check_choice
from .non_finite import NonFiniteGuard, poison_gradients, update_unless
from .optimizer import Clipper, gradient_norm

Sample = dict[str, Any]
AMP_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class TrainStep:
    """Forward pass, backward pass and update for one batch of this process.

    With accumulation the batch is split into A equal parts that share one update. A criterion
    normalizes its losses by the objects of the part it sees; the parts are therefore weighted by
    their share of the objects, which makes the accumulated gradient equal to that of the whole
    batch for every loss normalized by objects. (Other losses become the same weighted mean over the
    parts, and batch normalization uses the statistics of each part.)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        amp_dtype: torch.dtype | None = None,
        accumulate_steps: int = 1,
        clip: Clipper | None = None,
        guard: NonFiniteGuard | None = None,
    ) -> None:
        """
        Args:
            model: returns a dict of scalar losses for a list of samples; may be wrapped in DDP.
            optimizer: of the model's parameters.
            amp_dtype: dtype of autocast; None computes in the dtype of the parameters. float16
                scales the losses and skips an update whose gradients overflow.
            accumulate_steps: A, at least 1.
            clip: changes the gradients in place and returns the norm that they had before; None
                does not clip.
            guard: ends training at the first bad step; default: one that writes no file.

        Raises:
            ValueError: float16 without CUDA.
        """
        self.model = model
        self.optimizer = optimizer
        self.data_loader: Any = None  # Detectron2's trainer expects it here
        self.accumulate_steps = accumulate_steps
        self.clip = clip or gradient_norm
        self.guard = guard or NonFiniteGuard(unwrap(model), optimizer)
        self.device = next(model.parameters()).device
        self.amp_dtype = amp_dtype
        if amp_dtype is torch.float16 and self.device.type != "cuda":
            raise ValueError(
                "SOLVER.AMP.DTYPE is 'float16', which needs a CUDA device; "
                f"on {self.device.type} use 'bfloat16', or set SOLVER.AMP.ENABLED to False"
            )
        self.grad_scaler = _grad_scaler(enabled=amp_dtype is torch.float16)
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def __call__(self, batch: Sequence[Sample], iteration: int = 0) -> dict[str, Tensor]:
        """Updates the model once.

        Args:
            batch: images of this process.
            iteration: number of the step, for the message of a `NonFiniteLossError`.

        Returns:
            name -> 0-dim tensor on the model's device, detached: every loss of the model (of the
            whole batch), `total_loss`, `grad_norm` (L2 or SOLVER.CLIP_GRADIENTS.NORM_TYPE, over
            all gradients before clipping).

        Raises:
            ValueError: the batch cannot be split into equal parts.
            NonFiniteLossError: this step, or on CUDA the one before, is not finite.
        """
        self.optimizer.zero_grad(set_to_none=True)
        with self.guard.step(iteration, batch):
            logged = self.backward(batch)
            bad = self.guard.examine(logged, gradients=not self.grad_scaler.is_enabled())
            logged["grad_norm"] = self._update(bad)
        return logged

    def backward(self, batch: Sequence[Sample]) -> dict[str, Tensor]:
        """Accumulates the gradients of a batch and returns its losses and `total_loss`."""
        parts = split_batch(batch, self.accumulate_steps)
        weights = object_shares(parts, self.device) if len(parts) > 1 else None
        logged: dict[str, Tensor] = {}
        for i, part in enumerate(parts):
            with self._no_sync() if i < len(parts) - 1 else contextlib.nullcontext():
                with torch.autocast(
                    self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None
                ):
                    losses = self.model(part)
                values = torch.stack([loss.float() for loss in losses.values()])
                if weights is not None:
                    values = values * weights[i]
                total = values.sum()
                self.grad_scaler.scale(total).backward()
            for name, value in zip(
                (*losses, "total_loss"), (*values.detach(), total.detach()), strict=True
            ):
                logged[name] = logged[name] + value if name in logged else value
        return logged

    def _update(self, bad: Tensor) -> Tensor:
        """Clips the gradients and updates the weights unless `bad`; returns the gradient norm."""
        scaled = self.grad_scaler.is_enabled()
        if scaled:
            poison_gradients(self._parameters, bad)
        self.grad_scaler.unscale_(self.optimizer)
        norm = self.clip(self._parameters)
        if scaled:
            self.grad_scaler.step(self.optimizer)
        else:
            update_unless(self.optimizer, bad)
        self.grad_scaler.update()
        return norm

    def _no_sync(self) -> contextlib.AbstractContextManager[None]:
        """Keeps gradients local: the processes average them once a step, with the last part."""
        if isinstance(self.model, DistributedDataParallel):
            return self.model.no_sync()
        return contextlib.nullcontext()


class LossLog:
    """Keeps the scalars of recent steps on the device and copies them to the host in one go.

    All processes must add and collect at the same iterations.
    """

    def __init__(self) -> None:
        self._pending: list[tuple[int, tuple[str, ...], Tensor]] = []

    def add(self, iteration: int, scalars: dict[str, Tensor]) -> None:
        """Adds a step; copies nothing.

        Args:
            iteration: number of the step.
            scalars: 0-dim tensors of one device.
        """
        values = torch.stack([value.detach().float() for value in scalars.values()])
        self._pending.append((iteration, tuple(scalars), values))

    def collect(self) -> list[tuple[int, dict[str, float]]]:
        """Returns and forgets the steps added since the last call.

        Returns:
            Iteration and scalars of each step, averaged over the processes, oldest first.
        """
        pending, self._pending = self._pending, []
        if not pending:
            return []
        values = torch.cat([values for _, _, values in pending])
        if comm.get_world_size() > 1:
            torch.distributed.all_reduce(values)
            values = values / comm.get_world_size()
        numbers = iter(values.cpu().tolist())
        return [
            (iteration, dict(zip(names, itertools.islice(numbers, len(names)), strict=True)))
            for iteration, names, _ in pending
        ]


def unwrap(model: nn.Module) -> nn.Module:
    """Returns the model inside of DistributedDataParallel, or the model itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def split_batch(batch: Sequence[Sample], parts: int) -> list[Sequence[Sample]]:
    """Splits a batch into equal, consecutive parts.

    Raises:
        ValueError: the images do not divide evenly.
    """
    if len(batch) % parts or not batch:
        raise ValueError(
            f"SOLVER.ACCUMULATE_STEPS is {parts}, which does not divide the {len(batch)} image(s) "
            "of a process and step; change it or SOLVER.IMS_PER_BATCH"
        )
    size = len(batch) // parts
    return [batch[i : i + size] for i in range(0, len(batch), size)]


def object_shares(parts: Sequence[Sequence[Sample]], device: torch.device) -> Tensor:
    """Weight (A,) of each micro-batch: its normalizer divided by that of the whole batch.

    The normalizer is the criterion's: objects of a process, averaged over the processes, at least
    one.
    """
    counts = [sum(len(x["instances"]) for x in part if "instances" in x) for part in parts]
    objects = torch.tensor(counts, dtype=torch.float32).to(device, non_blocking=True)
    if comm.get_world_size() > 1:
        torch.distributed.all_reduce(objects)
        objects = objects / comm.get_world_size()
    return objects.clamp(min=1) / objects.sum().clamp(min=1)


def amp_dtype(cfg: CfgNode) -> torch.dtype | None:
    """Dtype of autocast; None if SOLVER.AMP.ENABLED is False.

    Raises:
        ValueError: an unknown SOLVER.AMP.DTYPE.
    """
    check_choice("SOLVER.AMP.DTYPE", cfg.SOLVER.AMP.DTYPE, tuple(AMP_DTYPES))
    return AMP_DTYPES[cfg.SOLVER.AMP.DTYPE] if cfg.SOLVER.AMP.ENABLED else None


def _grad_scaler(enabled: bool) -> Any:
    if hasattr(torch.amp, "GradScaler"):
        return torch.amp.GradScaler("cuda", enabled=enabled)
    return torch.cuda.amp.GradScaler(enabled=enabled)  # before torch 2.3
