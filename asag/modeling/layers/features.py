"""Checks of the feature maps that a component asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from detectron2.layers import ShapeSpec


def check_features(
    key: str, names: Sequence[str], input_shape: Mapping[str, ShapeSpec], dim: int
) -> None:
    """Raises ValueError when maps named by configuration key `key` are missing, or have another
    width than the `dim` of the decoder."""
    missing = [name for name in names if name not in input_shape]
    if missing:
        raise ValueError(f"{key} names {missing}, but backbone and neck give {sorted(input_shape)}")
    channels = {input_shape[name].channels for name in names}
    if channels != {dim}:
        raise ValueError(
            f"MODEL.DECODER.HIDDEN_DIM is {dim}, but the features named by {key} have "
            f"{sorted(channels)} channels (MODEL.FPN.OUT_CHANNELS)"
        )
