"""Keeping padding at zero inside of a convolutional network, so that a batch changes nothing.

Images of a batch are padded with zeros, but behind the first norm the padding is zero no longer,
and every 3x3 convolution carries it one cell further into the image. An image then gets other
features in a batch than by itself.

B images, H x W cells.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from detectron2.modeling.backbone.resnet import BasicStem
from torch import Tensor, nn

from ...structures import ImageSizes
from ..layers.position_encoding import cell_mask
from .timm_backbone import TimmBackbone

# The network halves the image this many times.
HALVINGS = 5
# Differences of features, relative to the largest, that count as rounding.
PROBE_TOLERANCE = 1e-4


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
            backbone: a `ResNet` of Detectron2, a `TimmBackbone`, or a module around one. A network
                of timm is tried out on noise, because it may look at the whole image somewhere.

        Raises:
            ValueError: there is no such network inside, or padding reaches its features all the
                same.
        """
        self._masks: dict[tuple[int, int], Tensor] = {}
        stems = [x for x in backbone.modules() if isinstance(x, BasicStem)]
        networks = [x for x in backbone.modules() if isinstance(x, TimmBackbone)]
        if not stems and not networks:
            raise ValueError(
                "MODEL.EXACT_PADDING needs a residual network or one of timm as backbone, "
                f"MODEL.BACKBONE.NAME built a {type(backbone).__name__}; set MODEL.EXACT_PADDING "
                "to False"
            )
        for stem in stems:  # its pooling is no module; ReLU in between keeps zeros
            stem.conv1.register_forward_hook(self._clear_output)
        spared = {stem.conv1 for stem in stems}  # the images themselves are padded with zeros
        for module in backbone.modules():
            if _looks_at_neighbors(module) and module not in spared:
                module.register_forward_pre_hook(self._clear_input)
        for network in networks:
            if self._leaks(network):
                raise ValueError(
                    f"MODEL.EXACT_PADDING: padding reaches the features of {network.name}, "
                    "though it is cleared in front of every convolution (attention, squeeze and "
                    "excitation and the like look at the whole image). Set MODEL.EXACT_PADDING to "
                    "False, or MODEL.TIMM.NAME to a network of plain convolutions"
                )

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

    @torch.no_grad()
    def _leaks(self, network: TimmBackbone) -> bool:
        """True if an image gets other features in a larger frame."""
        stride = network.size_divisibility
        generator = torch.Generator().manual_seed(0)
        # As high as its frame, so that the border of a frame counts as well.
        image = torch.rand(1, 3, 2 * stride, 2 * stride - 9, generator=generator)
        image = image.to(next(network.parameters()))
        training = network.training
        network.eval()
        features = []
        with _noisy_vectors(network, generator):
            for frame in ((2 * stride, 2 * stride), (3 * stride, 4 * stride)):
                images = image.new_zeros(1, 3, *frame)
                images[..., : image.shape[2], : image.shape[3]] = image
                with self(ImageSizes.from_hw([tuple(image.shape[2:])], frame, device=image.device)):
                    features.append(network(images))
        network.train(training)
        for name, shape in network.output_shape().items():
            rows, columns = (-(-side // shape.stride) for side in image.shape[2:])
            small, large = (x[name][..., :rows, :columns] for x in features)
            if not (small - large).abs().max() <= PROBE_TOLERANCE * small.abs().max():
                return True
        return False


def _looks_at_neighbors(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return max(module.kernel_size) > 1
    return isinstance(module, nn.MaxPool2d | nn.AvgPool2d)


@contextmanager
def _noisy_vectors(network: nn.Module, generator: torch.Generator) -> Iterator[None]:
    """Replaces vectors, such as those of norms, by noise within the context: many start at 0 or 1,
    which would hide what depends on them."""
    tensors = [
        x
        for x in network.state_dict().values()
        if x.is_floating_point() and x.numel() == max(x.shape, default=0)
    ]
    before = [x.clone() for x in tensors]
    for x in tensors:
        x.copy_(torch.rand(x.shape, generator=generator) + 0.5)
    try:
        yield
    finally:
        for x, value in zip(tensors, before, strict=True):
            x.copy_(value)


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
