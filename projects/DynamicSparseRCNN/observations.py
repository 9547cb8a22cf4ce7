"""Labels, expert weights and proposals of images, for the figures.

S stages, N queries, M objects, C channels, E experts, I images.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from asag.modeling import SparseDetector
from asag.modeling.proposal_generator import DynamicProposals
from asag.structures import ImageSizes

import numpy as np
import torch
from torch import Tensor

Sample = dict[str, Any]


@dataclass
class Positives:
    """Predictions and labels of one image.

    Attributes:
        image_rgb: (H, W, 3) uint8, the network input.
        gt_xyxy: (M, 4) objects, pixels of the network input.
        boxes_xyxy: (S, N, 4) predictions of every stage.
        assignment: (S, N) object of each prediction, -1 for background.
    """

    image_rgb: np.ndarray
    gt_xyxy: Tensor
    boxes_xyxy: Tensor
    assignment: Tensor

    @property
    def counts(self) -> Tensor:
        """(S, M) number of predictions assigned to each object."""
        objects = torch.arange(len(self.gt_xyxy))
        return (self.assignment[..., None] == objects).sum(dim=1)


@dataclass
class Proposals:
    """Proposals of one image, the input of the first stage.

    Attributes:
        image_rgb: (H, W, 3) uint8, the network input.
        boxes: (N, 4) xyxy, normalized by the image size.
        content: (N, C).
    """

    image_rgb: np.ndarray
    boxes: Tensor
    content: Tensor


def find_positives(model: SparseDetector, sample: Sample) -> Positives:
    """Matches the predictions for an image with the model's matcher.

    Raises:
        ValueError: the image has no objects.
    """
    if not len(sample["instances"]):
        raise ValueError(f"{sample['file_name']} has no objects to match")
    images = model.preprocess_images([sample])
    sizes = ImageSizes.from_images(images)
    targets = model.read_targets([sample], sizes)
    predictions, _ = model.forward_stages(images.tensor, sizes)
    return Positives(
        _pixels(model, sample),
        targets.boxes_xyxy[0].cpu(),
        predictions.boxes_xyxy[:, 0].cpu(),
        model.matcher(predictions, targets)[:, 0].cpu(),
    )


def collect_expert_weights(model: SparseDetector, samples: Iterable[Sample]) -> Tensor:
    """Collects the expert weights (I, E, N) of a data set.

    Raises:
        ValueError: the model has no experts.
    """
    generator = model.proposal_generator
    if not isinstance(generator, DynamicProposals):
        raise ValueError(
            f"the proposals come from {type(generator).__name__}; experts need "
            "MODEL.PROPOSAL_GENERATOR.NAME 'DynamicProposals'"
        )
    return torch.cat([generator.expert_weights(_features(model, x)[0]).cpu() for x in samples])


def expert_statistics(weights: Tensor) -> list[dict[str, float]]:
    """Computes mean and spread of the weights of each expert.

    Args:
        weights: (I, E, N).

    Returns:
        For each expert its mean weight, the standard deviation over images (mean over proposals),
        and the standard deviation over proposals (of the mean over images).
    """
    mean = weights.mean(dim=0)  # (E, N)
    over_images = weights.std(dim=0, correction=0).mean(dim=1)
    over_proposals = mean.std(dim=1, correction=0)
    return [
        {"mean": float(m), "over images": float(i), "over proposals": float(p)}
        for m, i, p in zip(mean.mean(dim=1), over_images, over_proposals, strict=True)
    ]


def find_proposals(model: SparseDetector, sample: Sample) -> Proposals:
    """Computes the proposals of an image.

    Raises:
        ValueError: the model's queries have no boxes.
    """
    features, sizes = _features(model, sample)
    queries, _ = model.proposal_generator(features, sizes)
    if queries.boxes_xyxy is None:
        raise ValueError(f"{type(model.proposal_generator).__name__} proposes no boxes")
    boxes = queries.boxes_xyxy[0] / sizes.whwh[0]
    return Proposals(_pixels(model, sample), boxes.cpu(), queries.content[0].cpu())


def proposal_changes(one: Proposals, other: Proposals) -> tuple[Tensor, Tensor]:
    """Compares the N proposals of two images.

    Returns:
        Mean distance of the four sides in percent of the image size, and distance of the features
        relative to their norm in percent.

    Raises:
        ValueError: the images have different numbers of proposals.
    """
    if one.boxes.shape != other.boxes.shape:
        raise ValueError(
            f"{len(one.boxes)} and {len(other.boxes)} proposals cannot be compared one by one"
        )
    boxes = (one.boxes - other.boxes).abs().mean(dim=1)
    length = (one.content.norm(dim=1) + other.content.norm(dim=1)) / 2
    return 100 * boxes, 100 * (one.content - other.content).norm(dim=1) / length.clamp(min=1e-6)


def _features(model: SparseDetector, sample: Sample) -> tuple[dict[str, Tensor], ImageSizes]:
    images = model.preprocess_images([sample])
    sizes = ImageSizes.from_images(images)
    features = model.backbone(images.tensor)
    return features if model.neck is None else model.neck(features, sizes), sizes


def _pixels(model: SparseDetector, sample: Sample) -> np.ndarray:
    pixels = sample["image"].permute(1, 2, 0).numpy()
    return pixels[..., ::-1] if model.input_format == "BGR" else pixels
