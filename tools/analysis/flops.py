"""Counts multiply-adds and parameters of a detector by component.

fvcore's counter traces one forward pass; rules for attention and batched products are added.
Convolutions, linear layers and matrix products count one for each multiply-add; norms and
upsampling follow the rules of fvcore; RoIAlign, softmax and element-wise arithmetic are not
counted, as in the figures of the papers.

B images, H heads, N queries, M keys, D channels of one head.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from asag.structures import ImageSizes

import torch
from fvcore.nn import FlopCountAnalysis
from fvcore.nn.jit_handles import get_shape
from torch import Tensor, nn

from . import free_convolutions

PRODUCTS = ("conv", "linear", "addmm", "bmm", "matmul", "einsum", "baddbmm", "attention")
"""Operators whose count is in multiply-adds: two floating point operations each."""


@dataclass(frozen=True)
class Count:
    """Multiply-adds of one forward pass of one image.

    Attributes:
        macs: the sum of fvcore: multiply-adds of products plus operations of norms.
        flops: floating point operations: products twice, norms and upsampling once.
        by_module: multiply-adds of every module by its dotted name, "" for all.
        by_operator: the same by operator.
        uncounted: operators that have no rule, with the number of their calls.
    """

    macs: float
    flops: float
    by_module: dict[str, float]
    by_operator: dict[str, float]
    uncounted: dict[str, int]


class _Raw(nn.Module):
    """Maps an image to feature maps and raw predictions, which the tracer can follow."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        features: list[Tensor] = []

        def keep(_module: nn.Module, _inputs: object, output: dict[str, Tensor]) -> None:
            features.extend(output.values())

        # The tracer drops operations that no output depends on. Pyramid levels without a box are
        # computed all the same, so the maps are outputs too.
        handle = self.model.backbone.register_forward_hook(keep)
        images = self.model.preprocess_images([{"image": image}])
        predictions, _ = self.model.forward_stages(images.tensor, ImageSizes.from_images(images))
        handle.remove()
        return *features, predictions.logits, predictions.boxes_xyxy


def count_flops(model: nn.Module, height: int, width: int) -> Count:
    """Counts one forward pass without pre- and postprocessing.

    Args:
        model: a detector with `preprocess_images` and `predict`; switched to evaluation.
        height, width: of the image in pixels, before padding.
    """
    image = torch.zeros(3, height, width, device=model.device)
    counter = FlopCountAnalysis(_Raw(model.eval()), image)
    counter.set_op_handle(
        "aten::scaled_dot_product_attention", _attention, "aten::baddbmm", _batched_product
    )
    counter.set_op_handle(free_convolutions.OPERATOR, free_convolutions.count)
    counter.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    counter.tracer_warnings("none")
    with warnings.catch_warnings(), _quiet("fvcore"), torch.no_grad():
        warnings.simplefilter("ignore")
        by_operator = {name: float(n) for name, n in counter.by_operator().items()}
    own = "model"
    by_module = {
        name.removeprefix(own).removeprefix("."): float(n)
        for name, n in counter.by_module().items()
        if name.split(".")[0] == own
    }
    macs = by_module[""] = sum(by_operator.values())
    twice = sum(n for name, n in by_operator.items() if name in PRODUCTS)
    return Count(macs, macs + twice, by_module, by_operator, dict(counter.unsupported_ops()))


@dataclass(frozen=True)
class Component:
    """A part of the model: the module `inside`, excluding the module `without` if it is given."""

    name: str
    inside: str
    without: str | None = None

    def count_parameters(self, model: nn.Module) -> tuple[int, int]:
        """Returns the number of parameters, and of those that are trained."""
        excluded = [model.get_submodule(self.without)] if self.without else []
        return count_parameters(model.get_submodule(self.inside), excluded)

    def macs(self, count: Count) -> float:
        """Returns the multiply-adds of one image."""
        spared = count.by_module[self.without] if self.without else 0.0
        return count.by_module[self.inside] - spared


def components(model: nn.Module) -> Iterator[Component]:
    """Yields the components that have parameters.

    A feature pyramid that wraps its network (Detectron2's `FPN`) is split into "backbone", the
    network, and "neck", the layers on top of it.
    """
    for name, child in model.named_children():
        if name == "backbone" and isinstance(getattr(child, "bottom_up", None), nn.Module):
            yield Component("backbone", "backbone.bottom_up")
            yield Component("neck", "backbone", without="backbone.bottom_up")
        elif any(True for _ in child.parameters()):
            yield Component(name, name)


def count_parameters(module: nn.Module, excluded: Sequence[nn.Module] = ()) -> tuple[int, int]:
    """Counts distinct parameters outside `excluded`: all, and those that are trained."""
    spared = {id(p) for other in excluded for p in other.parameters()}
    counted = [p for p in module.parameters() if id(p) not in spared]
    return sum(p.numel() for p in counted), sum(p.numel() for p in counted if p.requires_grad)


class _quiet:
    """Silences a logger within a block."""

    def __init__(self, name: str) -> None:
        self.logger = logging.getLogger(name)

    def __enter__(self) -> None:
        self.level = self.logger.level
        self.logger.setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        self.logger.setLevel(self.level)


def _attention(inputs: list[Any], outputs: list[Any]) -> dict[str, float]:
    """Counts q k^T and the weighted sum of values: (B, H, N, D) by (B, H, M, D)."""
    query, key, value = (get_shape(x) for x in inputs[:3])
    return {"attention": prod(query[:-1]) * key[-2] * (query[-1] + value[-1])}


def _batched_product(inputs: list[Any], outputs: list[Any]) -> dict[str, float]:
    """Counts input + a @ b with a (B, N, D) and b (B, D, M)."""
    left, right = get_shape(inputs[1]), get_shape(inputs[2])
    return {"baddbmm": prod(left) * right[-1]}
