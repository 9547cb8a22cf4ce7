"""The first thing to try when a detector does not learn: can it learn four images by heart?

B images, N queries, K classes, S stages.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from pycocotools.coco import COCO
from torch import Tensor, nn

from ..data import SparseDetectionMapper
from ..data.mapper import eval_augmentations
from ..evaluation.coco import evaluate_boxes
from ..modeling.layers.boxes import box_iou
from ..structures import Predictions, Targets
from . import datasets
from .checkpointer import AtomicCheckpointer
from .optimizer import build_optimizer
from .schedule import resolve_schedule
from .step import TrainStep, amp_dtype, build_clipper
from .validation import loss_mode

IMAGES = 4  # at most; more take longer and show no more
STEPS = 300
CHECK_PERIOD = 20  # steps between two looks at the detections
ENOUGH = 0.9  # AP50 of a batch that was learnt
GENERATOR_FALL = 0.7  # the generator's own losses must fall below this share of their start

Sample = dict[str, Any]
Boxes = tuple[Tensor, Tensor, Tensor]  # boxes_xyxy (n, 4), labels (n,), scores (n,) of one image

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Finding:
    """Which part of the detector failed, and the numbers that say so."""

    part: str
    evidence: str


@dataclass(frozen=True)
class OverfitResult:
    """Outcome of a check.

    Attributes:
        passed: whether AP50 on the batch reached `ENOUGH`.
        steps: optimiser steps that were taken.
        ap50: of the detections on the batch, 0 to 1.
        first, last: name -> loss in the first and in the last step.
        findings: what failed; empty if nothing did.
    """

    passed: bool
    steps: int
    ap50: float
    first: Mapping[str, float]
    last: Mapping[str, float]
    findings: tuple[Finding, ...] = ()

    def report(self) -> str:
        """The outcome as text for a terminal."""
        if self.passed:
            return f"overfit check passed: AP50 {100 * self.ap50:.1f} after {self.steps} steps"
        lines = [
            f"overfit check FAILED: AP50 {100 * self.ap50:.1f} after {self.steps} steps, "
            f"{100 * ENOUGH:.0f} are needed"
        ]
        lines += [f"  {finding.part}: {finding.evidence}" for finding in self.findings]
        lines += [
            f"    {name} {value:.4g} -> {self.last.get(name, math.nan):.4g}"
            for name, value in self.first.items()
        ]
        lines.append(
            "  (where losses were still falling, more steps may do, --overfit-steps N, or a higher "
            "SOLVER.BASE_LR)"
        )
        return "\n".join(lines)


def check_overfit(
    cfg: CfgNode, model: nn.Module, samples: Sequence[Sample], *, steps: int = STEPS
) -> OverfitResult:
    """Trains a model on one batch again and again, at a constant learning rate, until it finds the
    objects in it.

    Args:
        cfg: SOLVER.* of the optimiser; BASE_LR as it stands. See `overfit_config`.
        model: the detector with its initial weights; it is trained.
        samples: the batch, see `overfit_samples`.
        steps: most steps to take.
    """
    doubts = data_findings(samples)
    if not _objects(samples):
        return OverfitResult(False, 0, 0.0, {}, {}, tuple(doubts))
    optimizer = build_optimizer(cfg, model)
    step = TrainStep(model, optimizer, amp_dtype=amp_dtype(cfg), clip=build_clipper(cfg))
    before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    ap50, done = 0.0, 0
    while done < steps:
        model.train()
        try:
            scalars = step(samples)
        except FloatingPointError as error:
            return OverfitResult(False, done, ap50, first, last, (_diverged(str(error)),))
        done += 1
        last = {k: float(v) for k, v in scalars.items() if k.startswith("loss_")}
        first = first or last
        if not all(map(math.isfinite, last.values())):
            return OverfitResult(False, done, ap50, first, last, (_diverged(f"{last}"),))
        if done % CHECK_PERIOD and done < steps:
            continue
        ap50 = detected_ap50(model, samples)
        logger.info(f"step {done}: loss {sum(last.values()):.4g}, AP50 {100 * ap50:.1f}")
        if ap50 >= ENOUGH:
            return OverfitResult(True, done, ap50, first, last)
    after = [p for p in model.parameters() if p.requires_grad]
    moved = any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    findings = [] if moved else [Finding("optimiser", "not a single weight has changed")]
    findings += [*doubts, *model_findings(model, samples, first)]
    return OverfitResult(False, done, ap50, first, last, tuple(findings))


def overfit_config(cfg: CfgNode, steps: int) -> CfgNode:
    """The configuration without what stands in the way of learning by heart: no dropout, and
    schedules of the model that count steps shrunk to so few of them."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DECODER.DROPOUT = 0.0
    cfg.MODEL.SWIN.DROP_PATH_RATE = 0.0
    cfg.MODEL.ASAG.GT_WARMUP_ITERS = min(cfg.MODEL.ASAG.GT_WARMUP_ITERS, steps // 4)
    cfg.SOLVER.MAX_ITER = steps
    cfg.freeze()
    return cfg


def overfit_samples(cfg: CfgNode, dataset_dicts: Sequence[Sample]) -> list[Sample]:
    """One batch without random augmentation: few objects an image, of as many classes as possible.

    Args:
        cfg: INPUT.*, and SOLVER.IMS_PER_BATCH, which bounds the batch as `IMAGES` does.
        dataset_dicts: to choose from.
    """
    mapper = SparseDetectionMapper(
        is_train=True, augmentations=eval_augmentations(cfg), image_format=cfg.INPUT.FORMAT
    )
    chosen = choose_images(dataset_dicts, min(IMAGES, cfg.SOLVER.IMS_PER_BATCH))
    return [mapper(dataset_dicts[i]) for i in chosen]


def run_check(cfg: CfgNode, recipe: CfgNode, *, steps: int = STEPS) -> int:
    """`train_net.py --overfit-check`: one batch of DATASETS.TRAIN, from MODEL.WEIGHTS on.

    Returns:
        Exit code: 0 if the batch was learnt, 1 if not.
    """
    dicts = datasets.load_train_dicts(cfg)
    datasets.check_classes(cfg)
    resolved, _ = resolve_schedule(cfg, len(dicts), recipe=recipe)
    cfg = overfit_config(resolved, steps)
    model = build_model(cfg)
    AtomicCheckpointer(model, save_to_disk=False).resume_or_load(cfg.MODEL.WEIGHTS, resume=False)
    samples = overfit_samples(cfg, dicts)
    logger.info(
        f"overfit check: {len(samples)} images with {_objects(samples)} objects, up to {steps} "
        f"steps at learning rate {cfg.SOLVER.BASE_LR:.4g}"
    )
    result = check_overfit(cfg, model, samples, steps=steps)
    logger.log(logging.INFO if result.passed else logging.ERROR, result.report())
    return 0 if result.passed else 1


def choose_images(dataset_dicts: Sequence[Sample], count: int) -> list[int]:
    """Indices of at most `count` images with objects; always the same ones."""
    labels = {
        i: [a["category_id"] for a in x.get("annotations", []) if not a.get("iscrowd", 0)]
        for i, x in enumerate(dataset_dicts)
    }
    left = {i: found for i, found in labels.items() if found}
    seen: set[int] = set()
    chosen: list[int] = []
    while left and len(chosen) < count:
        best = min(left, key=lambda i: (set(left[i]) <= seen, len(left[i]), i))
        seen.update(left.pop(best))
        chosen.append(best)
    return chosen


# What is wrong


def data_findings(samples: Sequence[Sample]) -> list[Finding]:
    """What no detector could learn."""
    if not _objects(samples):
        return [Finding("data", "no image of the training set has an object")]
    findings = []
    for i, sample in enumerate(samples):
        name = sample.get("file_name", f"image {i}")
        if sample["image"].float().std() == 0:
            findings.append(Finding("data", f"{name} is of one colour"))
        boxes = [(*b, c) for b, c in zip(*_truth(sample)[:2], strict=True)]
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
    """Which parts of a detector are to blame, by giving it the right answer of one at a time."""
    seen = _look_inside(model, samples)
    predictions, targets, assignment = seen.predictions.last(), seen.targets, seen.assignment[-1]
    index = assignment.clamp(min=0)  # (B, N)
    matched = (assignment >= 0) & predictions.valid
    objects = sum(targets.counts)
    answered = len({(b, g) for b, g in zip(*_places(matched, index), strict=True)})
    findings = []
    if answered < objects:
        queries = int(predictions.valid.sum(dim=1).min())
        findings.append(
            Finding(
                "matching",
                f"{objects - answered} of {objects} objects have no query that answers for them "
                f"(at least {queries} queries an image)",
            )
        )
    boxes = predictions.boxes_xyxy[0]  # (B, N, 4)
    true_boxes = targets.boxes_xyxy.gather(1, index[..., None].expand(-1, -1, 4))
    true_labels = targets.labels.gather(1, index)
    scores = predictions.logits[0].sigmoid()
    if predictions.logits.shape[-1] > model.num_classes:  # softmax with background
        scores = predictions.logits[0].softmax(dim=-1)[..., :-1]
    truth = [_truth(x) for x in samples]

    placed = matched & (box_iou(boxes, true_boxes) >= 0.5)
    exact = (true_labels.new_zeros(scores.shape)).scatter(-1, true_labels[..., None], 1)
    with_classes = _ap50(truth, _answers(boxes, exact * matched[..., None], predictions.valid))
    if with_classes < ENOUGH:
        overlap = float(box_iou(boxes, true_boxes)[matched].mean()) if matched.any() else 0.0
        findings.append(
            Finding(
                "box",
                f"of {int(matched.sum())} matched queries {int(placed.sum())} overlap their object "
                f"by an IoU of 0.5 or more (mean {overlap:.2f}); with the true classes AP50 would "
                f"be {100 * with_classes:.1f}",
            )
        )
    mended = torch.where(matched[..., None], true_boxes, boxes)
    with_boxes = _ap50(truth, _answers(mended, scores, predictions.valid))
    if with_boxes < ENOUGH:
        right = scores.gather(-1, true_labels[..., None])[..., 0][matched]
        wrong = scores.amax(dim=-1)[~matched & predictions.valid]
        findings.append(
            Finding(
                "classification",
                f"matched queries give their class a score of {_mean(right):.2f} (mean), the "
                f"others reach {_mean(wrong):.2f}; with the true boxes AP50 would be "
                f"{100 * with_boxes:.1f}",
            )
        )
    start = sum(first[name] for name in seen.generator_losses if name in first)
    end = sum(seen.generator_losses.values())
    if start and end > GENERATOR_FALL * start:
        findings.append(
            Finding("generator", f"the losses of its own fell from {start:.3g} to {end:.3g} only")
        )
    if not findings:
        findings.append(
            Finding(
                "inference",
                "in training mode classes and boxes are right; norm statistics, or what the "
                "proposal generator does differently when it detects, are not",
            )
        )
    return findings


@dataclass
class _Inside:
    """What went through the matcher, and the proposal generator's own losses."""

    predictions: Predictions
    targets: Targets
    assignment: Tensor
    generator_losses: dict[str, float]


def _look_inside(model: nn.Module, samples: Sequence[Sample]) -> _Inside:
    matched: list[tuple[Predictions, Targets, Tensor]] = []
    generated: list[dict[str, Tensor]] = []
    handles = [
        model.matcher.register_forward_hook(lambda _, args, out: matched.append((*args, out))),
        model.proposal_generator.register_forward_hook(lambda _, __, out: generated.append(out[1])),
    ]
    try:
        with torch.no_grad(), loss_mode(model):
            model(samples)
    finally:
        for handle in handles:
            handle.remove()
    return _Inside(*matched[0], {name: float(x) for name, x in generated[0].items()})


# Accuracy on the batch


@torch.no_grad()
def detected_ap50(model: nn.Module, samples: Sequence[Sample]) -> float:
    """AP50 of the model's detections on the batch, 0 to 1."""
    model.eval()
    outputs = model([{"image": x["image"]} for x in samples])
    found = [x["instances"] for x in outputs]
    return _ap50(
        [_truth(x) for x in samples],
        [(x.pred_boxes.tensor, x.pred_classes, x.scores) for x in found],
    )


def _ap50(truth: Sequence[Boxes], found: Sequence[Boxes]) -> float:
    coco = COCO()
    annotations = _records(truth)
    for number, annotation in enumerate(annotations, start=1):
        width, height = annotation["bbox"][2:]
        annotation.update(id=number, iscrowd=0, area=width * height)
    coco.dataset = {
        "images": [{"id": i} for i in range(len(truth))],
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


def _truth(sample: Sample) -> Boxes:
    instances = sample["instances"]
    labels = instances.gt_classes
    return instances.gt_boxes.tensor, labels, torch.ones(len(labels))


def _objects(samples: Sequence[Sample]) -> int:
    return sum(len(x["instances"]) for x in samples)


def _places(matched: Tensor, index: Tensor) -> tuple[list[int], list[int]]:
    """Image and object of every matched query."""
    return matched.nonzero()[:, 0].tolist(), index[matched].tolist()


def _mean(values: Tensor) -> float:
    return float(values.float().mean()) if values.numel() else 0.0


def _diverged(what: str) -> Finding:
    return Finding("optimiser", f"the training diverged ({what}); lower SOLVER.BASE_LR")
