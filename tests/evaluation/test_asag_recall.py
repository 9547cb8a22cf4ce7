"""Average recall of proposals against enumeration, and its evaluator."""

from __future__ import annotations

import math

import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.structures import Boxes, BoxMode, Instances
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import box_iou

from asag.evaluation.recall import ProposalRecallEvaluator, average_recall, matched_overlaps

NAME = "recall_of_three_images"


def boxes(count: int) -> torch.Tensor:
    corner = torch.rand(count, 2) * 50
    return torch.cat((corner, corner + 5 + torch.rand(count, 2) * 30), dim=1)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(0, 8), st.integers(0, 5))
def test_matching_equals_sorting_all_pairs(seed: int, proposals: int, objects: int) -> None:
    torch.manual_seed(seed)
    a, b = boxes(proposals), boxes(objects)
    overlap = box_iou(b, a)
    pairs = sorted(
        ((float(overlap[i, j]), i, j) for i in range(objects) for j in range(proposals)),
        reverse=True,
    )
    rows, columns, expected = set(), set(), [0.0] * objects
    for value, i, j in pairs:
        if i not in rows and j not in columns:
            rows.add(i)
            columns.add(j)
            expected[i] = value
    assert matched_overlaps(a, b).tolist() == pytest.approx(expected, abs=1e-6)


def test_average_recall_of_known_overlaps() -> None:
    assert average_recall([1.0, 1.0]) == 100
    assert average_recall([0.0]) == 0
    assert average_recall([0.5]) == pytest.approx(10)
    assert average_recall([0.76, 0.2]) == pytest.approx(30)
    assert math.isnan(average_recall([]))


@pytest.fixture
def dataset():
    records = []
    for i in range(3):
        objects = [{"bbox": [10, 10, 20, 20], "bbox_mode": BoxMode.XYWH_ABS, "iscrowd": 0}]
        objects.append({"bbox": [0, 0, 5, 5], "bbox_mode": BoxMode.XYWH_ABS, "iscrowd": 1})
        records.append({"image_id": i, "annotations": objects if i < 2 else []})
    DatasetCatalog.register(NAME, lambda: records)
    yield
    DatasetCatalog.remove(NAME)


def output(*proposals: list[float]) -> dict:
    instances = Instances((64, 64))
    instances.proposal_boxes = Boxes(torch.tensor(proposals).view(-1, 4))
    instances.objectness_logits = torch.arange(len(proposals)).float()
    return {"proposals": instances}


def test_evaluator(dataset) -> None:
    evaluator = ProposalRecallEvaluator(NAME, distributed=False)
    evaluator.process(
        [{"image_id": 0}, {"image_id": 1}, {"image_id": 2}],
        [output([10, 10, 30, 30.0], [0, 0, 3, 3]), output(), output([1, 1, 2, 2.0])],
    )
    found = evaluator.evaluate()["proposal_recall"]
    assert found == {"AR": pytest.approx(50), "proposals": 1.0, "objects": 2.0}
    evaluator.reset()
    assert math.isnan(evaluator.evaluate()["proposal_recall"]["AR"])


def test_the_limit_keeps_the_best(dataset) -> None:
    evaluator = ProposalRecallEvaluator(NAME, limit=1, distributed=False)
    evaluator.process([{"image_id": 0}], [output([10, 10, 30, 30.0], [0, 0, 3, 3])])
    assert evaluator.evaluate()["proposal_recall"]["AR"] == 0  # the second has the higher logit


def test_outputs_without_proposals_are_refused(dataset) -> None:
    with pytest.raises(KeyError, match="proposals"):
        ProposalRecallEvaluator(NAME).process([{"image_id": 0}], [{"instances": None}])
