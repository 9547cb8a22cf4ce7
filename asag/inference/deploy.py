"""Making a trained detector fast: norms folded into convolutions, memory format, half precision,
compilation.

Whatever is chosen, the detector stays a detector: same inputs, same outputs, boxes and scores in
float32.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from detectron2.layers import FrozenBatchNorm2d
from torch import Tensor, nn

from ..modeling.backbone import TimmBackbone
from ..modeling.execution import compile_components, use_channels_last
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
        compile: `torch.compile` for what does the work, see `compile_components`.

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
        use_channels_last(model.backbone)
    model.inference_dtype = dtype
    if compile:
        compile_components(model.backbone, model.neck, model.proposal_generator, model.roi_heads)
    return model


@torch.no_grad()
def fold_batch_norms(module: nn.Module) -> int:
    """Multiplies batch norms into the weights of the convolutions in front of them, in place.

    Norms with fixed statistics are linear: what follows a convolution can be part of it. Norms that
    depend on the input (GroupNorm, LayerNorm) stay, and so do those of timm's networks that follow
    no convolution.

    Returns:
        How many norms are gone.
    """
    networks = [x for x in module.modules() if isinstance(x, TimmBackbone)]
    if networks:
        from ..modeling.backbone.merged_norms import separate_norms  # needs timm

        separate_norms(module)
    folded = 0
    for conv in module.modules():
        norm = getattr(conv, "norm", None)
        if isinstance(conv, nn.Conv2d) and isinstance(norm, NORMS):
            _fold(conv, norm)
            conv.norm = None
            folded += 1
    for network in networks:
        pairs = _convolutions_and_norms(network)
        names = {norm: name for name, norm in network.named_modules()}
        for conv, norm in pairs:
            _fold(conv, norm)
            parent, _, child = names[norm].rpartition(".")
            # timm's norms often hold the activation behind them.
            setattr(network.get_submodule(parent), child, getattr(norm, "act", nn.Identity()))
        folded += len(pairs)
    return folded


def merge_frozen_norms(module: nn.Module) -> int:
    """Merges the frozen norms of timm backbones into the preceding convolutions, in place, for
    faster training and inference: same parameters, same results up to rounding.

    Returns:
        Number of merged norms.
    """
    networks = [x for x in module.modules() if isinstance(x, TimmBackbone)]
    if not networks:
        return 0
    from ..modeling.backbone.merged_norms import merge_norms  # needs timm

    merged = 0
    for network in networks:
        training = network.training
        pairs = _convolutions_and_norms(network.eval())
        network.train(training)
        merged += merge_norms(pairs)
    return merged


def _fold(conv: nn.Conv2d, norm: nn.Module) -> None:
    scale, shift = affine_of(norm)
    bias = shift if conv.bias is None else conv.bias * scale + shift
    conv.weight.copy_(conv.weight * scale[:, None, None, None])
    conv.bias = nn.Parameter(bias.to(conv.weight.dtype), requires_grad=False)


def _convolutions_and_norms(network: TimmBackbone) -> list[tuple[nn.Conv2d, nn.Module]]:
    """Pairs of a convolution and the norm that is the only reader of its output.

    In a network of timm both are modules of their own, and their order is known only when it runs:
    the graph that autograd records has every reader of an output.
    """
    from timm import layers
    from torchvision.ops.misc import FrozenBatchNorm2d as TorchvisionFrozen

    # Exactly these: subclasses compute something else with the same parameters.
    frozen = (TorchvisionFrozen, layers.FrozenBatchNormAct2d)
    trained = (nn.BatchNorm2d, layers.BatchNormAct2d, nn.SyncBatchNorm, layers.SyncBatchNormAct)
    runs: Counter[nn.Module] = Counter()
    conv_of: dict[Any, nn.Conv2d] = {}
    norm_inputs: list[tuple[Any, nn.Module]] = []

    def after_conv(conv: nn.Module, _inputs: Any, output: Tensor) -> None:
        runs[conv] += 1
        conv_of[output.grad_fn] = conv

    def before_norm(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        runs[norm] += 1
        norm_inputs.append((inputs[0].grad_fn, norm))

    handles = []
    for module in network.modules():
        if type(module) in (nn.Conv2d, layers.Conv2dSame):
            handles.append(module.register_forward_hook(after_conv))
        elif type(module) in (*frozen, *trained):
            handles.append(module.register_forward_pre_hook(before_norm))
    weight = next(network.parameters())
    side = 2 * network.size_divisibility
    with torch.enable_grad():
        image = torch.zeros(1, 3, side, side, device=weight.device, dtype=weight.dtype)
        outputs = network(image.requires_grad_())
    for handle in handles:
        handle.remove()
    readers = _readers(list(outputs.values()))
    return [
        (conv_of[node], norm)
        for node, norm in norm_inputs
        if node in conv_of and readers[node] == runs[conv_of[node]] == runs[norm] == 1
    ]


def _readers(outputs: list[Tensor]) -> Counter[Any]:
    """Counts the readers of each node of autograd's graph; the caller of an output is one."""
    readers = Counter(x.grad_fn for x in outputs)
    waiting = list(readers)
    while waiting:
        following = [x for x, _ in waiting.pop().next_functions if x is not None]
        waiting += [x for x in set(following) if x not in readers]
        readers.update(following)
    return readers


def affine_of(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Scale and shift (C,) of a batch norm in evaluation mode: norm(x) = scale x + shift."""
    scale = (norm.running_var + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -norm.running_mean * scale
    return scale, shift if norm.bias is None else shift + norm.bias
