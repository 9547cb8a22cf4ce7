"""Registries of the components that Detectron2 has none for, and building components by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.utils.registry import Registry
from torch import nn

NECK_REGISTRY = Registry("NECK")
NECK_REGISTRY.__doc__ = """
Modules `neck(features: dict[str, Tensor], sizes: ImageSizes) -> dict[str, Tensor]`, built from the
configuration and the backbone's output shapes, with an `output_shape()` like a backbone's.
Detectron2's FPN is part of the backbone and needs no neck.
"""

MATCHER_REGISTRY = Registry("MATCHER")
MATCHER_REGISTRY.__doc__ = """
Modules `matcher(predictions: Predictions, targets: Targets) -> assignment`, (S, B, N) int64: the
index of the ground truth assigned to each prediction, -1 for background. Called without gradient.
"""

CRITERION_REGISTRY = Registry("CRITERION")
CRITERION_REGISTRY.__doc__ = """
Modules `criterion(predictions: Predictions, targets: Targets, assignment) -> dict of weighted
scalar losses`; `assignment` (S, B, N) is the result of a matcher.
"""


def build_neck(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> nn.Module | None:
    """Builds the neck named by `MODEL.NECK.NAME`; None if the name is empty."""
    if not cfg.MODEL.NECK.NAME:
        return None
    return build_component(NECK_REGISTRY, "MODEL.NECK.NAME", cfg.MODEL.NECK.NAME, cfg, input_shape)


def build_matcher(cfg: CfgNode) -> nn.Module:
    """Builds the matcher named by `MODEL.MATCHER.NAME`."""
    return build_component(MATCHER_REGISTRY, "MODEL.MATCHER.NAME", cfg.MODEL.MATCHER.NAME, cfg)


def build_criterion(cfg: CfgNode) -> nn.Module:
    """Builds the criterion named by `MODEL.CRITERION.NAME`."""
    return build_component(
        CRITERION_REGISTRY, "MODEL.CRITERION.NAME", cfg.MODEL.CRITERION.NAME, cfg
    )


def build_component(registry: Registry, key: str, name: str, *args: Any) -> Any:
    """Builds `registry[name](*args)`.

    Raises:
        ValueError: `name` is not registered. The message names the configuration key and the
            choices.
    """
    check_choice(key, name, tuple(sorted(known for known, _ in registry)))
    return registry.get(name)(*args)


def check_choice(key: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Raises ValueError that names the configuration key if `value` is not one of `choices`."""
    if value not in choices:
        allowed = ", ".join(map(repr, choices))
        raise ValueError(f"{key} is {value!r}; it must be one of: {allowed}")


def check_features(
    key: str, names: Sequence[str], input_shape: Mapping[str, ShapeSpec], dim: int
) -> None:
    """Checks the feature maps that a component reads.

    Args:
        key: configuration key that names the maps.
        names: value of that key.
        input_shape: feature maps of backbone and neck.
        dim: channels of the decoder, which all of these maps must have.

    Raises:
        ValueError: a map is missing, or has another number of channels.
    """
    missing = [name for name in names if name not in input_shape]
    if missing:
        raise ValueError(
            f"{key} is {list(names)}; it must name feature maps of backbone and neck: "
            f"{sorted(input_shape)}"
        )
    channels = {input_shape[name].channels for name in names}
    if channels != {dim}:
        raise ValueError(
            f"MODEL.DECODER.HIDDEN_DIM is {dim}; it must be the number of channels of the features "
            f"named by {key}, which have {sorted(channels)} (MODEL.FPN.OUT_CHANNELS)"
        )
