"""Configuration keys that published weights depend on, kept in step with the model that has them.

Some implementations compute differently from others with the same parameters: MMDetection bounds
the change of a box on both sides, detrex keeps reference points further from the borders. A layout
(`NameTable.settings`) says which values its weights need. Modules say which of their attributes
such a value is: `SETTINGS`, configuration key -> attribute. Loading brings the two together.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from detectron2.config import CfgNode
from torch import nn


def model_settings(model: nn.Module) -> dict[str, Any]:
    """Value of every setting of a model, by configuration key."""
    return {
        key: getattr(module, attribute)
        for module in model.modules()
        for key, attribute in getattr(module, "SETTINGS", {}).items()
    }


def known_settings(model: nn.Module, wanted: Any) -> dict[str, Any]:
    """Those of the wanted values that a model has a place for; others, and what is no mapping of
    such values, are passed over."""
    if not isinstance(wanted, Mapping):
        return {}
    known = model_settings(model)
    return {k: v for k, v in wanted.items() if k in known and type(v) is type(known[k])}


def apply_settings(model: nn.Module, wanted: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Gives a model the values that its weights need.

    Args:
        model: in use or in training; only its attributes change.
        wanted: configuration key -> value, all of them known to the model.

    Returns:
        Configuration key -> (value before, value now) of what changed.
    """
    before = model_settings(model)
    for module in model.modules():
        for key, attribute in getattr(module, "SETTINGS", {}).items():
            if key in wanted:
                setattr(module, attribute, wanted[key])
    return {k: (before[k], value) for k, value in wanted.items() if before[k] != value}


def with_settings(cfg: CfgNode, wanted: Mapping[str, Any]) -> CfgNode:
    """A copy of a configuration that says what its weights need, frozen if the original is."""
    result = cfg.clone()
    result.defrost()
    for key, value in wanted.items():
        *parents, leaf = key.split(".")
        node = result
        for name in parents:
            node = node[name]
        node[leaf] = value
    if cfg.is_frozen():
        result.freeze()
    return result


def describe(changes: Mapping[str, tuple[Any, Any]]) -> str:
    """Changes in a line."""
    return ", ".join(f"{key} {new} (was {old})" for key, (old, new) in changes.items())
