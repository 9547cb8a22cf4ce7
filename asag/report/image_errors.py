"""Which images a detector does best and worst on.

n detections, m objects of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .annotations import GroundTruth

IOU = 0.5  # from which a detection of the right class has found an object
PER_CLASS = 100  # detections of an image and class that count, as in COCO's evaluation
WRONG, RIGHT, IGNORED = 0, 1, 2


@dataclass(frozen=True)
class Found:
    """Detections of one image, by falling score.

    Attributes:
        boxes_xyxy: (n, 4) float64, pixels of the original image.
        labels: (n,) int64.
        scores: (n,) float64, 0 to 1.
    """

    boxes_xyxy: np.ndarray
    labels: np.ndarray
    scores: np.ndarray


@dataclass(frozen=True)
class ImageErrors:
    """Detections of an image above the score threshold, compared with its objects.

    Attributes:
        index: of the image.
        found: objects that were found.
        missed: objects that were not.
        false: detections of nothing, or of an object that a better one has found already.
    """

    index: int
    found: int
    missed: int
    false: int

    @property
    def errors(self) -> int:
        """What images are ordered by: misses plus false positives."""
        return self.missed + self.false


def judge(found: Found, gt: GroundTruth) -> np.ndarray:
    """Whether each detection is right, by COCO's rule at an IoU of 0.5: from the best score on,
    each takes the object of its class that it covers best among those not taken yet.

    Returns:
        (n,) of WRONG, RIGHT, or IGNORED for what lies in a crowd region or is beyond the 100 best
        of a class.
    """
    verdict = np.full(len(found.scores), WRONG)
    ious = overlaps(found.boxes_xyxy, gt.boxes_xyxy, gt.ignored)
    usable = (ious >= IOU) & (found.labels[:, None] == gt.labels[None])
    free = ~gt.ignored
    # What overlaps nothing of its class is wrong without a closer look.
    for n in np.flatnonzero(usable.any(axis=1)):
        candidates = usable[n] & free
        if candidates.any():
            free[np.where(candidates, ious[n], -1).argmax()] = False
            verdict[n] = RIGHT
        elif (usable[n] & gt.ignored).any():
            verdict[n] = IGNORED
    for label in np.unique(found.labels):
        verdict[np.flatnonzero(found.labels == label)[PER_CLASS:]] = IGNORED
    return verdict


def overlaps(boxes: np.ndarray, gt: np.ndarray, ignored: np.ndarray) -> np.ndarray:
    """(n, m) IoU of xyxy boxes; for ignored regions the share of the detection that lies inside."""
    corners = np.minimum(boxes[:, None, 2:], gt[None, :, 2:])
    sides = corners - np.maximum(boxes[:, None, :2], gt[None, :, :2])
    shared = sides.clip(min=0).prod(axis=-1)
    own = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)[:, None]
    other = (gt[:, 2:] - gt[:, :2]).prod(axis=1)[None]
    union = np.where(ignored[None], own, own + other - shared)
    return shared / np.maximum(union, 1e-12)


def operating_point(scores: np.ndarray, right: np.ndarray, objects: int) -> tuple[float, float]:
    """The score threshold with the highest F1, the harmonic mean of precision and recall.

    Args:
        scores: (n,) of all images' detections that are right or wrong.
        right: (n,) bool.
        objects: in all images.

    Returns:
        Threshold (detections scored equally count) and F1, 0 to 1; 1 and 0 where nothing is right.
    """
    if not right.any():
        return 1.0, 0.0
    order = np.argsort(-scores, kind="stable")
    scores, right = scores[order], right[order]
    f1 = 2 * right.cumsum() / (np.arange(1, len(scores) + 1) + objects)
    f1[:-1][scores[:-1] == scores[1:]] = -1  # no threshold separates equal scores
    best = int(f1.argmax())
    return float(scores[best]), float(f1[best])


def count_errors(
    found: Sequence[Found], gts: Sequence[GroundTruth]
) -> tuple[list[ImageErrors], float, float]:
    """Errors of every image at the best threshold of the data set.

    Args:
        found: detections of each image.
        gts: ground truth annotations of each image.

    Returns:
        Errors of each image, the threshold and its F1.
    """
    verdicts = [judge(f, t) for f, t in zip(found, gts, strict=True)]
    objects = [int((~t.ignored).sum()) for t in gts]
    all_verdicts, all_scores = np.concatenate(verdicts), np.concatenate([f.scores for f in found])
    counted = all_verdicts != IGNORED
    threshold, f1 = operating_point(
        all_scores[counted], all_verdicts[counted] == RIGHT, sum(objects)
    )
    counts = []
    for index, (f, verdict, count) in enumerate(zip(found, verdicts, objects, strict=True)):
        shown = verdict[f.scores >= threshold]
        right = int((shown == RIGHT).sum())
        counts.append(ImageErrors(index, right, count - right, int((shown == WRONG).sum())))
    return counts, threshold, f1


def best_and_worst(
    counts: Sequence[ImageErrors], wanted: int
) -> tuple[list[ImageErrors], list[ImageErrors]]:
    """At most `wanted` images each, none of them in both.

    The worst have the most errors; of images with equally many, those where less was found come
    first. The best have objects, and the fewest errors; of images with equally many, those where
    more was found come first.
    """
    worst = sorted(counts, key=lambda x: (-x.errors, x.found))
    worst = [x for x in worst if x.errors][:wanted]
    taken = {x.index for x in worst}
    best = [x for x in counts if x.found and x.index not in taken]
    return sorted(best, key=lambda x: (x.errors, -x.found))[:wanted], worst
