"""Errors of a detector by image.

n detections, m objects of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .annotations import GroundTruth

IOU = 0.5  # from which a detection of the class matches an object
PER_CLASS = 100  # counted detections of an image and class, as in COCO's evaluation
WRONG, RIGHT, IGNORED = 0, 1, 2


@dataclass(frozen=True)
class ImageDetections:
    """Detections of one image in descending order of score.

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
        found: matched objects.
        missed: unmatched objects.
        false: detections without an object, or of an object that is matched already.
    """

    index: int
    found: int
    missed: int
    false: int

    @property
    def errors(self) -> int:
        """Misses plus false positives, by which images are sorted."""
        return self.missed + self.false


def judge(found: ImageDetections, gt: GroundTruth) -> np.ndarray:
    """Classifies each detection by COCO's rule at an IoU of 0.5.

    In descending order of score, each detection takes the object of its class with the highest IoU
    among those that are not taken yet.

    Returns:
        (n,) of WRONG, RIGHT or IGNORED. Detections in a crowd region and those beyond the 100 best
        of a class are ignored.
    """
    verdict = np.full(len(found.scores), WRONG)
    ious = overlaps(found.boxes_xyxy, gt.boxes_xyxy, gt.ignored)
    usable = (ious >= IOU) & (found.labels[:, None] == gt.labels[None])
    free = ~gt.ignored
    # Detections without overlap with their class are wrong; the loop skips them.
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
    """Computes the IoU (n, m); for ignored regions, the share of the detection inside."""
    corners = np.minimum(boxes[:, None, 2:], gt[None, :, 2:])
    sides = corners - np.maximum(boxes[:, None, :2], gt[None, :, :2])
    shared = sides.clip(min=0).prod(axis=-1)
    own = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)[:, None]
    other = (gt[:, 2:] - gt[:, :2]).prod(axis=1)[None]
    union = np.where(ignored[None], own, own + other - shared)
    return shared / np.maximum(union, 1e-12)


def operating_point(scores: np.ndarray, right: np.ndarray, objects: int) -> tuple[float, float]:
    """Finds the score threshold with the highest F1, the harmonic mean of precision and recall.

    Args:
        scores: (n,) of the detections of all images, except ignored ones.
        right: (n,) bool.
        objects: in all images.

    Returns:
        Threshold (inclusive) and F1, 0 to 1; 1 and 0 if no detection is right.
    """
    if not right.any():
        return 1.0, 0.0
    order = np.argsort(-scores, kind="stable")
    scores, right = scores[order], right[order]
    f1 = 2 * right.cumsum() / (np.arange(1, len(scores) + 1) + objects)
    f1[:-1][scores[:-1] == scores[1:]] = -1  # equal scores cannot be separated
    best = int(f1.argmax())
    return float(scores[best]), float(f1[best])


def count_errors(
    found: Sequence[ImageDetections], gts: Sequence[GroundTruth]
) -> tuple[list[ImageErrors], float, float]:
    """Counts the errors of every image at the best threshold of the data set.

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
    counts: Sequence[ImageErrors], requested: int
) -> tuple[list[ImageErrors], list[ImageErrors]]:
    """Selects at most `requested` best and worst images, which are disjoint.

    The worst have the most errors; ties are broken by fewer matched objects. The best have objects
    and the fewest errors; ties are broken by more matched objects.
    """
    worst = sorted(counts, key=lambda x: (-x.errors, x.found))
    worst = [x for x in worst if x.errors][:requested]
    taken = {x.index for x in worst}
    best = [x for x in counts if x.found and x.index not in taken]
    return sorted(best, key=lambda x: (x.errors, -x.found))[:requested], worst
