"""Data passed between the components: `ImageSizes`, `Queries`, `Predictions` and `Targets`, the
padded ground truth.

B images, N queries, C channels, S stages, K classes, M objects of the fullest image (padding).
All boxes are xyxy in absolute pixels of the resized, unpadded network input. `valid` masks mark
padding everywhere: a padded query attends to nothing, is matched to nothing and is never detected.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from detectron2.structures import ImageList, Instances
from torch import Tensor


@dataclass
class ImageSizes:
    """Sizes of the images of a batch before and after padding.

    Attributes:
        whwh: (B, 4) float32 width, height, width, height of each unpadded image, on the device.
        hw: (height, width) of each unpadded image, on the host.
        padded_hw: (height, width) of the batch.
    """

    whwh: Tensor
    hw: tuple[tuple[int, int], ...]
    padded_hw: tuple[int, int]

    @classmethod
    def from_images(cls, images: ImageList) -> ImageSizes:
        """Reads the sizes of Detectron2's image list."""
        hw = tuple((int(h), int(w)) for h, w in images.image_sizes)
        padded_hw = tuple(images.tensor.shape[-2:])
        return cls.from_hw(hw, padded_hw, device=images.tensor.device)

    @classmethod
    def from_hw(
        cls,
        hw: Sequence[tuple[int, int]],
        padded_hw: tuple[int, int] | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> ImageSizes:
        """Creates sizes from (height, width) on the host; `padded_hw` defaults to the largest
        sides."""
        hw = tuple(hw)
        if padded_hw is None:
            padded_hw = (max(h for h, _ in hw), max(w for _, w in hw))
        whwh = torch.tensor([(w, h, w, h) for h, w in hw], dtype=dtype)
        return cls(whwh.to(device, non_blocking=True), hw, padded_hw)

    def __len__(self) -> int:
        return len(self.hw)

    @property
    def any_padding(self) -> bool:
        """True if any image is smaller than the batch; known on the host."""
        return any(size != self.padded_hw for size in self.hw)


@dataclass
class Queries:
    """Object candidates of each image, refined by the stages.

    Attributes:
        content: (B, N, C) content embedding.
        valid: (B, N) bool, False on padding.
        boxes_xyxy: (B, N, 4) float32 boxes to refine; None for detectors whose queries have none.
        position: (B, N, C) position embedding, (1, N, C) if all images share it; None for queries
            with boxes.
        points_xy: (B or 1, N, 2) float32 reference points in shares of the image size, 0 to 1; None
            for detectors without reference points.
        all_valid: True if it is known on the host that no query is padding: attention then needs no
            mask.
        attend: (B, N, N) bool mask of the queries (columns) that each query (row) may attend to, if
            `valid` is not enough; None otherwise.
        proposal_logits, proposal_boxes_xyxy: (B, N, K) and (B, N, 4), with gradient: predictions of
            the proposal generator itself, supervised like those of a stage. None for generators
            without predictions.
        noised: (B, D) int64 index of the ground truth from which each of the first D queries is a
            noised copy, -1 on padding; None without denoising.
    """

    content: Tensor
    valid: Tensor
    boxes_xyxy: Tensor | None = None
    position: Tensor | None = None
    points_xy: Tensor | None = None
    all_valid: bool = False
    attend: Tensor | None = None
    proposal_logits: Tensor | None = None
    proposal_boxes_xyxy: Tensor | None = None
    noised: Tensor | None = None

    @property
    def mask(self) -> Tensor | None:
        """Attention mask, (B, N) or (B, N, N) bool; None if all queries are valid."""
        if self.attend is not None:
            return self.attend
        return None if self.all_valid else self.valid


@dataclass
class Predictions:
    """Predictions of all stages, stacked; the last stage gives the detections.

    Attributes:
        logits: (S, B, N, K) class logits, K + 1 columns (background last) in softmax mode.
        boxes_xyxy: (S, B, N, 4) float32.
        valid: (B, N) bool.
        noised: predictions for denoising queries, which take no part in matching; None without
            denoising.
    """

    logits: Tensor
    boxes_xyxy: Tensor
    valid: Tensor
    noised: NoisedPredictions | None = None

    @classmethod
    def from_stages(
        cls, queries: Queries, logits: Sequence[Tensor], boxes_xyxy: Sequence[Tensor]
    ) -> Predictions:
        """Stacks the logits (B, N, K) and boxes (B, N, 4) of the stages.

        Predictions of the proposal generator come first; those for denoising queries are moved to
        `noised`.
        """
        logits, boxes_xyxy = list(logits), list(boxes_xyxy)
        if queries.proposal_logits is not None:
            logits.insert(0, queries.proposal_logits)
            boxes_xyxy.insert(0, queries.proposal_boxes_xyxy)
        stacked = cls(torch.stack(logits), torch.stack(boxes_xyxy), queries.valid)
        if queries.noised is None:
            return stacked
        count = queries.noised.shape[1]
        result, noised = (
            cls(stacked.logits[:, :, part], stacked.boxes_xyxy[:, :, part], stacked.valid[:, part])
            for part in (slice(count, None), slice(None, count))
        )
        result.noised = NoisedPredictions(noised, queries.noised)
        return result

    @property
    def num_stages(self) -> int:
        return self.logits.shape[0]

    def last(self) -> Predictions:
        """Returns the predictions of the last stage, with a stage dimension of size one."""
        noised = self.noised
        if noised is not None:
            noised = NoisedPredictions(noised.predictions.last(), noised.gt)
        return Predictions(self.logits[-1:], self.boxes_xyxy[-1:], self.valid, noised)


@dataclass
class NoisedPredictions:
    """Predictions of all stages for denoising queries.

    Attributes:
        predictions: (S, B, D, ...); padding is not valid.
        gt: (B, D) int64 index of the ground truth of each query, -1 on padding.
    """

    predictions: Predictions
    gt: Tensor


@dataclass
class Targets:
    """Ground truth of a batch, padded to M >= 1 objects so that all shapes are known on the host.

    Attributes:
        boxes_xyxy: (B, M, 4) float32; padding holds a unit box, which keeps all arithmetic finite.
        labels: (B, M) int64, zero on padding.
        valid: (B, M) bool.
        image_whwh: (B, 4) float32, width, height, width, height of each unpadded image.
        counts: objects per image, on the host: reading them needs no synchronization.
    """

    boxes_xyxy: Tensor
    labels: Tensor
    valid: Tensor
    image_whwh: Tensor
    counts: tuple[int, ...]

    @classmethod
    def from_lists(
        cls,
        boxes_xyxy: Sequence[Tensor],
        labels: Sequence[Tensor],
        image_whwh: Tensor,
    ) -> Targets:
        """Pads the boxes (m, 4) and labels (m,) of each image, and copies each field to the device
        at once.

        Args:
            boxes_xyxy: one (m_b, 4) tensor an image, absolute pixels.
            labels: one (m_b,) integer tensor an image.
            image_whwh: (B, 4); its device is the device of the result, its dtype that of the boxes.
        """
        counts = tuple(len(x) for x in labels)
        shape = (len(counts), max((1, *counts)))
        host = boxes_xyxy[0].device if boxes_xyxy else image_whwh.device
        padded_boxes = torch.zeros(*shape, 4, dtype=image_whwh.dtype, device=host)
        padded_boxes[..., 2:] = 1
        padded_labels = torch.zeros(shape, dtype=torch.long, device=host)
        valid = torch.zeros(shape, dtype=torch.bool, device=host)
        for b, count in enumerate(counts):
            padded_boxes[b, :count] = boxes_xyxy[b].to(padded_boxes.dtype)
            padded_labels[b, :count] = labels[b]
            valid[b, :count] = True
        moved = (
            x.to(image_whwh.device, non_blocking=True) for x in (padded_boxes, padded_labels, valid)
        )
        return cls(*moved, image_whwh=image_whwh, counts=counts)

    @classmethod
    def from_instances(cls, instances: Sequence[Instances], image_whwh: Tensor) -> Targets:
        """Reads `gt_boxes` and `gt_classes` of Detectron2 instances (on the host)."""
        return cls.from_lists(
            [x.gt_boxes.tensor for x in instances], [x.gt_classes for x in instances], image_whwh
        )
