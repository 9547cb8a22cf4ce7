"""Making a trained detector fast: norms folded into convolutions, memory format, half precision,
compilation.

Whatever is chosen, the detector stays a detector: same inputs, same outputs, boxes and scores in
float32.
"""

from __future__ import annotations

import torch
from detectron2.layers import FrozenBatchNorm2d
from torch import Tensor, nn

from ..modeling.meta_arch import SparseDetector
from ..modeling.registry import check_choice

NORMS = (FrozenBatchNorm2d, nn.BatchNorm2d, nn.SyncBatchNorm)


def prepare_for_inference(
    model: SparseDetector,
    *,
    fold_norms: bool = True,
    channels_last: bool = False,
    dtype: torch.dtype | None = None,
    compile: bool = False,
) -> SparseDetector:
    """Changes a detector in place, for inference only.

    Weights must have been loaded before: folded, they have no place for those of the norms.

    Args:
        model: with its final weights; it is put into evaluation mode.
        fold_norms: see `fold_norms`.
        channels_last: NHWC memory format in the backbone; pays off in half precision and on CPUs.
        dtype: of convolutions and matrix products, torch.bfloat16 or torch.float16; None keeps
            float32.
        compile: `torch.compile` for what does the work, see `SparseDetector.compile_parts`.

    Returns:
        The same model.

    Raises:
        ValueError: another `dtype`.
    """
    check_choice("dtype", dtype, (None, torch.bfloat16, torch.float16))
    model.eval().requires_grad_(False)
    if fold_norms:
        fold_batch_norms(model.backbone)
    if channels_last:
        model.use_channels_last()
    model.inference_dtype = dtype
    if compile:
        model.compile_parts()
    return model


@torch.no_grad()
def fold_batch_norms(module: nn.Module) -> int:
    """Multiplies the norms of Detectron2's convolutions into their weights, in place.

    Norms with fixed statistics are linear: what follows a convolution can be part of it. Norms that
    depend on the input (GroupNorm, LayerNorm) stay.

    Returns:
        How many norms are gone.
    """
    folded = 0
    for conv in module.modules():
        norm = getattr(conv, "norm", None)
        if isinstance(conv, nn.Conv2d) and isinstance(norm, NORMS):
            scale, shift = affine_of(norm)
            bias = shift if conv.bias is None else conv.bias * scale + shift
            conv.weight.copy_(conv.weight * scale[:, None, None, None])
            conv.bias = nn.Parameter(bias.to(conv.weight.dtype), requires_grad=False)
            conv.norm = None
            folded += 1
    return folded


def affine_of(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Scale and shift (C,) of a batch norm in evaluation mode: norm(x) = scale x + shift."""
    scale = (norm.running_var + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -norm.running_mean * scale
    return scale, shift if norm.bias is None else shift + norm.bias
