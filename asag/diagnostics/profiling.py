"""Profiling primitives: time by component, host waits, device time, and memory.

Components are timed by hooks on the modules that the pipeline calls; the forward pass is not
reimplemented here.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

COMPONENTS = ("backbone", "neck", "proposal_generator", "roi_heads", "matcher", "criterion")
"""Modules of a detector that are timed, if it has them."""
OTHER, DATA, BACKWARD, OPTIMIZER = "other", "data", "backward", "optimizer"


class PhaseTimer:
    """Splits the time of a forward pass or training step into phases that sum to the total.

    Each component of the model is a phase; the time of a component called within another one is
    not counted twice. A training forward is followed by "backward", and by "optimizer" from
    gradient clipping (wrapped with `as_optimizer`) or the update on; everything else, such as pre-
    and postprocessing, is "other". Callers mark further phases, such as the wait for a batch, with
    `turn_to`.

    On CUDA the marks are events in the stream, read after the step: timing adds no synchronization,
    and a phase includes the time in which the device was idle. Use as a context manager:

        with PhaseTimer(model, optimizer) as timer:
            milliseconds = timer.measure(lambda: step(batch))
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        self.model = model
        self.optimizer = optimizer
        self.cuda = next(model.parameters()).device.type == "cuda"
        self.phases: list[str] = [OTHER]  # the innermost one is last
        self.marks: list[tuple[Any, str]] = []
        self._handles: list[Any] = []

    def __enter__(self) -> PhaseTimer:
        for name in COMPONENTS:
            component = getattr(self.model, name, None)
            if isinstance(component, nn.Module):
                self._handles.append(component.register_forward_pre_hook(self._enter(name)))
                self._handles.append(component.register_forward_hook(self._leave))
        self._handles.append(self.model.register_forward_pre_hook(self._forward_begins))
        self._handles.append(self.model.register_forward_hook(self._forward_done))
        if self.optimizer is not None:
            self._handles.append(self.optimizer.register_step_pre_hook(self._update_begins))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def measure(self, call: Callable[[], Any]) -> dict[str, float]:
        """Runs `call` and returns phase -> milliseconds, including "total"."""
        self.phases, self.marks = [OTHER], []
        if self.cuda:
            torch.cuda.synchronize()
        self._mark()
        call()
        self._mark()
        if self.cuda:
            torch.cuda.synchronize()
        spent: dict[str, float] = {}
        for (start, phase), (end, _) in pairwise(self.marks):
            spent[phase] = spent.get(phase, 0.0) + self._between(start, end)
        return spent | {"total": sum(spent.values())}

    def as_optimizer(self, function: Callable[..., Any] | None) -> Callable[..., Any] | None:
        """Wraps a function so that its time, and what follows, counts as "optimizer"."""
        if function is None:
            return None

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.turn_to(OPTIMIZER)
            return function(*args, **kwargs)

        return timed

    def turn_to(self, phase: str) -> None:
        """Counts everything that follows outside of the components as `phase`."""
        self.phases[0] = phase
        self._mark()

    def _mark(self) -> None:
        if self.cuda:
            now: Any = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self.marks.append((now, self.phases[-1]))

    def _between(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) if self.cuda else 1000 * (end - start)

    def _enter(self, name: str) -> Callable[..., None]:
        @torch.compiler.disable
        def enter(*_: object) -> None:
            self.phases.append(name)
            self._mark()

        return enter

    @torch.compiler.disable
    def _leave(self, *_: object) -> None:
        self.phases.pop()
        self._mark()

    def _forward_begins(self, *_: object) -> None:
        self.turn_to(OTHER)  # a later micro-batch follows a backward pass

    @torch.compiler.disable
    def _forward_done(self, *_: object) -> None:
        self.turn_to(BACKWARD if self.model.training else OTHER)

    def _update_begins(self, *_: object) -> None:
        self.turn_to(OPTIMIZER)


class _BlockingCopies(TorchFunctionMode):
    """Counts copies between host and device that the host waits for, by their Python calls.

    `.cpu()`, `.tolist()` and tensors created from Python numbers on a given device are counted on a
    CPU too, although nothing is copied there; `.to(another device)` is counted unless
    `non_blocking=True`.
    """

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if (
            func in (Tensor.cpu, Tensor.tolist)
            or (func is Tensor.new_tensor and not isinstance(args[1], Tensor))
            or (func in (torch.tensor, torch.as_tensor) and _made_on_device(args, kwargs))
            or (func is Tensor.to and _crosses(args[0], args[1:], kwargs))
        ):
            self.counts[name] += 1
        return func(*args, **kwargs)


def _made_on_device(args: tuple, kwargs: dict) -> bool:
    """Returns True if a tensor is created on a device from Python numbers or arrays."""
    return kwargs.get("device") is not None and not any(isinstance(x, Tensor) for x in args)


def _crosses(x: Tensor, args: tuple, kwargs: dict) -> bool:
    """Returns True if `x.to(...)` copies to another device and waits for it."""
    named = [*args, kwargs.get("device"), kwargs.get("other")]
    targets = [y.device if isinstance(y, Tensor) else y for y in named]
    elsewhere = any(
        torch.device(y).type != x.device.type for y in targets if isinstance(y, torch.device | str)
    )
    return elsewhere and not kwargs.get("non_blocking", len(args) > 2 and args[2])


class _DataDependent(TorchDispatchMode):
    """Counts operators whose result or output shape the host must read from the device."""

    OPERATORS = (
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "_unique2",
        "unique_dim",
        "equal",
    )

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in self.OPERATORS:
            self.counts[name] += 1
        elif name in ("index", "index_put", "index_put_"):
            masks = [x for x in args[1] if x is not None and x.dtype in (torch.bool, torch.uint8)]
            self.counts["index by mask"] += len(masks)
        return func(*args, **(kwargs or {}))


def host_waits(call: Callable[[], Any]) -> dict[str, int]:
    """Runs `call` and returns operation -> number of times that the host waits for the device.

    The count is that of an asynchronous device such as CUDA, on any device that `call` runs on.
    """
    counts: Counter[str] = Counter()
    with _BlockingCopies(counts), _DataDependent(counts):
        call()
    return {name: count for name, count in counts.items() if count}


def device_busy_ms(call: Callable[[], Any]) -> float:
    """Runs `call` and returns the milliseconds of its CUDA kernels.

    The result is 0 if torch's profiler has no access to the device.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    # The attribute had another name before torch 2.4.
    names = ("self_device_time_total", "self_cuda_time_total")
    events = profile.key_averages()
    return sum(next((getattr(e, n) for n in names if hasattr(e, n)), 0) for e in events) / 1000


def saved_bytes(model: nn.Module, call: Callable[[], Any]) -> int:
    """Runs a training step and returns the bytes of activations saved for the backward pass.

    Storage shared by several operations counts once; parameters and buffers do not count.
    """
    own = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return x.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        call()
    return sum(kept.values())


def resident_bytes(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> int:
    """Bytes of parameters, buffers, gradients and optimizer state."""
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [p.grad for p in model.parameters() if p.grad is not None]
    if optimizer is not None:
        state = (x for values in optimizer.state.values() for x in values.values())
        tensors += [x for x in state if isinstance(x, Tensor)]
    return sum(x.nbytes for x in {id(x): x for x in tensors}.values())
