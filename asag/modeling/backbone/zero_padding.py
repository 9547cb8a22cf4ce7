"""Zero padding inside of a convolutional network, for features that do not depend on the batch.

Images of a batch are padded with zeros, but behind the first norm the padding is not zero anymore,
and every 3x3 convolution propagates it one cell further into the image. The features of an image
then depend on the other images of its batch.

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

# Number of strides of two in the network.
HALVINGS = 5
# Largest relative difference of features that counts as a rounding error.
PROBE_TOLERANCE = 1e-4


class ZeroPadding:
    """Sets the padding to zero in front of every convolution and pooling with a kernel above 1 x 1.

    Uses hooks on the network, which do nothing if no image is padded.

    Example:
        >>> zero_padding = ZeroPadding(backbone)
        >>> with zero_padding(sizes):
        ...     features = backbone(images)
    """

    def __init__(self, backbone: nn.Module) -> None:
        """
        Args:
            backbone: Detectron2's `ResNet`, a `TimmBackbone`, or a module that contains one. A timm
                network is tested on noise, because some of its layers may read the whole image.

        Raises:
            ValueError: it contains no such network, or padding still changes the features.
        """
        self._masks: dict[tuple[int, int], Tensor] = {}
        stems = [x for x in backbone.modules() if isinstance(x, BasicStem)]
        networks = [x for x in backbone.modules() if isinstance(x, TimmBackbone)]
        if not stems and not networks:
            raise ValueError(
                "MODEL.EXACT_PADDING is True; it must be False for backbones that are neither a "
                f"residual network nor one of timm, such as {type(backbone).__name__} "
                "(MODEL.BACKBONE.NAME)"
            )
        for stem in stems:  # its pooling is not a module; the ReLU in between keeps zeros
            stem.conv1.register_forward_hook(self._clear_output)
        skipped = {stem.conv1 for stem in stems}  # the images are padded with zeros
        for module in backbone.modules():
            if _reads_neighbors(module) and module not in skipped:
                module.register_forward_pre_hook(self._clear_input)
        for network in networks:
            if self._leaks(network):
                raise ValueError(
                    "MODEL.EXACT_PADDING is True; it must be False for MODEL.TIMM.NAME "
                    f"{network.name!r}, whose features depend on the padding even if it is zero in "
                    "front of every convolution, for example by squeeze and excitation. Set "
                    "MODEL.TIMM.NAME to a network of plain convolutions"
                )

    @contextmanager
    def __call__(self, sizes: ImageSizes) -> Iterator[None]:
        """Context manager in which the network runs a batch of these sizes."""
        with self._with_masks(padding_masks(sizes) if sizes.any_padding else {}):
            yield

    def situation(self) -> Callable[[], AbstractContextManager[None]]:
        """Returns a function that restores the current masks, for activation checkpointing."""
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
        """Returns True if the features of an image depend on the size of its batch."""
        stride = network.size_divisibility
        generator = torch.Generator().manual_seed(0)
        # As high as the smaller frame, so that its border is tested as well.
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


def _reads_neighbors(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return max(module.kernel_size) > 1
    return isinstance(module, nn.MaxPool2d | nn.AvgPool2d)


@contextmanager
def _noisy_vectors(network: nn.Module, generator: torch.Generator) -> Iterator[None]:
    """Context manager that replaces vectors, such as those of norms, by noise: many are initialized
    with 0 or 1, which would hide their effect."""
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
    """Returns masks (B, 1, H, W), False on padding, for each resolution (H, W) of the network.

    A stride of two keeps every cell that begins inside of the image: the sides of images and batch
    are halved and rounded up.
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
