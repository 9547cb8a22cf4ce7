"""A step with NaN or infinite numbers, run again from the file that the training left behind."""

from __future__ import annotations

import dataclasses
import functools
import math
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import Tensor, nn

from ..config import get_asag_cfg
from ..engine.bad_numbers import (
    BOXES,
    GRAD_NORM,
    LOGITS,
    bad_inputs,
    describe_gradients,
    describe_values,
    unpack_sample,
)
from ..engine.loss_log import file_names
from ..engine.non_finite import LARGEST_BOX, PredictionWatch, gradient_norms
from ..engine.optimizer import build_optimizer
from ..engine.rng import preserved_rng, set_rng_state
from ..engine.step import TrainStep, amp_dtype

FIELDS = ("iteration", "what", "values", "parameters", "learning_rate", "batch", "model", "rng")


@dataclass(frozen=True)
class Place:
    """Where in the model bad numbers came up first.

    Attributes:
        module: its name, as in `named_modules`.
        kind: its class.
        count, total: bad numbers, and all of them.
        spread: True where what entered the module was bad already.
    """

    module: str
    kind: str
    count: int
    total: int
    spread: bool = False


@dataclass
class Replay:
    """What the second run found.

    Attributes:
        values: losses, counts of bad predictions and the gradient's norm, as far as it came.
        parameters: those with a bad gradient.
        weights: those that are bad themselves.
        inputs: phrases for images and boxes that are bad.
        error: of the matching, if it gave up.
        forward, backward: where bad numbers, and bad gradients, came up first.
        reproduced: whether it came to the same as in the training.
    """

    values: dict[str, float] = field(default_factory=dict)
    parameters: list[str] = field(default_factory=list)
    weights: list[str] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)
    error: str | None = None
    forward: Place | None = None
    backward: Place | None = None
    reproduced: bool = False


def load_step(path: str | Path) -> dict[str, Any]:
    """The content of a `non_finite_<iteration>.pth`, on the CPU.

    Raises:
        ValueError: it is no such file; the message names it.
        OSError: it cannot be read.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(f"{path} is no file of torch.save, or a broken one: {error}") from None
    keys = state.keys() if isinstance(state, Mapping) else ()
    missing = [name for name in (*FIELDS, "config") if name not in keys]
    if missing:
        raise ValueError(
            f"{path} lacks {', '.join(missing)}: it is not what a training writes about a step "
            "with NaN or infinite numbers (OUTPUT_DIR/non_finite_*.pth)"
        )
    return state


def replay(state: Mapping[str, Any], device: str | None = None) -> Replay:
    """Forward and backward pass of the recorded step; nothing is updated.

    Args:
        state: of `load_step`.
        device: default: that of the training if it is here, else the CPU.
    """
    cfg = _config(state["config"], device)
    model = build_model(cfg)
    model.load_state_dict(state["model"])
    model.train()
    found = Replay(weights=[n for n, p in model.named_parameters() if not p.isfinite().all()])
    trace = _Trace(model)  # before the watch, which hides bad predictions
    watch = PredictionWatch(model)
    step = TrainStep(
        model,
        build_optimizer(cfg, model, clip_in_step=False),
        amp_dtype=amp_dtype(cfg),
        accumulate_steps=cfg.SOLVER.ACCUMULATE_STEPS,
    )
    batch = [unpack_sample(sample) for sample in state["batch"]]
    found.inputs = bad_inputs(batch)
    with preserved_rng():
        set_rng_state(state["rng"])
        try:
            losses = step.backward(batch)
        except FloatingPointError as error:
            losses, found.error = {}, str(error)
    found.values = {name: float(value) for name, value in (losses | watch.counts).items()}
    named = [(n, p.grad) for n, p in model.named_parameters() if p.grad is not None]
    if found.error is None and not step.grad_scaler.is_enabled() and named:
        norms = gradient_norms([gradient for _, gradient in named])
        found.values[GRAD_NORM] = float(torch.linalg.vector_norm(norms))
        finite = norms.isfinite().tolist()
        found.parameters = [n for (n, _), good in zip(named, finite, strict=True) if not good]
    found.forward, found.backward = trace.forward, trace.backward
    found.reproduced = _signature(found.values) == _signature(state["values"])
    if not state["values"]:  # the matching had given up
        found.reproduced = found.error is not None
    return found


def report(state: Mapping[str, Any], found: Replay) -> list[str]:
    """Lines for people."""
    files = ", ".join(file_names(state["batch"]))
    again = [found.error] if found.error else describe_values(found.values)
    lines = [
        f"iteration {state['iteration']}, learning rate {state['learning_rate']:.4g}, {files}",
        f"in the training: {state['what']}",
        f"now: {'; '.join((*again, *describe_gradients(found.parameters)))}",
        "reproduced" if found.reproduced else "NOT reproduced: now the numbers came out otherwise",
        *found.inputs,
    ]
    if found.weights:
        lines.append(f"weights that are bad already: {', '.join(found.weights[:8])}")
    if found.forward is not None:
        lines.append(f"first in the forward pass: {_phrase(found.forward, 'output')}")
        if found.forward.spread:
            lines.append("  what entered it was bad already: look at what is computed before it")
    if found.backward is not None:
        phrase = _phrase(found.backward, "gradient of the output")
        lines.append(f"first in the backward pass: {phrase}")
    elif found.parameters and found.forward is None:
        lines.append("first in the backward pass: behind the last module, in the losses")
    if found.forward is None and found.values.get(BOXES):
        lines.append(
            f"no module gave NaN or infinity: boxes are beyond {LARGEST_BOX:.0e} pixels, where "
            "areas end; the weights grew too fast, lower SOLVER.BASE_LR"
        )
    return lines


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Floating-point tensors in nested lists, dicts and dataclasses."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from tensors_in(vars(value))


class _Trace:
    """Remembers where bad numbers come up first, by hooks on every module: that of an inner module
    is called before that of the outer one."""

    def __init__(self, model: nn.Module) -> None:
        self.forward: Place | None = None
        self.backward: Place | None = None
        for name, module in model.named_modules():
            module.register_forward_hook(functools.partial(self._forward, name or "(model)"))

    def _forward(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        outputs = list(tensors_in(output))
        bad = sum(int((~x.isfinite()).sum()) for x in outputs)
        kind = type(module).__name__
        if bad and self.forward is None:
            spread = any(not x.isfinite().all() for x in tensors_in(inputs))
            total = sum(x.numel() for x in outputs)
            self.forward = Place(name, kind, bad, total, spread)
        for x in outputs:
            if x.requires_grad:
                x.register_hook(functools.partial(self._backward, name, kind))

    def _backward(self, name: str, kind: str, gradient: Tensor) -> None:
        if self.backward is None:
            bad = int((~gradient.isfinite()).sum())
            if bad:
                self.backward = Place(name, kind, bad, gradient.numel())


def _config(text: str, device: str | None) -> CfgNode:
    cfg = get_asag_cfg()
    cfg.set_new_allowed(True)  # keys of those who extend the library
    cfg.merge_from_other_cfg(CfgNode.load_cfg(text))
    cfg.MODEL.COMPILE = False  # compiled parts call no hooks
    if device is not None:
        cfg.MODEL.DEVICE = device
    elif cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    if cfg.MODEL.DEVICE == "cpu" and cfg.SOLVER.AMP.DTYPE == "float16":
        cfg.SOLVER.AMP.ENABLED = False
    return cfg


def _signature(values: Mapping[str, float]) -> set[str]:
    """Names of what is bad."""
    return {
        name
        for name, value in values.items()
        if (value > 0 if name in (BOXES, LOGITS) else not math.isfinite(value))
    }


def _phrase(place: Place, what: str) -> str:
    return f"{place.module} ({place.kind}), {place.count} of {place.total} numbers of its {what}"
