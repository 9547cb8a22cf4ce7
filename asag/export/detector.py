"""Detector as a function of one tensor, for export to other runtimes.

B images of the same size H x W, D detections of an image.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ..inference.deploy import prepare_for_inference
from ..modeling.meta_arch import SparseDetector
from ..modeling.postprocess import top_candidates
from ..modeling.proposal_generator.asag.anchors import AdaptiveAnchorGenerator
from ..structures import ImageSizes
from .suppression import keep_best

OUTPUTS = ("boxes_xyxy", "scores", "labels", "valid")


class ExportableDetector(nn.Module):
    """Maps images of one size to a fixed number of slots for detections.

    Color order, normalization, selection, suppression and clipping are included. The images have no
    padding.
    """

    def __init__(self, model: SparseDetector, size: tuple[int, int]) -> None:
        """
        Args:
            model: with its final weights; it is copied, not modified.
            size: height and width of the images.

        Raises:
            ValueError: the backbone would pad this size, or shapes depend on the content of the
                image; the message names the size or the configuration keys to change.
        """
        super().__init__()
        _check_size(size, model.backbone.size_divisibility or 1)
        _check_shapes(model)
        self.model = prepare_for_inference(copy.deepcopy(model))
        self.size = size
        height, width = size
        whwh = torch.tensor([[width, height, width, height]], dtype=torch.float32)
        self.register_buffer("whwh", whwh.to(model.device), False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """
        Args:
            images: (B, 3, H, W) float32, RGB, 0 to 255.

        Returns:
            Boxes (B, D, 4) xyxy in pixels of the images, clipped to them if the model clips its
            own (MODEL.CLIP_BOXES); scores (B, D) descending; labels (B, D) int64; valid (B, D)
            bool. Slots without a detection come last, with box and score 0 and label -1.
        """
        model = self.model
        if model.input_format == "BGR":
            images = images.flip(1)
        normalized = (images - model.pixel_mean) / model.pixel_std
        # One size on the host holds for all images.
        sizes = ImageSizes(self.whwh.expand(images.shape[0], 4), (self.size,), self.size)
        predictions, _ = model.forward_stages(normalized, sizes)
        scores, boxes, labels = top_candidates(predictions, model.top_k, model.softmax)
        valid = scores >= 0
        if model.nms_threshold > 0:
            valid = keep_best(boxes, labels, valid, model.nms_threshold)
        if model.clip_boxes:
            boxes = torch.minimum(boxes.clamp(min=0), sizes.whwh[:, None])
            valid = valid & (boxes[..., 2:] > boxes[..., :2]).all(dim=-1)
        order = scores.masked_fill(~valid, -1).sort(dim=1, descending=True, stable=True).indices
        scores, labels, valid = (x.gather(1, order) for x in (scores, labels, valid))
        boxes = boxes.gather(1, order[..., None].expand(-1, -1, 4))
        return (
            boxes.masked_fill(~valid[..., None], 0),
            scores.masked_fill(~valid, 0),
            labels.masked_fill(~valid, -1),
            valid,
        )


def _check_size(size: tuple[int, int], divisor: int) -> None:
    if min(size) < 1 or any(side % divisor for side in size):
        nearest = " ".join(str(max(1, round(side / divisor)) * divisor) for side in size)
        raise ValueError(
            f"an exported detector takes images without padding: height and width must be "
            f"multiples of {divisor}, got {size[0]} {size[1]}; the nearest are {nearest}"
        )


def _check_shapes(model: SparseDetector) -> None:
    for module in model.modules():
        if isinstance(module, AdaptiveAnchorGenerator) and not module.static:
            anchors = module.inference_rules.max_anchors
            patches = module.inference_rules.max_patches or 15
            raise ValueError(
                "an exported detector has fixed shapes, but the number of its anchors depends on "
                "the image: set MODEL.ASAG.PATCH_CAPACITY (patches of an image and level, for "
                f"example {patches}) and MODEL.ASAG.ANCHOR_CAPACITY ({anchors} loses none)"
            )
