"""Padding of ground truth."""

import pytest
import torch
from detectron2.structures import Boxes, ImageList, Instances

from asag.structures import ImageSizes, Predictions, Targets


def lists():
    boxes = [torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 9]]), torch.zeros(0, 4), torch.ones(1, 4)]
    labels = [torch.tensor([4, 0]), torch.zeros(0, dtype=torch.long), torch.tensor([2])]
    return boxes, labels, torch.tensor([[20.0, 10, 20, 10]] * 3)


def test_padding():
    boxes, labels, whwh = lists()
    targets = Targets.from_lists(boxes, labels, whwh)
    assert targets.counts == (2, 0, 1)
    assert targets.valid.tolist() == [[True, True], [False, False], [True, False]]
    assert targets.labels.tolist() == [[4, 0], [0, 0], [2, 0]]
    for b in range(3):
        assert torch.equal(targets.boxes_xyxy[b][targets.valid[b]], boxes[b])
    padding = targets.boxes_xyxy[~targets.valid]
    assert torch.equal(padding, torch.tensor([[0.0, 0, 1, 1]] * 3))
    assert targets.image_whwh is whwh


def test_a_batch_without_objects_still_has_a_column():
    empty = [torch.zeros(0, 4)] * 2
    targets = Targets.from_lists(empty, [torch.zeros(0, dtype=torch.long)] * 2, torch.ones(2, 4))
    assert targets.boxes_xyxy.shape == (2, 1, 4) and not targets.valid.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_types(dtype):
    boxes, labels, whwh = lists()
    labels = [x.to(torch.int32) for x in labels]
    targets = Targets.from_lists(boxes, labels, whwh.to(dtype))
    assert targets.boxes_xyxy.dtype is dtype and targets.labels.dtype is torch.int64
    assert targets.valid.dtype is torch.bool


def test_the_lists_are_copied():
    boxes, labels, whwh = lists()
    targets = Targets.from_lists(boxes, labels, whwh)
    boxes[0].zero_()
    assert targets.boxes_xyxy[0, 1].tolist() == [5, 6, 7, 9]


def test_from_instances_equals_from_lists():
    boxes, labels, whwh = lists()
    instances = [
        Instances((10, 20), gt_boxes=Boxes(b), gt_classes=c)
        for b, c in zip(boxes, labels, strict=True)
    ]
    a, b = Targets.from_instances(instances, whwh), Targets.from_lists(boxes, labels, whwh)
    for name in ("boxes_xyxy", "labels", "valid"):
        assert torch.equal(getattr(a, name), getattr(b, name))
    assert a.counts == b.counts


def test_sizes_are_those_before_padding_width_first():
    images = ImageList.from_tensors([torch.zeros(3, 10, 20), torch.zeros(3, 30, 5)], 32)
    sizes = ImageSizes.from_images(images)
    assert sizes.whwh.tolist() == [[20, 10, 20, 10], [5, 30, 5, 30]]
    assert sizes.hw == ((10, 20), (30, 5)) and sizes.padded_hw == (32, 32)
    assert len(sizes) == 2 and sizes.any_padding


def test_padding_is_known_on_the_host():
    assert not ImageSizes.from_hw([(8, 6), (8, 6)]).any_padding
    assert ImageSizes.from_hw([(8, 6), (8, 5)]).any_padding
    assert ImageSizes.from_hw([(8, 6)], (32, 32)).any_padding


def test_last_stage():
    predictions = Predictions(
        torch.randn(3, 2, 4, 5), torch.randn(3, 2, 4, 4), torch.ones(2, 4, dtype=torch.bool)
    )
    last = predictions.last()
    assert predictions.num_stages == 3 and last.num_stages == 1
    assert torch.equal(last.logits[0], predictions.logits[2])
    assert torch.equal(last.boxes_xyxy[0], predictions.boxes_xyxy[2])
