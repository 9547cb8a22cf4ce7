"""Why a detector could not learn a batch by heart: what is wrong with the data or its parts.

B images, N queries, K classes.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pycocotools.coco import COCO
from torch import Tensor, nn

from ..engine.validation import loss_mode
from ..evaluation.coco import evaluate_boxes
from ..modeling.layers.boxes import box_iou
from ..structures import Predictions, Targets

ENOUGH = 0.9  # AP50 of a batch that was learned
GENERATOR_FALL = 0.7  # the generator's own losses must fall below this share of their start

Sample = dict[str, Any]
Boxes = tuple[Tensor, Tensor, Tensor]  # boxes_xyxy (n, 4), labels (n,), scores (n,) of one image


@dataclass(frozen=True)
class Finding:
    """Which part of the detector failed, and the numbers that say so."""

    part: str
    evidence: str


def data_findings(samples: Sequence[Sample]) -> list[Finding]:
    """What no detector could learn."""
    if not count_objects(samples):
        return [Finding("data", "no image of the training set has an object")]
    findings = []
    for i, sample in enumerate(samples):
        name = sample.get("file_name", f"image {i}")
        if sample["image"].float().std() == 0:
            findings.append(Finding("data", f"{name} is of one color"))
        boxes = [(*b, c) for b, c in zip(*truth_of(sample)[:2], strict=True)]
        places = {tuple(float(x) for x in box[:4]) for box in boxes}
        if len(places) < len(boxes):
            findings.append(Finding("data", f"{name} has several objects with the very same box"))
        for other in samples[:i]:
            if torch.equal(sample["image"], other["image"]):
                twin = other.get("file_name", "another image")
                findings.append(Finding("data", f"{name} shows the same as {twin}"))
    return findings


def model_findings(
    model: nn.Module, samples: Sequence[Sample], first: Mapping[str, float]
) -> list[Finding]:
    """Which parts of a detector are to blame, by giving it the right answer of one at a time.

    Args:
        model: the detector after the attempt.
        samples: the batch.
        first: name -> loss in the first step.
    """
    seen = _look_inside(model, samples)
    found = (
        _matching_finding(seen),
        _box_finding(seen),
        _class_finding(seen),
        _generator_finding(seen, first),
    )
    inference = Finding(
        "inference",
        "in training mode classes and boxes are right; norm statistics, or what the proposal "
        "generator does differently when it detects, are not",
    )
    return [x for x in found if x is not None] or [inference]


@dataclass(frozen=True)
class _Inside:
    """What came out of the last stage, and what the matcher made of it.

    Attributes:
        gt: ground truth of each image.
        objects: in all of them.
        boxes_xyxy: (B, N, 4) predicted, pixels.
        scores: (B, N, K) predicted, 0 to 1.
        valid: (B, N) bool.
        matched: (B, N) bool, queries that answer for an object.
        index: (B, N) number of that object; meaningless elsewhere, as are the next two.
        true_boxes_xyxy: (B, N, 4) its box, pixels.
        true_labels: (B, N) its class.
        generator_losses: the proposal generator's own.
    """

    gt: list[Boxes]
    objects: int
    boxes_xyxy: Tensor
    scores: Tensor
    valid: Tensor
    matched: Tensor
    index: Tensor
    true_boxes_xyxy: Tensor
    true_labels: Tensor
    generator_losses: dict[str, float]


def _look_inside(model: nn.Module, samples: Sequence[Sample]) -> _Inside:
    matchings: list[tuple[Predictions, Targets, Tensor]] = []
    generated: list[dict[str, Tensor]] = []
    handles = [
        model.matcher.register_forward_hook(lambda _, args, out: matchings.append((*args, out))),
        model.proposal_generator.register_forward_hook(lambda _, __, out: generated.append(out[1])),
    ]
    try:
        with torch.no_grad(), loss_mode(model):
            model(samples)
    finally:
        for handle in handles:
            handle.remove()
    stages, targets, assignment = matchings[0]
    last, index = stages.last(), assignment[-1].clamp(min=0)
    logits = last.logits[0]
    with_background = logits.shape[-1] > model.num_classes
    return _Inside(
        gt=[truth_of(x) for x in samples],
        objects=sum(targets.counts),
        boxes_xyxy=last.boxes_xyxy[0],
        scores=logits.softmax(dim=-1)[..., :-1] if with_background else logits.sigmoid(),
        valid=last.valid,
        matched=(assignment[-1] >= 0) & last.valid,
        index=index,
        true_boxes_xyxy=targets.boxes_xyxy.gather(1, index[..., None].expand(-1, -1, 4)),
        true_labels=targets.labels.gather(1, index),
        generator_losses={name: float(x) for name, x in generated[0].items()},
    )


def _matching_finding(seen: _Inside) -> Finding | None:
    """Whether every object has a query."""
    images, objects = seen.matched.nonzero()[:, 0].tolist(), seen.index[seen.matched].tolist()
    answered = len(set(zip(images, objects, strict=True)))
    if answered == seen.objects:
        return None
    return Finding(
        "matching",
        f"{seen.objects - answered} of {seen.objects} objects have no query that answers for them "
        f"(at least {int(seen.valid.sum(dim=1).min())} queries an image)",
    )


def _box_finding(seen: _Inside) -> Finding | None:
    """Whether the boxes are good enough, given the true classes."""
    true_class = torch.zeros_like(seen.scores).scatter(-1, seen.true_labels[..., None], 1)
    scores = true_class * seen.matched[..., None]
    with_classes = ap50_of(seen.gt, _answers(seen.boxes_xyxy, scores, seen.valid))
    if with_classes >= ENOUGH:
        return None
    overlaps = box_iou(seen.boxes_xyxy, seen.true_boxes_xyxy)[seen.matched]
    return Finding(
        "box",
        f"of {len(overlaps)} matched queries {int((overlaps >= 0.5).sum())} overlap their object "
        f"by an IoU of 0.5 or more (mean {_mean(overlaps):.2f}); with the true classes AP50 would "
        f"be {100 * with_classes:.1f}",
    )


def _class_finding(seen: _Inside) -> Finding | None:
    """Whether the scores are good enough, given the true boxes."""
    boxes_xyxy = torch.where(seen.matched[..., None], seen.true_boxes_xyxy, seen.boxes_xyxy)
    with_boxes = ap50_of(seen.gt, _answers(boxes_xyxy, seen.scores, seen.valid))
    if with_boxes >= ENOUGH:
        return None
    right = seen.scores.gather(-1, seen.true_labels[..., None])[..., 0][seen.matched]
    wrong = seen.scores.amax(dim=-1)[~seen.matched & seen.valid]
    return Finding(
        "classification",
        f"matched queries give their class a score of {_mean(right):.2f} (mean), the others reach "
        f"{_mean(wrong):.2f}; with the true boxes AP50 would be {100 * with_boxes:.1f}",
    )


def _generator_finding(seen: _Inside, first: Mapping[str, float]) -> Finding | None:
    """Whether the proposal generator's own losses have fallen."""
    start = sum(first[name] for name in seen.generator_losses if name in first)
    end = sum(seen.generator_losses.values())
    if not start or end <= GENERATOR_FALL * start:
        return None
    return Finding("generator", f"the losses of its own fell from {start:.3g} to {end:.3g} only")


def ap50_of(gt: Sequence[Boxes], found: Sequence[Boxes]) -> float:
    """AP50 of the detections on each image, 0 to 1."""
    coco = COCO()
    annotations = _records(gt)
    for number, annotation in enumerate(annotations, start=1):
        width, height = annotation["bbox"][2:]
        annotation.update(id=number, iscrowd=0, area=width * height)
    coco.dataset = {
        "images": [{"id": i} for i in range(len(gt))],
        "categories": [{"id": k} for k in sorted({a["category_id"] for a in annotations})],
        "annotations": annotations,
    }
    with contextlib.redirect_stdout(io.StringIO()):  # it reports its progress
        coco.createIndex()
    results = [x for x in _records(found) if x["category_id"] in coco.cats]
    return max(float(evaluate_boxes(coco, results).stats[1]), 0.0) if results else 0.0


def _records(images: Sequence[Boxes]) -> list[dict[str, Any]]:
    """COCO's form, boxes XYWH."""
    return [
        {
            "image_id": i,
            "category_id": label,
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "score": score,
        }
        for i, (boxes, labels, scores) in enumerate(images)
        for (x1, y1, x2, y2), label, score in zip(
            boxes.tolist(), labels.tolist(), scores.tolist(), strict=True
        )
    ]


def _answers(boxes_xyxy: Tensor, scores: Tensor, valid: Tensor) -> list[Boxes]:
    """The 100 best of all queries and classes of each image, those that score above 0."""
    answers, classes = [], scores.shape[-1]
    for own, scored in zip(boxes_xyxy, scores * valid[..., None], strict=True):
        best, place = scored.flatten().topk(min(100, scored.numel()))
        place, best = place[best > 0], best[best > 0]
        query = torch.div(place, classes, rounding_mode="floor")
        answers.append((own[query], place % classes, best))
    return answers


def truth_of(sample: Sample) -> Boxes:
    """Ground truth of a sample, in the form of detections."""
    instances = sample["instances"]
    labels = instances.gt_classes
    return instances.gt_boxes.tensor, labels, torch.ones(len(labels))


def count_objects(samples: Sequence[Sample]) -> int:
    """In all of them."""
    return sum(len(x["instances"]) for x in samples)


def _mean(values: Tensor) -> float:
    return float(values.float().mean()) if values.numel() else 0.0
