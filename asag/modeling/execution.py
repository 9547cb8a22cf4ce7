"""Execution of a detector: memory format, activation checkpointing and compilation.

The functions change components in place and keep their parameter names. The constructor
of `SparseDetector` has no arguments for them; its `from_config` applies the switches of the
configuration to the components.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from .backbone import ZeroPadding
from .backbone.parts import backbone_stages
from .layers.checkpointing import recompute
from .layers.exporting import is_exporting


def apply_execution_switches(
    cfg: CfgNode,
    *,
    backbone: nn.Module,
    neck: nn.Module | None,
    proposal_generator: nn.Module,
    roi_heads: nn.Module,
    zero_padding: ZeroPadding | None = None,
) -> None:
    """Applies `MODEL.CHANNELS_LAST`, `MODEL.ACTIVATION_CHECKPOINTING` and `MODEL.COMPILE`.

    Args:
        cfg: the configuration.
        backbone, neck, proposal_generator, roi_heads, zero_padding: components of a
            `SparseDetector`.

    Raises:
        ValueError: activation checkpointing and compilation are both on.
    """
    if cfg.MODEL.ACTIVATION_CHECKPOINTING and cfg.MODEL.COMPILE:
        raise ValueError(
            "MODEL.ACTIVATION_CHECKPOINTING and MODEL.COMPILE are both on; switch one of them off "
            "(torch.compile decides by itself what it computes again)"
        )
    if cfg.MODEL.CHANNELS_LAST:
        use_channels_last(backbone)
    if cfg.MODEL.ACTIVATION_CHECKPOINTING:
        recompute_activations(backbone, neck, roi_heads, zero_padding)
    if cfg.MODEL.COMPILE:
        compile_components(backbone, neck, proposal_generator, roi_heads)


def use_channels_last(backbone: nn.Module) -> None:
    """Switches the weights of a backbone and its input images to the NHWC memory format."""
    backbone.to(memory_format=torch.channels_last)
    backbone.register_forward_pre_hook(_to_channels_last)


def _to_channels_last(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    if is_exporting():  # memory formats are for the runtime to choose
        return None
    return (inputs[0].contiguous(memory_format=torch.channels_last), *inputs[1:])


def recompute_activations(
    backbone: nn.Module,
    neck: nn.Module | None,
    roi_heads: nn.Module,
    zero_padding: ZeroPadding | None = None,
) -> None:
    """Switches backbone stages, encoder layers and decoder stages to activation checkpointing."""
    # The hooks of the backbone depend on the padding of the batch.
    situation = zero_padding.situation if zero_padding else None
    for stage in backbone_stages(backbone):
        recompute(stage, situation)
    for layer in (*_encoder_layers(neck), *roi_heads.stages):
        recompute(layer)


def compile_components(
    backbone: nn.Module,
    neck: nn.Module | None,
    proposal_generator: nn.Module,
    roi_heads: nn.Module,
) -> None:
    """Compiles the backbone, encoder layers, decoder stages, and the modules that a proposal
    generator lists in `compilable`."""
    proposing = getattr(proposal_generator, "compilable", ())
    for module in (backbone, *_encoder_layers(neck), *proposing, *roi_heads.stages):
        module.compile()


def _encoder_layers(neck: nn.Module | None) -> Iterator[nn.Module]:
    yield from getattr(neck, "layers", ())
