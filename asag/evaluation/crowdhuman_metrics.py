"""AP, mMR and Recall of the CrowdHuman benchmark, in plain numpy.

Legend: D detections, R real boxes, P candidate pairs (of all images together, or of one image where
the docstring says so); G annotations of one image, real and ignored.

The benchmark (Shao et al., "CrowdHuman: A Benchmark for Detecting Human in a Crowd", section 4)
matches with IoU 0.5 and lets ignored regions swallow detections. Its AP is the bare area below the
ranked precision-recall points, so it is neither the AP of COCO nor that of VOC.

How matching gets fast: detections pick boxes one after the other by falling score, each the free
box it overlaps most. All boxes thus agree on who comes first, and then the outcome is the one
stable matching between detections (which prefer larger IoU) and boxes (which prefer larger score).
Deferred acceptance finds it in a handful of rounds, each a few array operations over all images
together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

IOU_THRESHOLD = 0.5
MISS_RATE_FPPI = (0.0100, 0.0178, 0.0316, 0.0562, 0.1000, 0.1778, 0.3162, 0.5623, 1.0)

_EPS = 1e-6  # the benchmark adds it to the denominators of IoU and IoA
_MIN_MISS_RATE = 1e-10  # keeps the logarithm finite when every object is found


class CrowdImage(NamedTuple):
    """Ground truth and detections of one annotated image.

    Attributes:
        boxes_xyxy: (G, 4) ground truth in absolute pixels; may leave the image.
        ignored: (G,) bool, True for a region in which detections do not count.
        detections_xyxy: (D, 4) detected boxes in absolute pixels of the same image.
        scores: (D,) confidences; only their order matters.
        height: image height in pixels.
        width: image width in pixels.
        name: how error messages call the image (a file name or an id).
    """

    boxes_xyxy: np.ndarray
    ignored: np.ndarray
    detections_xyxy: np.ndarray
    scores: np.ndarray
    height: int
    width: int
    name: str = "?"


class CrowdMetrics(NamedTuple):
    """Result of :func:`crowdhuman_metrics`; the first three are fractions in [0, 1].

    Attributes:
        ap: area below the ranked precision-recall points.
        mmr: log-average miss rate over :data:`MISS_RATE_FPPI` (lower is better).
        recall: share of the real boxes found by all detections together.
        num_images: images with at least one annotation.
        num_boxes: real boxes.
        num_ignored: ignored regions.
        num_detections: detections on these images.
    """

    ap: float
    mmr: float
    recall: float
    num_images: int
    num_boxes: int
    num_ignored: int
    num_detections: int


def crowdhuman_metrics(images: Sequence[CrowdImage]) -> CrowdMetrics:
    """Evaluates detections of a single class as the CrowdHuman benchmark does.

    Images without any annotation are outside the evaluation and have to be left out by the caller.
    Equal scores keep their order: images as given, detections of an image as given.

    Args:
        images: one entry for each annotated image.

    Returns:
        The metrics; without any detection AP and Recall are 0 and mMR is 1.

    Raises:
        ValueError: an array has a wrong shape or holds a value that is not finite, an image has no
            annotation or no size, or there is no real box at all.
    """
    for image in images:
        _check_image(image)
    boxes = [_clip(im.boxes_xyxy, im.width, im.height) for im in images]
    ignored = [np.asarray(im.ignored, dtype=bool) for im in images]
    num_ignored = int(sum(flags.sum() for flags in ignored))
    num_boxes = int(sum(map(len, boxes))) - num_ignored
    if num_boxes == 0:
        raise ValueError(
            "CrowdHuman metrics need at least one real (not ignored) box, "
            f"found none in {len(images)} images; check the annotation file"
        )

    detections, scores, boundaries = _ranked_detections(images)
    pair_detection, pair_box, pair_iou, absorbed = _candidates(
        detections, boundaries, boxes, ignored
    )
    true_positive = _match(pair_detection, pair_box, pair_iou, len(scores), num_boxes)

    counted = true_positive | ~absorbed
    order = np.argsort(-scores[counted], kind="stable")
    true_positive = true_positive[counted][order]
    ap, mmr, recall = _summarize(true_positive, num_boxes, len(images))
    return CrowdMetrics(ap, mmr, recall, len(images), num_boxes, num_ignored, len(scores))


def crowdhuman_metrics_from_coco(
    ground_truth: Mapping[str, Any], results: Sequence[Mapping[str, Any]]
) -> CrowdMetrics:
    """Evaluates exported detections against annotations in COCO layout.

    Args:
        ground_truth: `images` (id, width, height) and `annotations` (image_id, bbox as x, y, width,
            height in pixels, iscrowd: 1 marks an ignored region).
        results: COCO result list (image_id, bbox as x, y, width, height in pixels, score).
            Detections on images without annotations are skipped.

    Returns:
        The metrics. For equal scores images count in the order of their first annotation.

    Raises:
        ValueError: an annotation or a result names an image that `images` does not list, or see
            :func:`crowdhuman_metrics`.
    """
    sizes = {image["id"]: image for image in ground_truth["images"]}
    annotations: dict[Any, list[Mapping[str, Any]]] = {}
    for annotation in ground_truth["annotations"]:
        annotations.setdefault(annotation["image_id"], []).append(annotation)
    detections: dict[Any, list[Mapping[str, Any]]] = {}
    for result in results:
        detections.setdefault(result["image_id"], []).append(result)
    for what, entries in (("annotation", annotations), ("result", detections)):
        unknown = next((key for key in entries if key not in sizes), None)
        if unknown is not None:
            raise ValueError(
                f"{what} with image_id {unknown!r}, which is not among the listed images"
            )

    return crowdhuman_metrics(
        [
            CrowdImage(
                boxes_xyxy=_xywh_to_xyxy([a["bbox"] for a in found]),
                ignored=np.array([a.get("iscrowd", 0) != 0 for a in found], dtype=bool),
                detections_xyxy=_xywh_to_xyxy([d["bbox"] for d in detections.get(image_id, ())]),
                scores=np.array(
                    [d["score"] for d in detections.get(image_id, ())], dtype=np.float64
                ),
                height=sizes[image_id]["height"],
                width=sizes[image_id]["width"],
                name=str(image_id),
            )
            for image_id, found in annotations.items()
        ]
    )


def _check_image(image: CrowdImage) -> None:
    """Raises ValueError when the arrays of one image do not fit together."""
    num_boxes, num_detections = len(image.boxes_xyxy), len(image.detections_xyxy)
    expected = {
        "boxes_xyxy": (num_boxes, 4),
        "ignored": (num_boxes,),
        "detections_xyxy": (num_detections, 4),
        "scores": (num_detections,),
    }
    for field, shape in expected.items():
        value = np.asarray(getattr(image, field))
        if value.shape != shape:
            raise ValueError(
                f"image {image.name}: {field} has shape {value.shape}, expected {shape}"
            )
        if not np.isfinite(value).all():
            raise ValueError(f"image {image.name}: {field} holds a value that is NaN or infinite")
    if num_boxes == 0:
        raise ValueError(
            f"image {image.name} has no annotation; leave such images out, "
            "the benchmark does not count them"
        )
    if image.height <= 0 or image.width <= 0:
        raise ValueError(f"image {image.name}: size {image.width}x{image.height} is not positive")


def _xywh_to_xyxy(boxes_xywh: Sequence[Sequence[float]]) -> np.ndarray:
    """(n, 4) corners in float64; also for n = 0."""
    boxes = np.array(boxes_xywh, dtype=np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return boxes


def _clip(boxes_xyxy: np.ndarray, width: int, height: int) -> np.ndarray:
    """Clips as the benchmark does: first corner to the last pixel, second corner to the border."""
    lower = np.zeros(4)
    upper = np.array([width - 1, height - 1, width, height], dtype=np.float64)
    return np.clip(np.asarray(boxes_xyxy, dtype=np.float64), lower, upper)


def _ranked_detections(images: Sequence[CrowdImage]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Detections of all images, image by image and by falling score within one.

    Returns:
        clipped boxes (D, 4), scores (D,), and the image boundaries (len(images) + 1,).
    """
    orders = [np.argsort(-np.asarray(im.scores, dtype=np.float64), kind="stable") for im in images]
    boxes = [
        _clip(im.detections_xyxy, im.width, im.height)[o]
        for im, o in zip(images, orders, strict=True)
    ]
    scores = [
        np.asarray(im.scores, dtype=np.float64)[o] for im, o in zip(images, orders, strict=True)
    ]
    boundaries = np.concatenate(([0], np.cumsum([len(order) for order in orders])))
    return np.concatenate(boxes), np.concatenate(scores), boundaries


def _candidates(
    detections: np.ndarray,
    boundaries: np.ndarray,
    boxes: list[np.ndarray],
    ignored: list[np.ndarray],
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Pairs that may match (IoU above the threshold), and detections inside ignored regions.

    Only these few pairs are kept, never the dense (D, R) table of the data set.

    Returns:
        detection (P,), real box (P,) and IoU (P,) of each pair, then absorbed (D,) bool. Real boxes
        are numbered across images, in their given order.
    """
    pairs: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    absorbed = np.zeros(len(detections), dtype=bool)
    first_box = 0
    for i, (image_boxes, image_ignored) in enumerate(zip(boxes, ignored, strict=True)):
        start, stop = boundaries[i], boundaries[i + 1]
        inter, detection_area, box_area = _overlaps(detections[start:stop], image_boxes)
        real = ~image_ignored
        real_inter = inter[:, real]  # (D, R) of this image
        iou = real_inter / (detection_area[:, None] + box_area[real] - real_inter + _EPS)
        detection, box = np.nonzero(iou > IOU_THRESHOLD)
        pairs.append((detection + start, box + first_box, iou[detection, box]))
        if image_ignored.any():
            ioa = inter[:, image_ignored].max(axis=1) / (detection_area + _EPS)
            absorbed[start:stop] = ioa > IOU_THRESHOLD
        first_box += int(real.sum())
    columns = zip(*pairs, strict=True)
    detection, box, iou = (np.concatenate(column) for column in columns)
    return detection, box, iou, absorbed


def _overlaps(a_xyxy: np.ndarray, b_xyxy: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Intersections (A, B) and the areas (A,) and (B,) of two sets of boxes."""
    corner = np.minimum(a_xyxy[:, None, 2:], b_xyxy[:, 2:])  # (A, B, 2)
    corner -= np.maximum(a_xyxy[:, None, :2], b_xyxy[:, :2])
    sides = corner.clip(min=0)
    area_a, area_b = (np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) for boxes in (a_xyxy, b_xyxy))
    return sides[..., 0] * sides[..., 1], area_a, area_b


def _match(
    detection: np.ndarray, box: np.ndarray, iou: np.ndarray, num_detections: int, num_boxes: int
) -> np.ndarray:
    """Greedy matching by falling score, computed by deferred acceptance (see the module's text).

    Args:
        detection: (P,) detection of each pair; within an image a lower number is a higher score.
        box: (P,) real box of each pair; equal IoUs prefer the lower number.
        iou: (P,) overlap of each pair.
        num_detections: D.
        num_boxes: R.

    Returns:
        (D,) bool, True for detections that got a box.
    """
    order = np.lexsort((box, -iou, detection))
    wishes = box[order]  # (P,) each detection's boxes, best first
    end = np.cumsum(np.bincount(detection, minlength=num_detections))  # (D,)
    position = np.concatenate(([0], end[:-1])) if num_detections else end
    nobody = num_detections
    holder = np.full(num_boxes, nobody, dtype=np.int64)  # (R,) who a box belongs to so far
    active = np.flatnonzero(position < end)
    while len(active):
        asked = wishes[position[active]]
        contested = np.unique(asked)
        before = holder[contested]
        np.minimum.at(holder, asked, active)
        displaced = before[(before != holder[contested]) & (before != nobody)]
        rejected = active[holder[asked] != active]
        active = np.concatenate((rejected, displaced))
        position[active] += 1
        active = active[position[active] < end[active]]
    matched = np.zeros(num_detections, dtype=bool)
    matched[holder[holder != nobody]] = True
    return matched


def _summarize(
    true_positive: np.ndarray, num_boxes: int, num_images: int
) -> tuple[float, float, float]:
    """AP, mMR and Recall of a ranked list.

    Args:
        true_positive: (n,) bool by falling score; False is a false positive.
        num_boxes: number of real boxes, at least 1.
        num_images: number of annotated images, at least 1.
    """
    if len(true_positive) == 0:
        return 0.0, 1.0, 0.0
    hits = np.cumsum(true_positive)
    rank = np.arange(1, len(true_positive) + 1)
    recall, precision, fppi = hits / num_boxes, hits / rank, (rank - hits) / num_images
    # from the first detection on: the piece left of it is not part of the benchmark's area
    ap = np.sum(np.diff(recall) * (precision[1:] + precision[:-1]) / 2)
    reached = np.minimum(np.searchsorted(fppi, MISS_RATE_FPPI, side="left"), len(rank) - 1)
    miss_rate = np.maximum(1.0 - recall[reached], _MIN_MISS_RATE)
    return float(ap), float(np.exp(np.log(miss_rate).mean())), float(recall[-1])
