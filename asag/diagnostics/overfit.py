"""Overfit check: trains on one batch until the detector finds the objects in it.

A detector that cannot learn four images will not learn a data set; run it first when AP stays at 0.
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
from detectron2.structures import Instances
from pycocotools.coco import COCO
from torch import Tensor, nn

from ..checkpoint.checkpointer import AtomicCheckpointer
from ..data import SparseDetectionMapper
from ..data.catalog import check_classes, load_train_dicts
from ..engine.non_finite import NonFiniteLossError
from ..engine.optimizer import build_clipper, build_optimizer
from ..engine.schedule import resolve_schedule
from ..engine.step import TrainStep, amp_dtype
from ..evaluation.coco import evaluate_boxes
from .overfit_findings import ENOUGH, Sample, count_objects, data_findings, model_findings

IMAGES = 4  # at most; more take longer and show nothing more
STEPS = 300
CHECK_PERIOD = 20  # steps between two evaluations

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OverfitResult:
    """Result of a check.

    Attributes:
        passed: True if AP50 on the batch reached `ENOUGH`.
        steps: optimizer steps that were taken.
        ap50: of the detections on the batch, 0 to 1.
        first, last: name -> loss in the first and in the last step.
        findings: "component: evidence" for everything that failed; empty if nothing did.
    """

    passed: bool
    steps: int
    ap50: float
    first: Mapping[str, float]
    last: Mapping[str, float]
    findings: tuple[str, ...] = ()

    def report(self) -> str:
        """Formats the result for a terminal."""
        if self.passed:
            return f"overfit check passed: AP50 {100 * self.ap50:.1f} after {self.steps} steps"
        lines = [
            f"overfit check FAILED: AP50 {100 * self.ap50:.1f} after {self.steps} steps, "
            f"{100 * ENOUGH:.0f} are needed"
        ]
        lines += [f"  {finding}" for finding in self.findings]
        lines += [
            f"    {name} {value:.4g} -> {self.last.get(name, math.nan):.4g}"
            for name, value in self.first.items()
        ]
        lines.append(
            "  (if the losses were still falling, take more steps, --overfit-steps N, or raise "
            "SOLVER.BASE_LR)"
        )
        return "\n".join(lines)


def check_overfit(
    cfg: CfgNode, model: nn.Module, samples: Sequence[Sample], *, steps: int = STEPS
) -> OverfitResult:
    """Trains a model on one batch at a constant learning rate until it detects the objects in it.

    Args:
        cfg: SOLVER.* of the optimizer; BASE_LR is not changed. See `overfit_config`.
        model: the detector with its initial weights; it is trained.
        samples: the batch, see `overfit_samples`.
        steps: maximum number of steps.
    """
    findings = data_findings(samples)
    if not count_objects(samples):
        return OverfitResult(False, 0, 0.0, {}, {}, tuple(findings))
    optimizer = build_optimizer(cfg, model, clip_in_step=False)
    step = TrainStep(model, optimizer, amp_dtype=amp_dtype(cfg), clip=build_clipper(cfg))
    before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    ap50, done = 0.0, 0
    while done < steps:
        model.train()
        try:
            scalars = step(samples, done)
            step.guard.settle()
        except NonFiniteLossError as error:
            return OverfitResult(False, done, ap50, first, last, (f"optimizer: {error}",))
        done += 1
        last = {k: float(v) for k, v in scalars.items() if k.startswith("loss_")}
        first = first or last
        if done % CHECK_PERIOD and done < steps:
            continue
        ap50 = detected_ap50(model, samples)
        logger.info(f"step {done}: loss {sum(last.values()):.4g}, AP50 {100 * ap50:.1f}")
        if ap50 >= ENOUGH:
            return OverfitResult(True, done, ap50, first, last)
    after = [p for p in model.parameters() if p.requires_grad]
    if all(torch.equal(a, b) for a, b in zip(before, after, strict=True)):
        findings.insert(0, "optimizer: no weight has changed; check SOLVER.BASE_LR")
    findings += model_findings(model, samples)
    return OverfitResult(False, done, ap50, first, last, tuple(findings))


def overfit_config(cfg: CfgNode, steps: int) -> CfgNode:
    """Returns the configuration without regularization that would hinder overfitting.

    Dropout is off, and schedules of the model that count steps are shortened to `steps`.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DECODER.DROPOUT = 0.0
    cfg.MODEL.SWIN.DROP_PATH_RATE = cfg.MODEL.TIMM.DROP_PATH_RATE = 0.0
    cfg.MODEL.ASAG.GT_WARMUP_ITERS = min(cfg.MODEL.ASAG.GT_WARMUP_ITERS, steps // 4)
    cfg.SOLVER.MAX_ITER = steps
    cfg.freeze()
    return cfg


def overfit_samples(cfg: CfgNode, dataset_dicts: Sequence[Sample]) -> list[Sample]:
    """Prepares one batch without augmentation: few objects an image, as many classes as possible.

    Args:
        cfg: INPUT.*, and SOLVER.IMS_PER_BATCH, which limits the batch as `IMAGES` does.
        dataset_dicts: to choose from.
    """
    mapper = SparseDetectionMapper.without_augmentation(cfg)
    chosen = choose_images(dataset_dicts, min(IMAGES, cfg.SOLVER.IMS_PER_BATCH))
    return [mapper(dataset_dicts[i]) for i in chosen]


def run_check(cfg: CfgNode, recipe: CfgNode, *, steps: int = STEPS) -> int:
    """Runs `train_net.py --overfit-check` on one batch of DATASETS.TRAIN, from MODEL.WEIGHTS on.

    Args:
        cfg: the configuration of the run.
        recipe: the configuration file without overrides, see `resolve_schedule`.
        steps: maximum number of steps.

    Returns:
        Exit code: 0 if the batch was learned, else 1.
    """
    dicts = load_train_dicts(cfg)
    check_classes(cfg)
    resolved, _ = resolve_schedule(cfg, len(dicts), recipe=recipe)
    cfg = overfit_config(resolved, steps)
    model = build_model(cfg)
    AtomicCheckpointer(model, save_to_disk=False).resume_or_load(cfg.MODEL.WEIGHTS, resume=False)
    samples = overfit_samples(cfg, dicts)
    logger.info(
        f"overfit check: {len(samples)} images with {count_objects(samples)} objects, up to "
        f"{steps} steps at learning rate {cfg.SOLVER.BASE_LR:.4g}"
    )
    result = check_overfit(cfg, model, samples, steps=steps)
    logger.log(logging.INFO if result.passed else logging.ERROR, result.report())
    return 0 if result.passed else 1


def choose_images(dataset_dicts: Sequence[Sample], count: int) -> list[int]:
    """Returns the indices of at most `count` images with objects; deterministic.

    Images of classes not yet chosen come first, then those with the fewest objects.
    """
    labels = {
        i: [a["category_id"] for a in x.get("annotations", []) if not a.get("iscrowd", 0)]
        for i, x in enumerate(dataset_dicts)
    }
    left = {i: classes for i, classes in labels.items() if classes}
    seen: set[int] = set()
    chosen: list[int] = []
    while left and len(chosen) < count:
        best = min(left, key=lambda i: (set(left[i]) <= seen, len(left[i]), i))
        seen.update(left.pop(best))
        chosen.append(best)
    return chosen


@torch.no_grad()
def detected_ap50(model: nn.Module, samples: Sequence[Sample]) -> float:
    """AP50 of the model's detections on the batch, 0 to 1."""
    model.eval()
    outputs = [x["instances"] for x in model([{"image": x["image"]} for x in samples])]
    detections = [
        annotation | {"score": score}
        for i, x in enumerate(outputs)
        for annotation, score in zip(
            _annotations(i, x.pred_boxes.tensor, x.pred_classes), x.scores.tolist(), strict=True
        )
    ]
    coco = _ground_truth([x["instances"] for x in samples])
    detections = [x for x in detections if x["category_id"] in coco.cats]
    return max(float(evaluate_boxes(coco, detections).stats[1]), 0.0) if detections else 0.0


def _ground_truth(images: Sequence[Instances]) -> COCO:
    annotations = [
        annotation
        for i, x in enumerate(images)
        for annotation in _annotations(i, x.gt_boxes.tensor, x.gt_classes)
    ]
    for number, annotation in enumerate(annotations, start=1):
        width, height = annotation["bbox"][2:]
        annotation.update(id=number, iscrowd=0, area=width * height)
    coco = COCO()
    coco.dataset = {
        "images": [{"id": i} for i in range(len(images))],
        "categories": [{"id": k} for k in sorted({a["category_id"] for a in annotations})],
        "annotations": annotations,
    }
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        coco.createIndex()
    return coco


def _annotations(image_id: int, boxes_xyxy: Tensor, labels: Tensor) -> list[dict[str, Any]]:
    """The boxes of one image in COCO's format, XYWH."""
    return [
        {"image_id": image_id, "category_id": label, "bbox": [x1, y1, x2 - x1, y2 - y1]}
        for (x1, y1, x2, y2), label in zip(boxes_xyxy.tolist(), labels.tolist(), strict=True)
    ]
