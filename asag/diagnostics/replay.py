"""Replay of a training step with NaN or infinite numbers, from the file that training wrote."""

from __future__ import annotations

import dataclasses
import functools
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from ..config import get_asag_cfg
from ..engine.non_finite import (
    BOXES,
    GRAD_NORM,
    LARGEST_BOX,
    bad_inputs,
    bad_values,
    describe_gradients,
    describe_values,
    file_names,
    gradient_norms,
    watch_predictions,
)
from ..engine.optimizer import build_optimizer
from ..engine.rng import preserved_rng, set_rng_state
from ..engine.step import TrainStep, amp_dtype

FIELDS = ("iteration", "what", "values", "parameters", "learning_rate", "batch", "model", "rng")


@dataclass(frozen=True)
class Location:
    """The module in which non-finite numbers occur first.

    Attributes:
        module: its name, as in `named_modules`.
        kind: its class.
        count, total: non-finite numbers, and all numbers.
        spread: True if the input of the module was not finite already.
    """

    module: str
    kind: str
    count: int
    total: int
    spread: bool = False


@dataclass
class Replay:
    """Results of the replayed step.

    Attributes:
        values: losses, counts of non-finite predictions and the gradient norm, as far as computed.
        parameters: names of the parameters with a non-finite gradient.
        weights: names of the parameters that are not finite themselves.
        inputs: phrases for images and boxes that are not finite.
        error: of the matcher, if it raised one.
        forward, backward: where non-finite numbers, and non-finite gradients, occur first.
        reproduced: True if the same numbers are non-finite as in training.
    """

    values: dict[str, float] = field(default_factory=dict)
    parameters: list[str] = field(default_factory=list)
    weights: list[str] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)
    error: str | None = None
    forward: Location | None = None
    backward: Location | None = None
    reproduced: bool = False


def load_step(path: str | Path) -> dict[str, Any]:
    """Reads a `non_finite_<iteration>.pth` onto the CPU.

    Raises:
        ValueError: the file is not a recorded step; the message names it.
        OSError: it cannot be read.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(f"{path} is not a file of torch.save, or is damaged: {error}") from None
    keys = state.keys() if isinstance(state, Mapping) else ()
    missing = [name for name in (*FIELDS, "config") if name not in keys]
    if missing:
        raise ValueError(
            f"{path} lacks {', '.join(missing)}; expected a file that training writes for a step "
            "with NaN or infinite numbers: OUTPUT_DIR/non_finite_*.pth"
        )
    return state


def replay(state: Mapping[str, Any], device: str | None = None) -> Replay:
    """Repeats forward and backward pass of the recorded step; updates nothing.

    Args:
        state: of `load_step`.
        device: default: that of the training if it is available, else the CPU.
    """
    cfg = _config(state["config"], device)
    model = build_model(cfg)
    model.load_state_dict(state["model"])
    model.train()
    result = Replay(weights=[n for n, p in model.named_parameters() if not p.isfinite().all()])
    trace = _Trace(model)  # its hooks run before the watch's, which replaces bad predictions
    step = TrainStep(
        model,
        build_optimizer(cfg, model, clip_in_step=False),
        amp_dtype=amp_dtype(cfg),
        accumulate_steps=cfg.SOLVER.ACCUMULATE_STEPS,
    )
    batch = [unpack_sample(sample) for sample in state["batch"]]
    result.inputs = bad_inputs(batch)
    with preserved_rng(), watch_predictions(model) as counts:
        set_rng_state(state["rng"])
        try:
            losses = step.backward(batch)
        except FloatingPointError as error:
            losses, result.error = {}, str(error)
    result.values = {name: float(value) for name, value in (losses | counts).items()}
    named = [(n, p.grad) for n, p in model.named_parameters() if p.grad is not None]
    if result.error is None and not step.grad_scaler.is_enabled() and named:
        norms = gradient_norms([gradient for _, gradient in named])
        result.values[GRAD_NORM] = float(torch.linalg.vector_norm(norms))
        finite = norms.isfinite().tolist()
        result.parameters = [n for (n, _), good in zip(named, finite, strict=True) if not good]
    result.forward, result.backward = trace.forward, trace.backward
    result.reproduced = bad_values(result.values) == bad_values(state["values"])
    if not state["values"]:  # the matcher had raised an error
        result.reproduced = result.error is not None
    return result


def report(state: Mapping[str, Any], result: Replay) -> list[str]:
    """Lines for a terminal: the recorded step, the replayed one, and where to look."""
    files = ", ".join(file_names(state["batch"]))
    values = [result.error] if result.error else describe_values(result.values)
    lines = [
        f"iteration {state['iteration']}, learning rate {state['learning_rate']:.4g}, {files}",
        f"in training: {state['what']}",
        f"now: {'; '.join((*values, *describe_gradients(result.parameters)))}",
        "reproduced" if result.reproduced else "NOT reproduced: the numbers are different now",
        *result.inputs,
    ]
    if result.weights:
        lines.append(f"weights that are not finite already: {', '.join(result.weights[:8])}")
    if result.forward is not None:
        lines.append(f"first in the forward pass: {_phrase(result.forward, 'output')}")
        if result.forward.spread:
            lines.append("  its input was not finite already: check what is computed before it")
    if result.backward is not None:
        phrase = _phrase(result.backward, "gradient of the output")
        lines.append(f"first in the backward pass: {phrase}")
    elif result.parameters and result.forward is None:
        lines.append("first in the backward pass: in the losses, behind the last module")
    if result.forward is None and result.values.get(BOXES):
        lines.append(
            f"no module returned NaN or infinity: boxes are beyond {LARGEST_BOX:.0e} pixels, where "
            "areas overflow; the weights grew too fast, lower SOLVER.BASE_LR"
        )
    return lines


def unpack_sample(packed: Mapping[str, Any]) -> dict[str, Any]:
    """Restores a training sample from the result of `non_finite.pack_sample`."""
    sample = dict(packed)
    if "instances" in packed:
        content = packed["instances"]
        sample["instances"] = Instances(
            tuple(content["image_size"]),
            gt_boxes=Boxes(content["gt_boxes"]),
            gt_classes=content["gt_classes"],
        )
    return sample


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yields the floating-point tensors in nested lists, dicts and dataclasses."""
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
    """Records where non-finite numbers occur first, by hooks on every module.

    The hook of an inner module is called before that of the outer one.
    """

    def __init__(self, model: nn.Module) -> None:
        self.forward: Location | None = None
        self.backward: Location | None = None
        for name, module in model.named_modules():
            module.register_forward_hook(functools.partial(self._forward, name or "(model)"))

    def _forward(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        outputs = list(tensors_in(output))
        bad = sum(int((~x.isfinite()).sum()) for x in outputs)
        kind = type(module).__name__
        if bad and self.forward is None:
            spread = any(not x.isfinite().all() for x in tensors_in(inputs))
            total = sum(x.numel() for x in outputs)
            self.forward = Location(name, kind, bad, total, spread)
        for x in outputs:
            if x.requires_grad:
                x.register_hook(functools.partial(self._backward, name, kind))

    def _backward(self, name: str, kind: str, gradient: Tensor) -> None:
        if self.backward is None:
            bad = int((~gradient.isfinite()).sum())
            if bad:
                self.backward = Location(name, kind, bad, gradient.numel())


def _config(text: str, device: str | None) -> CfgNode:
    cfg = get_asag_cfg()
    cfg.set_new_allowed(True)  # keys of extensions of the library
    cfg.merge_from_other_cfg(CfgNode.load_cfg(text))
    cfg.MODEL.COMPILE = False  # compiled parts call no hooks
    if device is not None:
        cfg.MODEL.DEVICE = device
    elif cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    if cfg.MODEL.DEVICE == "cpu" and cfg.SOLVER.AMP.DTYPE == "float16":
        cfg.SOLVER.AMP.ENABLED = False
    return cfg


def _phrase(location: Location, what: str) -> str:
    return (
        f"{location.module} ({location.kind}), {location.count} of {location.total} numbers of "
        f"its {what}"
    )
