"""Findings of a failed overfit check: problems of the data, and the component that does not learn.

B images, N queries, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.validation import loss_mode
from ..modeling.layers.boxes import box_iou

ENOUGH = 0.9  # AP50 of a batch that was learned, and share of the objects that must be right

Sample = dict[str, Any]


def data_findings(samples: Sequence[Sample]) -> list[str]:
    """Describes properties of the batch that no detector could learn."""
    if not count_objects(samples):
        return ["data: no image of the training set has an object"]
    findings = []
    for i, sample in enumerate(samples):
        name = sample.get("file_name", f"image {i}")
        if sample["image"].float().std() == 0:
            findings.append(f"data: {name} is of one color")
        boxes_xyxy = sample["instances"].gt_boxes.tensor
        if len(boxes_xyxy.unique(dim=0)) < len(boxes_xyxy):
            findings.append(f"data: {name} has several objects with the very same box")
        for other in samples[:i]:
            if torch.equal(sample["image"], other["image"]):
                twin = other.get("file_name", "another image")
                findings.append(f"data: {name} shows the same as {twin}")
    return findings


@torch.no_grad()
def model_findings(model: nn.Module, samples: Sequence[Sample]) -> list[str]:
    """Names the first component that is wrong, judged by the matched queries of the last stage.

    Args:
        model: the detector after the attempt, a `SparseDetector`.
        samples: the batch.
    """
    matched: list[tuple[Any, ...]] = []
    hook = model.matcher.register_forward_hook(lambda _, args, out: matched.append((*args, out)))
    try:
        with loss_mode(model):
            model(samples)
    finally:
        hook.remove()
    predictions, targets, assignment = matched[0]
    last, objects = predictions.last(), sum(targets.counts)
    index = assignment[-1].clamp(min=0)  # (B, N), meaningless where there is no match
    is_matched = (assignment[-1] >= 0) & last.valid

    image = torch.arange(len(index), device=index.device)[:, None].expand_as(index)
    pairs = torch.stack((image[is_matched], index[is_matched]), dim=1)
    unmatched = objects - len(pairs.unique(dim=0))
    if unmatched:
        queries = int(last.valid.sum(dim=1).min())
        return [
            f"matching: {unmatched} of {objects} objects have no query; with {queries} queries an "
            "image, raise MODEL.PROPOSAL_GENERATOR.NUM_QUERIES"
        ]
    true_boxes_xyxy = targets.boxes_xyxy.gather(1, index[..., None].expand(-1, -1, 4))
    ious = box_iou(last.boxes_xyxy[0], true_boxes_xyxy)[is_matched]
    findings = []
    if _share(ious >= 0.5) < ENOUGH:
        findings.append(
            f"box: of {len(ious)} matched queries {int((ious >= 0.5).sum())} overlap their object "
            f"by an IoU of 0.5 or more (mean {float(ious.mean()):.2f})"
        )
    logits = last.logits[0]
    background = logits.shape[-1] > model.num_classes
    scores = logits.softmax(dim=-1)[..., :-1] if background else logits.sigmoid()
    labels = targets.labels.gather(1, index)
    right = scores.gather(-1, labels[..., None])[..., 0]
    others = scores.amax(dim=-1).masked_fill(is_matched | ~last.valid, 0)  # of unmatched queries
    best = torch.maximum(scores.amax(dim=-1), others.amax(dim=1, keepdim=True))
    if _share((right >= best)[is_matched]) < ENOUGH:
        findings.append(
            f"classification: matched queries have a mean score of "
            f"{float(right[is_matched].mean()):.2f} for the class of their object, the best other "
            f"query of an image {float(others.amax(dim=1).mean()):.2f}"
        )
    inference = (
        "inference: in training mode boxes and classes are right; check norm statistics, and what "
        "the proposal generator does differently in evaluation mode"
    )
    return findings or [inference]


def count_objects(samples: Sequence[Sample]) -> int:
    """Number of ground-truth objects in all samples."""
    return sum(len(x["instances"]) for x in samples)


def _share(flags: Tensor) -> float:
    return float(flags.float().mean()) if flags.numel() else 1.0
