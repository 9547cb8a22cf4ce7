"""Matching cost against a loop over every stage, image, prediction and object."""

import math

import pytest
import torch

from asag.modeling.matching import MatchingCost
from asag.structures import Predictions, Targets

S, B, N, K = 2, 3, 5, 4
WHWH = torch.tensor([[60.0, 40, 60, 40], [30, 50, 30, 50], [64, 64, 64, 64]])


def make(dtype=torch.float64, columns=K, counts=(3, 0, 1), seed=0):
    g = torch.Generator().manual_seed(seed)

    def boxes(*shape, whwh):
        center, half = torch.rand(*shape, 2, generator=g), 0.3 * torch.rand(*shape, 2, generator=g)
        return torch.cat((center - half, center + half + 0.01), -1).to(whwh) * whwh

    whwh = WHWH.to(dtype)
    predicted = boxes(S, B, N, whwh=whwh[:, None])
    logits = 3 * torch.randn(S, B, N, columns, generator=g, dtype=dtype)
    gt = [boxes(n, whwh=whwh[b]) for b, n in enumerate(counts)]
    labels = [torch.randint(K, (n,), generator=g) for n in counts]
    predictions = Predictions(logits, predicted, torch.ones(B, N, dtype=torch.bool))
    return predictions, Targets.from_lists(gt, labels, whwh)


def slow_giou(a, b):
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    area = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    union = area - width * height
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return width * height / union - (hull - union) / hull


def slow_cost(logits, box, label, gt, whwh, kind, box_format, weights, alpha, gamma):
    if kind == "softmax":
        exps = [math.exp(x) for x in logits]
        classification = -exps[label] / sum(exps)
    else:
        p = 1 / (1 + math.exp(-logits[label]))
        positive = -alpha * (1 - p) ** gamma * math.log(p + 1e-8)
        negative = -(1 - alpha) * p**gamma * math.log(1 - p + 1e-8)
        classification = positive - negative
    a, b = ([x / s for x, s in zip(y, whwh, strict=True)] for y in (box, gt))
    if box_format == "cxcywh":
        a, b = ([(y[0] + y[2]) / 2, (y[1] + y[3]) / 2, y[2] - y[0], y[3] - y[1]] for y in (a, b))
    l1 = sum(abs(x - y) for x, y in zip(a, b, strict=True))
    return weights[0] * classification + weights[1] * l1 - weights[2] * slow_giou(box, gt)


@pytest.mark.parametrize("kind", ["focal", "softmax"])
@pytest.mark.parametrize("box_format", ["xyxy", "cxcywh"])
def test_equals_the_loop(kind, box_format):
    predictions, targets = make(columns=K + (kind == "softmax"))
    weights, alpha, gamma = (1.5, 4.0, 3.0), 0.3, 1.7
    cost = MatchingCost(*weights, class_cost=kind, box_format=box_format, alpha=alpha, gamma=gamma)
    computed = cost(predictions, targets)
    assert computed.shape == (S, B, N, 3)
    for s in range(S):
        for b, count in enumerate(targets.counts):
            for n in range(N):
                for m in range(count):
                    expected = slow_cost(
                        predictions.logits[s, b, n].tolist(),
                        predictions.boxes_xyxy[s, b, n].tolist(),
                        int(targets.labels[b, m]),
                        targets.boxes_xyxy[b, m].tolist(),
                        WHWH[b].tolist(),
                        kind, box_format, weights, alpha, gamma,
                    )  # fmt: skip
                    assert float(computed[s, b, n, m]) == pytest.approx(expected, abs=1e-9)


def test_padding_columns_are_finite_and_do_not_disturb():
    predictions, targets = make(counts=(3, 0, 1))
    cost = MatchingCost()(predictions, targets)
    assert cost.isfinite().all()
    longer_predictions, longer = make(counts=(3, 0, 1))
    longer.boxes_xyxy = torch.nn.functional.pad(longer.boxes_xyxy, (0, 0, 0, 4), value=1)
    longer.labels = torch.nn.functional.pad(longer.labels, (0, 4))
    assert torch.equal(MatchingCost()(longer_predictions, longer)[..., :3], cost)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_predictions_cost_in_float32(dtype):
    predictions, targets = make(torch.float32)
    half = Predictions(predictions.logits.to(dtype), predictions.boxes_xyxy, predictions.valid)
    rounded = Predictions(half.logits.float(), predictions.boxes_xyxy, predictions.valid)
    cost = MatchingCost()(half, targets)
    assert cost.dtype is torch.float32
    assert torch.equal(cost, MatchingCost()(rounded, targets))


def test_extreme_logits_are_finite():
    predictions, targets = make(torch.float32)
    predictions.logits[0], predictions.logits[1] = 1e4, -1e4
    assert MatchingCost()(predictions, targets).isfinite().all()


def test_no_gradient():
    predictions, targets = make()
    predictions.logits.requires_grad_()
    assert not MatchingCost()(predictions, targets).requires_grad
