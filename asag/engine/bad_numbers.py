"""What is said about a step whose numbers are no numbers, and what is kept of its images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.structures import Boxes, Instances
from torch import Tensor

from .loss_log import file_names

BOXES, LOGITS, GRAD_NORM = "predicted boxes", "class logits", "grad_norm"
MAX_LISTED_PARAMETERS = 8


def describe_values(values: Mapping[str, float]) -> list[str]:
    """Phrases for the counts and losses that are wrong, and for the norm of the gradient."""
    counts = {name: int(values[name]) for name in (BOXES, LOGITS) if values.get(name)}
    losses = {k: v for k, v in values.items() if k not in (BOXES, LOGITS, GRAD_NORM)}
    bad = [f"{name} = {value}" for name, value in losses.items() if not math.isfinite(value)]
    good = [f"{name} = {value:.4g}" for name, value in losses.items() if math.isfinite(value)]
    found = [f"{count} NaN or infinite number(s) in the {name}" for name, count in counts.items()]
    if bad:
        found.append(", ".join(bad) + (f" (finite: {', '.join(good)})" if good else ""))
    if GRAD_NORM in values:
        found.append(f"gradient norm {values[GRAD_NORM]:.4g}")
    return found


def describe_gradients(names: Sequence[str]) -> list[str]:
    """A phrase for the parameters with a bad gradient."""
    if not names:
        return []
    listed = ", ".join(names[:MAX_LISTED_PARAMETERS])
    more = len(names) - MAX_LISTED_PARAMETERS
    rest = f" and {more} more" if more > 0 else ""
    return [f"NaN or infinite gradient of {listed}{rest}"]


def bad_inputs(batch: Sequence[Mapping[str, Any]]) -> list[str]:
    """Phrases for images and boxes of a batch that are already wrong."""
    found = []
    for sample, name in zip(batch, file_names(batch), strict=True):
        tensors = {"image": sample.get("image")}
        if "instances" in sample:
            tensors["ground-truth boxes"] = sample["instances"].gt_boxes.tensor
        for kind, tensor in tensors.items():
            if isinstance(tensor, Tensor) and not tensor.isfinite().all():
                count = int((~tensor.isfinite()).sum())
                found.append(f"the {kind} of {name} came with {count} NaN or infinite number(s)")
    return found


def pack_sample(sample: Mapping[str, Any]) -> dict[str, Any]:
    """A training sample as tensors, numbers and strings."""
    packed = {k: v for k, v in sample.items() if isinstance(v, Tensor | str | int | float)}
    if "instances" in sample:
        instances = sample["instances"]
        packed["instances"] = {
            "image_size": tuple(int(side) for side in instances.image_size),
            "gt_boxes": instances.gt_boxes.tensor.clone(),
            "gt_classes": instances.gt_classes.clone(),
        }
    return packed


def unpack_sample(packed: Mapping[str, Any]) -> dict[str, Any]:
    """A training sample again, of what `pack_sample` made."""
    sample = dict(packed)
    if "instances" in packed:
        content = packed["instances"]
        sample["instances"] = Instances(
            tuple(content["image_size"]),
            gt_boxes=Boxes(content["gt_boxes"]),
            gt_classes=content["gt_classes"],
        )
    return sample
