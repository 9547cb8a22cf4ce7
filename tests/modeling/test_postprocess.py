"""Selection of detections against a loop."""

import pytest
import torch
from torchvision.ops import box_iou

from asag.modeling.postprocess import select_detections
from asag.structures import Predictions

SIZES = ((40, 60), (50, 30))


def make(columns=3, queries=7, seed=0):
    g = torch.Generator().manual_seed(seed)
    low = 20 * torch.rand(2, 2, queries, 2, generator=g)
    boxes = torch.cat((low, low + 20), -1)
    valid = torch.ones(2, queries, dtype=torch.bool)
    return Predictions(torch.randn(2, 2, queries, columns, generator=g), boxes, valid)


def slow(predictions, image, top_k, softmax):
    candidates = []
    for n, row in enumerate(predictions.logits[-1, image]):
        if not predictions.valid[image, n]:
            continue
        if softmax:
            score, k = row.softmax(0)[:-1].max(0)
            candidates.append((float(score), n, int(k)))
        else:
            candidates += [(float(x.sigmoid()), n, k) for k, x in enumerate(row)]
    return sorted(candidates, reverse=True)[:top_k]


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("top_k", [1, 5, 100])
def test_equals_the_loop(softmax, top_k):
    predictions = make()
    predictions.valid[1, 3:] = False
    found = select_detections(predictions, SIZES, top_k=top_k, softmax=softmax)
    for b, instances in enumerate(found):
        expected = slow(predictions, b, top_k, softmax)
        assert instances.image_size == SIZES[b] and len(instances) == len(expected)
        assert instances.scores.tolist() == pytest.approx([x[0] for x in expected])
        assert instances.pred_classes.tolist() == [x[2] for x in expected]
        boxes = torch.stack([predictions.boxes_xyxy[-1, b, x[1]] for x in expected])
        assert torch.equal(instances.pred_boxes.tensor, boxes)


def test_nothing_valid_gives_no_detections():
    predictions = make()
    predictions.valid[0] = False
    none, some = select_detections(predictions, SIZES, top_k=4)
    assert len(none) == 0 and len(some) == 4
    assert none.pred_boxes.tensor.shape == (0, 4)


def test_scores_that_are_not_numbers_are_dropped():
    predictions = make()
    predictions.logits[-1, 0, 2] = float("nan")
    for softmax in (False, True):
        found = select_detections(predictions, SIZES, top_k=100, softmax=softmax)[0]
        assert len(found) == (6 if softmax else 18)
        assert found.scores.isfinite().all()


def test_suppression_is_by_class():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9.5], [30, 30, 40, 40]])
    logits = torch.tensor([[3.0, -9], [2, 1], [1, -9]])
    predictions = Predictions(
        logits[None, None], boxes[None, None], torch.ones(1, 3, dtype=torch.bool)
    )
    (plain,) = select_detections(predictions, [(50, 50)], top_k=4)
    (kept,) = select_detections(predictions, [(50, 50)], top_k=4, nms_threshold=0.7)
    assert len(plain) == 4
    # The second box loses its first class to the first box, but keeps the other.
    assert kept.pred_classes.tolist() == [0, 1, 0] or kept.pred_classes.tolist() == [0, 0, 1]
    assert sorted(kept.pred_classes.tolist()) == [0, 0, 1]
    same = kept[kept.pred_classes == 0].pred_boxes.tensor
    assert box_iou(same, same).fill_diagonal_(0).max() <= 0.7
    assert (kept.scores[:-1] >= kept.scores[1:]).all()


def test_many_classes_keep_their_index():
    predictions = make(columns=1203, queries=300)
    found = select_detections(predictions, SIZES, top_k=300)
    for b, instances in enumerate(found):
        same = instances.pred_boxes.tensor[:, None] == predictions.boxes_xyxy[-1, b][None]
        query = same.all(dim=-1).long().argmax(dim=1)
        logits = predictions.logits[-1, b, query, instances.pred_classes]
        assert torch.equal(logits.sigmoid(), instances.scores)
