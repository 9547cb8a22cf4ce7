"""Average recall of proposals, whatever their class: how many objects some proposal fits, averaged
over IoU 0.50 to 0.95 (ASAG, Table 5e).

N proposals, M objects, T thresholds.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import BoxMode
from detectron2.utils import comm
from torch import Tensor

from ..modeling.layers.boxes import box_iou

THRESHOLDS = tuple(round(0.5 + 0.05 * i, 2) for i in range(10))


def matched_overlaps(proposals_xyxy: Tensor, objects_xyxy: Tensor) -> Tensor:
    """IoU of each object with the proposal that it gets, (M,), 0 without one.

    The best pair of all is matched first, then the best of what is left, so that a proposal serves
    one object, as in Detectron2's evaluation of proposals.

    Args:
        proposals_xyxy: (N, 4).
        objects_xyxy: (M, 4), in the same unit.
    """
    overlap = box_iou(objects_xyxy[:, None], proposals_xyxy[None])  # (M, N)
    result = overlap.new_zeros(len(objects_xyxy))
    for _ in range(min(overlap.shape)):
        best = int(overlap.argmax())
        row, column = divmod(best, overlap.shape[1])
        result[row] = overlap[row, column].clamp(min=0)
        overlap[row] = -1
        overlap[:, column] = -1
    return result


def average_recall(overlaps: Sequence[float], thresholds: Sequence[float] = THRESHOLDS) -> float:
    """Share of objects above each threshold, averaged, in percent; NaN without objects."""
    values = np.asarray(overlaps, dtype=np.float64)
    if not len(values):
        return float("nan")
    return float(np.mean([(values >= t).mean() for t in thresholds])) * 100


class ProposalRecallEvaluator(DatasetEvaluator):
    """AR at up to `limit` proposals an image, from outputs with `proposals`: instances with
    `proposal_boxes` in the resolution of the data set and optionally `objectness_logits`."""

    def __init__(self, dataset_name: str, *, limit: int = 1000, distributed: bool = True) -> None:
        """
        Args:
            dataset_name: a registered data set with annotations.
            limit: proposals an image, the best by `objectness_logits` where there are more.
            distributed: gather from all processes.
        """
        self.limit = limit
        self.distributed = distributed
        self.objects = {
            record["image_id"]: _objects(record) for record in DatasetCatalog.get(dataset_name)
        }
        self.reset()

    def reset(self) -> None:
        """Forgets what was processed."""
        self.overlaps: dict[Any, list[float]] = {}
        self.counts: dict[Any, int] = {}

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Takes a batch.

        Raises:
            KeyError: an output has no `proposals`, or an image is not of the data set.
        """
        for x, output in zip(inputs, outputs, strict=True):
            if "proposals" not in output:
                raise KeyError(
                    "outputs need 'proposals' (instances with proposal_boxes) for their recall, "
                    f"got {sorted(output)}"
                )
            proposals = output["proposals"]
            boxes = proposals.proposal_boxes.tensor.detach().cpu().float()
            if len(boxes) > self.limit and proposals.has("objectness_logits"):
                boxes = boxes[proposals.objectness_logits.cpu().argsort(descending=True)]
            boxes, image = boxes[: self.limit], x["image_id"]
            self.overlaps[image] = matched_overlaps(boxes, self.objects[image]).tolist()
            self.counts[image] = len(boxes)

    def evaluate(self) -> dict[str, dict[str, float]]:
        """`AR` in percent, `proposals` an image, and `objects`; empty on other processes."""
        overlaps, counts = [self.overlaps], [self.counts]
        if self.distributed:
            comm.synchronize()
            overlaps, counts = comm.gather(self.overlaps), comm.gather(self.counts)
            if not comm.is_main_process():
                return {}
        # By image: a sampler may give an image to two processes.
        merged = {image: values for part in overlaps for image, values in part.items()}
        numbers = {image: count for part in counts for image, count in part.items()}
        flat = list(itertools.chain.from_iterable(merged.values()))
        mean = float(np.mean(list(numbers.values()))) if numbers else float("nan")
        return {
            "proposal_recall": {
                "AR": average_recall(flat),
                "proposals": mean,
                "objects": float(len(flat)),
            }
        }


def _objects(record: dict[str, Any]) -> Tensor:
    """(M, 4) xyxy of a data set record's objects, crowds left out."""
    boxes = [
        BoxMode.convert(list(x["bbox"]), x["bbox_mode"], BoxMode.XYXY_ABS)
        for x in record.get("annotations", ())
        if not x.get("iscrowd", 0)
    ]
    return torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
