"""Frozen batch norms of timm backbones, merged into the preceding convolutions at run time.

A frozen norm is linear: norm(conv(x)) = conv'(x) with weights w' = s w and bias t. conv' is
computed from the parameters in every forward pass, so training, saving and loading are unchanged.
It saves the norm's passes over the feature maps, which are memory-bound and expensive on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch.nn.functional as F
from timm.layers import Conv2dSame, FrozenBatchNormAct2d
from timm.layers.padding import pad_same
from torch import Tensor, nn


class _Merged:
    """Convolution with the frozen norm behind it."""

    # In a tuple: as an attribute of its own it would be registered, and saved, a second time.
    followed_by: tuple[FrozenBatchNormAct2d]

    def forward(self, x: Tensor) -> Tensor:
        (norm,) = self.followed_by
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        shift = norm.bias - norm.running_mean * scale
        if self.bias is not None:
            shift = shift + self.bias * scale
        return self.convolve(x, self.weight * scale[:, None, None, None], shift)


class MergedConv2d(_Merged, nn.Conv2d):
    """`nn.Conv2d` and norm."""

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return self._conv_forward(x, weight, bias)


class MergedConv2dSame(_Merged, Conv2dSame):
    """`Conv2dSame` (TensorFlow's padding) and norm."""

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        x = pad_same(x, self.kernel_size, self.stride, self.dilation)
        return F.conv2d(x, weight, bias, self.stride, (0, 0), self.dilation, self.groups)


class MergedNorm(FrozenBatchNormAct2d):
    """The remainder of the norm: dropout and activation."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(x))


MERGED = {
    nn.Conv2d: MergedConv2d,
    Conv2dSame: MergedConv2dSame,
    FrozenBatchNormAct2d: MergedNorm,
}
PLAIN = {merged: plain for plain, merged in MERGED.items()}


def merge_norms(pairs: Iterable[tuple[nn.Module, nn.Module]]) -> int:
    """Merges frozen norms into the preceding convolutions, in place; parameters keep their names.

    Args:
        pairs: (convolution, norm that is the only reader of its output). Pairs of other types
            than plain convolutions and timm's frozen norms are skipped.

    Returns:
        Number of merged norms.
    """
    matching = [(c, n) for c, n in pairs if type(c) in MERGED and type(n) is FrozenBatchNormAct2d]
    for conv, norm in matching:
        # Another class instead of another module: names, hooks and copies stay what they were.
        conv.__class__, norm.__class__ = MERGED[type(conv)], MergedNorm
        conv.followed_by = (norm,)
    return len(matching)


def separate_norms(module: nn.Module) -> None:
    """Reverts `merge_norms`, in place."""
    for part in module.modules():
        if type(part) in PLAIN:
            part.__class__ = PLAIN[type(part)]
            part.__dict__.pop("followed_by", None)
