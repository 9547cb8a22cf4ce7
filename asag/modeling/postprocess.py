"""Selection of detections from the predictions of the last stage.

B images, N queries, K classes, D detections kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.modeling import detector_postprocess
from detectron2.structures import Boxes, Instances
from torch import Tensor
from torchvision.ops import batched_nms

from ..structures import Predictions
from .layers.boxes import at_least_float32


def select_detections(
    predictions: Predictions,
    image_sizes_hw: Sequence[tuple[int, int]],
    *,
    top_k: int,
    softmax: bool = False,
    nms_threshold: float = 0.0,
) -> list[Instances]:
    """Returns the best-scored detections of each image, in descending order of score.

    With sigmoid scores a query may be detected in several classes; with softmax each query gives
    its best foreground class.

    Args:
        predictions: only the last stage is read.
        image_sizes_hw: of the unpadded network inputs, the coordinate frame of the boxes.
        top_k: detections an image (fewer if there are fewer candidates).
        softmax: logits have a background column, last.
        nms_threshold: IoU threshold of class-wise non-maximum suppression among them; 0 is off.

    Returns:
        One `Instances` an image with `pred_boxes`, `scores`, `pred_classes`; boxes are not clipped.
    """
    scores, boxes, classes = top_candidates(predictions, top_k, softmax)
    # Scores descend, so valid candidates come first: one copy to the host gives their number.
    counts = (scores >= 0).sum(dim=1).tolist()
    return [
        _to_instances(scores[b, :n], boxes[b, :n], classes[b, :n], size, nms_threshold)
        for b, (n, size) in enumerate(zip(counts, image_sizes_hw, strict=True))
    ]


def top_candidates(
    predictions: Predictions, top_k: int, softmax: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns scores (B, D) in descending order, boxes (B, D, 4) and classes (B, D).

    Padded queries and NaN scores get score -1.
    """
    logits, boxes = at_least_float32(predictions.logits[-1]), predictions.boxes_xyxy[-1]
    if softmax:
        scores, classes = logits.softmax(dim=-1)[..., :-1].max(dim=-1)  # (B, N)
        scores = scores.masked_fill(~predictions.valid | scores.isnan(), -1)
        scores, query = scores.topk(min(top_k, scores.shape[1]), dim=1)
        classes = classes.gather(1, query)
    else:
        num_classes = logits.shape[-1]
        scores = logits.sigmoid()
        scores = scores.masked_fill(~predictions.valid[..., None] | scores.isnan(), -1).flatten(1)
        scores, flat = scores.topk(min(top_k, scores.shape[1]), dim=1)
        query = torch.div(flat, num_classes, rounding_mode="floor")
        classes = flat % num_classes
    return scores, boxes.gather(1, query[..., None].expand(-1, -1, 4)), classes


def _to_instances(
    scores: Tensor, boxes_xyxy: Tensor, classes: Tensor, size: tuple[int, int], nms: float
) -> Instances:
    result = Instances(size)
    result.pred_boxes = Boxes(boxes_xyxy)
    result.scores = scores
    result.pred_classes = classes
    if nms > 0:
        keep = batched_nms(result.pred_boxes.tensor, result.scores, result.pred_classes, nms)
        result = result[keep]
    return result


def to_wanted_size(found: Instances, model_input: Mapping[str, Any], *, clip: bool) -> Instances:
    """Detections in the resolution that an input asks for.

    Args:
        found: of one image, in pixels of the network input.
        model_input: Detectron2's; `height` and `width` of the output, default those of the input.
        clip: clip boxes to the image and drop those of which nothing is left, as Detectron2 does.
    """
    height = model_input.get("height", found.image_size[0])
    width = model_input.get("width", found.image_size[1])
    if clip:
        return detector_postprocess(found, height, width)
    scaled = Instances((height, width), **found.get_fields())
    scaled.pred_boxes = found.pred_boxes.clone()
    scaled.pred_boxes.scale(width / found.image_size[1], height / found.image_size[0])
    return scaled
