"""Statistics of the assignment of queries to objects, by the model's own matcher.

B images, N queries, S stages, K classes, M padded ground truths.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from torch import nn

from ..data import SparseDetectionMapper
from ..modeling.meta_arch import SparseDetector
from ..structures import ImageSizes

IMAGES = 64  # maximum number of images
SECONDS = 20.0  # after which no further batch is started
BATCH = 4
# Generators whose queries are parameters; others derive them from each image.
LASTING = ("LearnedProposals", "DynamicProposals", "ObjectQueries")


@dataclass(frozen=True)
class MatchingStatistics:
    """Statistics of matching on some training images, with predictions in evaluation mode.

    Attributes:
        images: number of images.
        objects: number of their objects.
        queries: mean number of queries of an image.
        positives: (S,) mean number of queries matched to an object, by stage.
        unmatched: (S,) share of objects without any query, 0 to 1.
        matched: (N,) number of matches of each query in the last stage; None if queries are derived
            from the image, so that their indices have no meaning.
        best_scored: queries that are, in some image, among the m best-scored of the last stage (m
            objects in that image); None as above.
    """

    images: int
    objects: int
    queries: float
    positives: tuple[float, ...]
    unmatched: tuple[float, ...]
    matched: np.ndarray | None
    best_scored: int | None

    @property
    def used(self) -> int:
        """Number of queries that are matched at least once."""
        return 0 if self.matched is None else int((self.matched > 0).sum())


class _Counter:
    """Accumulates sums over batches."""

    def __init__(self) -> None:
        self.images = self.objects = self.queries = 0
        self.positives: list[np.ndarray] = []  # each (S,)
        self.unmatched: list[np.ndarray] = []
        self.matched: list[np.ndarray] = []  # each (N,)
        self.best: list[np.ndarray] = []

    def add(
        self,
        assignment: np.ndarray,
        scores: np.ndarray,
        valid: np.ndarray,
        counts: Sequence[int],
    ) -> None:
        """Adds one batch.

        Args:
            assignment: (S, B, N), -1 is background.
            scores: (B, N) of the last stage.
            valid: (B, N) bool.
            counts: objects of each image.
        """
        positive = assignment >= 0
        served = [
            [len(np.unique(row[row >= 0])) for row in stage] for stage in assignment
        ]  # (S, B)
        self.images += len(counts)
        self.objects += sum(counts)
        self.queries += int(valid.sum())
        self.positives.append(positive.sum(axis=(1, 2)))
        self.unmatched.append(sum(counts) - np.array(served).sum(axis=1))
        self.matched.append(positive[-1].sum(axis=0))
        order = np.argsort(-np.where(valid, scores, -np.inf), axis=1, kind="stable")
        self.best += [row[:count] for row, count in zip(order, counts, strict=True)]

    def result(self, numbered: bool) -> MatchingStatistics:
        """Returns the statistics; `numbered`: query indices correspond between images."""
        objects = max(self.objects, 1)
        return MatchingStatistics(
            images=self.images,
            objects=self.objects,
            queries=self.queries / self.images,
            positives=tuple((sum(self.positives) / objects).tolist()),
            unmatched=tuple((sum(self.unmatched) / objects).tolist()),
            matched=sum(self.matched) if numbered else None,
            best_scored=len(np.unique(np.concatenate(self.best))) if numbered else None,
        )


@torch.no_grad()
def matching_statistics(
    cfg: CfgNode,
    model: nn.Module,
    dataset_dicts: Sequence[dict[str, Any]],
    *,
    images: int = IMAGES,
    seconds: float = SECONDS,
) -> MatchingStatistics | None:
    """Matches the model's predictions for training images, resized as for testing.

    It draws no random numbers, does not communicate, and does not modify the model.

    Args:
        cfg: INPUT.*.
        model: the detector, not wrapped.
        dataset_dicts: training images, which are sampled evenly.
        images: maximum number of images.
        seconds: after which no further batch is started.

    Returns:
        The statistics; None for a model that is no `SparseDetector`, or without images.
    """
    if not isinstance(model, SparseDetector) or not dataset_dicts:
        return None
    mapper = SparseDetectionMapper.without_augmentation(cfg)
    count = min(images, len(dataset_dicts))
    chosen = [dataset_dicts[i * len(dataset_dicts) // count] for i in range(count)]
    counter = _Counter()
    was_training = model.training
    model.eval()
    start = time.perf_counter()
    try:
        for first in range(0, count, BATCH):
            _add_batch(counter, model, [mapper(x) for x in chosen[first : first + BATCH]])
            if time.perf_counter() - start > seconds:
                break
    finally:
        model.train(was_training)
    return counter.result(numbered=type(model.proposal_generator).__name__ in LASTING)


def _add_batch(counter: _Counter, model: SparseDetector, batch: list[dict[str, Any]]) -> None:
    padded = model.preprocess_images(batch)
    sizes = ImageSizes.from_images(padded)
    targets = model.read_targets(batch, sizes)
    predictions, _ = model.forward_stages(padded.tensor, sizes)
    assignment = model.matcher(predictions, targets)
    logits = predictions.logits[-1].float()
    scores = (logits.softmax(-1)[..., :-1] if model.softmax else logits).amax(-1)
    arrays = (assignment, scores, predictions.valid)
    counter.add(*(x.cpu().numpy() for x in arrays), targets.counts)
