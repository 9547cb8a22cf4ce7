"""Keeping padding at zero inside of a residual network, so that a batch changes nothing.

Images of a batch are padded with zeros, but behind the first norm the padding is zero no longer,
and every 3x3 convolution carries it one cell further into the image. An image then gets other
features in a batch than by itself.

B images, H x W cells.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from detectron2.modeling.backbone.resnet import BasicStem
from torch import Tensor, nn

from ...structures import ImageSizes
from ..layers.position_encoding import cell_mask

# The network halves the image this many times.
HALVINGS = 5


class ZeroPadding:
    """Clears the padding in front of every convolution and pooling that looks at neighbors.

    Works by hooks on the network, which cost nothing where no image is padded.

    Example:
        >>> zero_padding = ZeroPadding(backbone)
        >>> with zero_padding(sizes):
        ...     features = backbone(images)
    """

    def __init__(self, backbone: nn.Module) -> None:
        """
        Args:
            backbone: a `ResNet` of Detectron2 or a module around one.

        Raises:
            ValueError: there is no residual network inside.
        """
        self._masks: dict[tuple[int, int], Tensor] = {}
        stems = [x for x in backbone.modules() if isinstance(x, BasicStem)]
        if not stems:
            raise ValueError(
                "MODEL.EXACT_PADDING needs a residual network as backbone, MODEL.BACKBONE.NAME "
                f"built a {type(backbone).__name__}; set MODEL.EXACT_PADDING to False"
            )
        for stem in stems:  # its pooling is no module; ReLU in between keeps zeros
            stem.conv1.register_forward_hook(self._clear_output)
        spared = {stem.conv1 for stem in stems}  # the images themselves are padded with zeros
        for conv in backbone.modules():
            if isinstance(conv, nn.Conv2d) and max(conv.kernel_size) > 1 and conv not in spared:
                conv.register_forward_pre_hook(self._clear_input)

    @contextmanager
    def __call__(self, sizes: ImageSizes) -> Iterator[None]:
        """Clears the padding of a batch of these sizes in whatever the network does meanwhile."""
        with self._with_masks(padding_masks(sizes) if sizes.any_padding else {}):
            yield

    def situation(self) -> Callable[[], AbstractContextManager[None]]:
        """What brings the masks of this moment back, for a stage that is computed a second time."""
        return functools.partial(self._with_masks, self._masks)

    @contextmanager
    def _with_masks(self, masks: dict[tuple[int, int], Tensor]) -> Iterator[None]:
        before, self._masks = self._masks, masks
        try:
            yield
        finally:
            self._masks = before

    def _clear(self, x: Tensor) -> Tensor:
        mask = self._masks.get((x.shape[-2], x.shape[-1]))
        return x if mask is None else x * mask

    def _clear_input(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (self._clear(inputs[0]), *inputs[1:])

    def _clear_output(self, _module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        return self._clear(output)


def padding_masks(sizes: ImageSizes) -> dict[tuple[int, int], Tensor]:
    """(H, W) of every resolution of the network -> (B, 1, H, W) bool, False on padding.

    A stride of two keeps every cell that begins inside of the image: sides are halved and rounded
    up, those of the images like those of the batch.
    """
    masks = {}
    padded, cells = sizes.padded_hw, sizes.hw
    for _ in range(HALVINGS):
        padded = _halved(padded)
        cells = [_halved(hw) for hw in cells]
        masks[padded] = cell_mask(cells, padded, sizes.whwh.device)[:, None]
    return masks


def _halved(hw: tuple[int, int]) -> tuple[int, int]:
    return (hw[0] + 1) // 2, (hw[1] + 1) // 2
