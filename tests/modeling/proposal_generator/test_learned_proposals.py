"""Learned proposals: where their boxes start, and what they hand on."""

import pytest
import torch

from asag.config.rules import RULES
from asag.modeling.proposal_generator import LearnedProposals
from asag.modeling.proposal_generator.learned import initial_boxes
from asag.structures import ImageSizes


@pytest.mark.parametrize("kind", RULES["MODEL.PROPOSAL_GENERATOR.BOX_INIT"].choices)
@pytest.mark.parametrize("count", [1, 5, 36])
def test_initial_boxes_are_shares_of_the_image(kind: str, count: int) -> None:
    boxes = initial_boxes(kind, count)
    assert boxes.shape == (count, 4)
    assert (boxes >= 0).all() and (boxes <= 1).all()


def test_grid_tiles_the_image() -> None:
    boxes = initial_boxes("grid", 9)
    low, high = boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2
    assert torch.allclose((high - low).prod(dim=1).sum(), torch.tensor(1.0))
    torch.testing.assert_close(low[4], torch.full((2,), 1 / 3))
    torch.testing.assert_close(high[5], torch.tensor([1.0, 2 / 3]))


def test_grid_reaches_every_side_for_any_number() -> None:
    boxes = initial_boxes("grid", 50)
    high = boxes[:, :2] + boxes[:, 2:] / 2
    torch.testing.assert_close(high.max(dim=0).values, torch.ones(2))


def test_boxes_scale_with_the_unpadded_image_and_get_gradient() -> None:
    module = LearnedProposals(num_queries=4, dim=8)
    sizes = ImageSizes.from_hw([(64, 96), (32, 40)], (64, 96))
    queries, losses = module({}, sizes)
    whole = torch.tensor([[0.0, 0.0, 96.0, 64.0], [0.0, 0.0, 40.0, 32.0]])
    torch.testing.assert_close(queries.boxes_xyxy, whole[:, None].expand(-1, 4, -1))
    assert queries.valid.all() and queries.all_valid and losses == {}
    queries.boxes_xyxy.sum().backward()
    assert module.boxes_cxcywh.grad.abs().sum() > 0
