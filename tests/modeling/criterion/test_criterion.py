"""Set criterion against a loop over stages, images, queries and classes."""

import math

import pytest
import torch

from asag.modeling.criterion import SetCriterion
from asag.modeling.criterion.set_criterion import gather_targets
from asag.structures import Predictions, Targets

S, B, N, K = 3, 3, 6, 4
WHWH = torch.tensor([[60.0, 40, 60, 40], [30, 50, 30, 50], [64, 64, 64, 64]]).double()


def make(columns=K, counts=(3, 0, 2), padded=True):
    """Random predictions; some objects are answered for several times, some never."""
    g = torch.Generator().manual_seed(0)

    def boxes(*shape, whwh):
        center = torch.rand(*shape, 2, generator=g, dtype=torch.float64)
        half = 0.3 * torch.rand(*shape, 2, generator=g, dtype=torch.float64) + 0.01
        return torch.cat((center - half, center + half), -1) * whwh

    valid = torch.ones(B, N, dtype=torch.bool)
    valid[0, -1] = not padded
    predictions = Predictions(
        torch.randn(S, B, N, columns, generator=g, dtype=torch.float64).requires_grad_(),
        boxes(S, B, N, whwh=WHWH[:, None]).requires_grad_(),
        valid,
    )
    gt = [boxes(n, whwh=WHWH[b]) for b, n in enumerate(counts)]
    labels = [torch.randint(K, (n,), generator=g) for n in counts]
    targets = Targets.from_lists(gt, labels, WHWH)
    assignment = torch.full((S, B, N), -1)
    for b, count in enumerate(counts):
        assignment[:, b] = torch.randint(-1, count, (S, N), generator=g) if count else -1
    return predictions, targets, assignment


def slow_giou(a, b):
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return width * height / union - (hull - union) / hull


def slow_losses(
    predictions, targets, assignment, kind, box_format, normalizer, alpha, gamma, noobj
):
    """Unweighted (class, L1, GIoU) of every stage, one pair at a time."""
    result = []
    for s in range(S):
        ce = weights = l1 = giou = 0.0
        positives = 0
        for b in range(B):
            for n in range(N):
                m = int(assignment[s, b, n])
                if not predictions.valid[b, n]:
                    continue
                logits = predictions.logits[s, b, n].tolist()
                label = int(targets.labels[b, m]) if m >= 0 else None
                if kind == "softmax":
                    log_sum = math.log(sum(math.exp(x) for x in logits))
                    weight = noobj if label is None else 1.0
                    ce += weight * (log_sum - logits[K if label is None else label])
                    weights += weight
                else:
                    for k, x in enumerate(logits):
                        p = 1 / (1 + math.exp(-x))
                        if k == label:
                            ce += -alpha * (1 - p) ** gamma * math.log(p)
                        else:
                            ce += -(1 - alpha) * p**gamma * math.log(1 - p)
                if m < 0:
                    continue
                positives += 1
                box = predictions.boxes_xyxy[s, b, n].tolist()
                gt = targets.boxes_xyxy[b, m].tolist()
                giou += 1 - slow_giou(box, gt)
                x, y = ([v / w for v, w in zip(u, WHWH[b].tolist())] for u in (box, gt))  # noqa: B905
                if box_format == "cxcywh":
                    x, y = (
                        [(u[0] + u[2]) / 2, (u[1] + u[3]) / 2, u[2] - u[0], u[3] - u[1]]
                        for u in (x, y)
                    )
                l1 += sum(abs(p - q) for p, q in zip(x, y, strict=True))
        norm = positives if normalizer == "positives" else sum(targets.counts)
        norm = max(norm, 1)
        result.append((ce / (weights if kind == "softmax" else norm), l1 / norm, giou / norm))
    return result


@pytest.mark.parametrize("kind", ["focal", "softmax"])
@pytest.mark.parametrize("box_format", ["xyxy", "cxcywh"])
@pytest.mark.parametrize("normalizer", ["objects", "positives"])
def test_equals_the_loop(kind, box_format, normalizer):
    predictions, targets, assignment = make(K + (kind == "softmax"))
    criterion = SetCriterion(
        class_loss=kind,
        class_weight=1.5,
        l1_weight=4.0,
        giou_weight=3.0,
        l1_format=box_format,
        focal_alpha=0.3,
        focal_gamma=1.7,
        no_object_weight=0.2,
        normalizer=normalizer,
    )
    losses = criterion(predictions, targets, assignment)
    expected = slow_losses(
        predictions, targets, assignment, kind, box_format, normalizer, 0.3, 1.7, 0.2
    )
    assert len(losses) == 3 * S
    for s, values in enumerate(expected):
        suffix = "" if s == S - 1 else f"_{s}"
        for name, weight, value in zip(
            ("ce", "bbox", "giou"), (1.5, 4.0, 3.0), values, strict=True
        ):
            assert float(losses[f"loss_{name}{suffix}"]) == pytest.approx(weight * value, rel=1e-6)


def test_gradients_are_numerically_right():
    predictions, targets, assignment = make(K + 1)

    def total(logits, boxes):
        losses = SetCriterion(class_loss="softmax")(
            Predictions(logits, boxes, predictions.valid), targets, assignment
        )
        return sum(losses.values())

    assert torch.autograd.gradcheck(total, (predictions.logits, predictions.boxes_xyxy))


def test_focal_gradient_equals_that_of_the_written_out_formula():
    # Its logarithms are taken in float32, too coarse for finite differences.
    predictions, targets, assignment = make()
    losses = SetCriterion(class_weight=1.0)(predictions, targets, assignment)
    ce = sum(value for name, value in losses.items() if "ce" in name)
    (gradient,) = torch.autograd.grad(ce, predictions.logits)
    gt = torch.zeros_like(predictions.logits)
    for s, b, n in (assignment >= 0).nonzero().tolist():
        gt[s, b, n, targets.labels[b, assignment[s, b, n]]] = 1
    p = predictions.logits.sigmoid()
    loss = -0.25 * gt * (1 - p) ** 2 * p.log() - 0.75 * (1 - gt) * p**2 * (1 - p).log()
    loss = (loss * predictions.valid[..., None]).sum() / sum(targets.counts)
    assert torch.allclose(gradient, torch.autograd.grad(loss, predictions.logits)[0], atol=1e-6)


def test_empty_batch_has_exact_zero_box_losses_with_a_graph():
    predictions, targets, _ = make(counts=(0, 0, 0))
    losses = SetCriterion()(predictions, targets, torch.full((S, B, N), -1))
    sum(losses.values()).backward()
    for name, value in losses.items():
        assert (value == 0) == ("ce" not in name)
        assert value.requires_grad
    assert not predictions.boxes_xyxy.grad.any() and predictions.logits.grad.any()


def test_unmatched_infinite_boxes_do_not_reach_the_gradient():
    predictions, targets, assignment = make(padded=False)
    assignment[0, 0, 0] = -1
    boxes = predictions.boxes_xyxy.detach().clone()
    for bad in (float("inf"), float("nan")):
        boxes[0, 0, 0] = bad
        boxes.requires_grad_().grad = None
        losses = SetCriterion()(
            Predictions(predictions.logits, boxes, predictions.valid), targets, assignment
        )
        sum(losses.values()).backward()
        assert all(v.isfinite() for v in losses.values())
        assert boxes.grad.isfinite().all() and not boxes.grad[0, 0, 0].any()
        boxes = boxes.detach()


def test_padded_queries_count_nowhere():
    predictions, targets, assignment = make(padded=True)
    expected = SetCriterion()(predictions, targets, assignment)
    assignment[:, 0, -1] = 0
    with torch.no_grad():
        predictions.logits[:, 0, -1] = 99
    losses = SetCriterion()(predictions, targets, assignment)
    assert all(torch.equal(losses[name], expected[name]) for name in expected)


def test_only_the_last_stage_without_deep_supervision():
    everything = SetCriterion()(*make())
    last = SetCriterion(deep_supervision=False)(*make())
    assert set(last) == {"loss_ce", "loss_bbox", "loss_giou"}
    assert all(torch.equal(last[name], everything[name]) for name in last)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_give_float32_losses(dtype):
    predictions, targets, assignment = make()
    targets.boxes_xyxy, targets.image_whwh = targets.boxes_xyxy.float(), targets.image_whwh.float()
    logits, boxes = predictions.logits.detach().to(dtype), predictions.boxes_xyxy.detach().float()
    half = SetCriterion()(Predictions(logits, boxes, predictions.valid), targets, assignment)
    full = SetCriterion()(
        Predictions(logits.float(), boxes, predictions.valid), targets, assignment
    )
    for name in full:
        assert half[name].dtype is torch.float32 and torch.equal(half[name], full[name])


def test_gather_targets_equals_the_loop():
    g = torch.Generator().manual_seed(0)
    index = torch.randint(4, (S, B, N), generator=g)
    for shape in ((B, 4), (B, 4, 5), (B, 4, 2, 3)):
        values = torch.randn(shape, generator=g)
        gathered = gather_targets(values, index)
        assert gathered.shape == (S, B, N, *shape[2:])
        for s in range(S):
            for b in range(B):
                for n in range(N):
                    assert torch.equal(gathered[s, b, n], values[b, index[s, b, n]])
