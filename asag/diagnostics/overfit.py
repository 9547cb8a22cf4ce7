"""The first thing to try when a detector does not learn: can it learn four images by heart?"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from ..checkpoint.checkpointer import AtomicCheckpointer
from ..data import SparseDetectionMapper
from ..data.catalog import check_classes, load_train_dicts
from ..engine.optimizer import build_clipper, build_optimizer
from ..engine.schedule import resolve_schedule
from ..engine.step import TrainStep, amp_dtype
from .overfit_findings import (
    ENOUGH,
    Finding,
    Sample,
    ap50_of,
    count_objects,
    data_findings,
    model_findings,
    truth_of,
)

IMAGES = 4  # at most; more take longer and show no more
STEPS = 300
CHECK_PERIOD = 20  # steps between two looks at the detections

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OverfitResult:
    """Outcome of a check.

    Attributes:
        passed: whether AP50 on the batch reached `ENOUGH`.
        steps: optimizer steps that were taken.
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
        cfg: SOLVER.* of the optimizer; BASE_LR as it stands. See `overfit_config`.
        model: the detector with its initial weights; it is trained.
        samples: the batch, see `overfit_samples`.
        steps: most steps to take.
    """
    doubts = data_findings(samples)
    if not count_objects(samples):
        return OverfitResult(False, 0, 0.0, {}, {}, tuple(doubts))
    optimizer = build_optimizer(cfg, model, clip_in_step=False)
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
    findings = [] if moved else [Finding("optimizer", "not a single weight has changed")]
    findings += [*doubts, *model_findings(model, samples, first)]
    return OverfitResult(False, done, ap50, first, last, tuple(findings))


def overfit_config(cfg: CfgNode, steps: int) -> CfgNode:
    """The configuration without what stands in the way of learning by heart: no dropout, and
    schedules of the model that count steps shrunk to so few of them."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DECODER.DROPOUT = 0.0
    cfg.MODEL.SWIN.DROP_PATH_RATE = cfg.MODEL.TIMM.DROP_PATH_RATE = 0.0
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
    mapper = SparseDetectionMapper.without_augmentation(cfg)
    chosen = choose_images(dataset_dicts, min(IMAGES, cfg.SOLVER.IMS_PER_BATCH))
    return [mapper(dataset_dicts[i]) for i in chosen]


def run_check(cfg: CfgNode, recipe: CfgNode, *, steps: int = STEPS) -> int:
    """`train_net.py --overfit-check`: one batch of DATASETS.TRAIN, from MODEL.WEIGHTS on.

    Returns:
        Exit code: 0 if the batch was learned, 1 if not.
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


@torch.no_grad()
def detected_ap50(model: nn.Module, samples: Sequence[Sample]) -> float:
    """AP50 of the model's detections on the batch, 0 to 1."""
    model.eval()
    outputs = model([{"image": x["image"]} for x in samples])
    found = [x["instances"] for x in outputs]
    return ap50_of(
        [truth_of(x) for x in samples],
        [(x.pred_boxes.tensor, x.pred_classes, x.scores) for x in found],
    )


def _diverged(what: str) -> Finding:
    return Finding("optimizer", f"the training diverged ({what}); lower SOLVER.BASE_LR")
