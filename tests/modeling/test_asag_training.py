"""Training of ASAG compared with loops: patches, targets, anchor losses, weights, denoising."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import box_iou as pairwise_iou
from torchvision.ops import generalized_box_iou

from asag.modeling.criterion import QueryWeightingCriterion, SetCriterion
from asag.modeling.layers.boxes import cxcywh_to_xyxy
from asag.modeling.layers.loss_weights import QueryWeights, weigh_area
from asag.modeling.matching import HungarianMatcher, MatchingCost, NonFiniteCostError
from asag.modeling.proposal_generator.asag.anchor_loss import (
    AnchorCriterion,
    PatchGroup,
    solve_patches,
)
from asag.modeling.proposal_generator.asag.anchors import Anchors, GeneratedAnchors, ProbedPatches
from asag.modeling.proposal_generator.asag.denoising import (
    attendable_pairs,
    noised_boxes,
    noised_gt,
)
from asag.modeling.proposal_generator.asag.patch_targets import (
    PatchTargets,
    probed_targets,
    quadrant_targets,
    whole_image_targets,
)
from asag.modeling.proposal_generator.asag.training_patches import PatchCompletion, PatchKind
from asag.structures import NoisedPredictions, Predictions, Targets

SEEDS = st.integers(0, 10_000)
SIZES = torch.tensor([[384.0, 320, 384, 320], [300, 250, 300, 250], [90, 70, 90, 70]])


def make_targets(seed: int, counts: tuple[int, ...] = (6, 0, 2), largest: float = 0.5) -> Targets:
    generator = torch.Generator().manual_seed(seed)
    boxes, labels = [], []
    for count, size in zip(counts, SIZES, strict=False):
        center = torch.rand(count, 2, generator=generator)
        half = 0.02 + largest / 2 * torch.rand(count, 2, generator=generator)
        box = torch.cat((center - half, center + half), dim=1).clamp(0, 1)
        boxes.append(box * size)
        labels.append(torch.randint(4, (count,), generator=generator))
    return Targets.from_lists(boxes, labels, SIZES[: len(counts)])


# Training patches


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.integers(0, 6), st.booleans(), st.sampled_from((8, 16)))
def test_completion(seed: int, generated: int, warmup: bool, stride: int) -> None:
    torch.manual_seed(seed)
    targets = make_targets(seed, largest=0.2)
    corner = torch.randint(5, (3, 6, 2))
    valid = (torch.arange(6) < torch.tensor([[generated], [2], [0]])) & (not warmup)
    completion = PatchCompletion(targets, warmup=torch.tensor(warmup))
    found, exists, forward, kind = completion(stride, corner, valid)
    _, truth_exists = completion.ground_truth_patches(stride)
    for b in range(3):
        kinds = kind[b][exists[b]].tolist()
        assert kinds == sorted(kinds)  # generated, ground truth, random
        assert torch.equal(found[b][exists[b]][: int(valid[b].sum())], corner[b][valid[b]])
        assert len(kinds) >= 4
        made = kinds.count(PatchKind.GENERATED)
        from_truth = kinds.count(PatchKind.GROUND_TRUTH)
        if warmup:
            assert from_truth == int(truth_exists[b].sum())
        else:
            assert from_truth == min(max(4 - made, 0), int(truth_exists[b].sum()))
        assert len(kinds) == max(4, made + from_truth)
        for k, f in zip(kind[b], forward[b], strict=True):
            passes_on = k == PatchKind.GENERATED or (warmup and k == PatchKind.GROUND_TRUTH)
            assert not f or passes_on
        for c, k in zip(found[b][exists[b]].tolist(), kinds, strict=True):
            if k != PatchKind.GENERATED:
                for start, size in zip(c, SIZES[b].tolist(), strict=False):
                    assert 0 <= start <= max(math.ceil(size / stride) - 15, 0)


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.sampled_from((8, 16)))
def test_ground_truth_patches_hold_their_object(seed: int, stride: int) -> None:
    torch.manual_seed(seed)
    targets = make_targets(seed, (5, 3), largest=0.25)
    corner, valid = PatchCompletion(targets).ground_truth_patches(stride)
    for b in range(2):
        small = [
            box
            for box in targets.boxes_xyxy[b][targets.valid[b]].tolist()
            if max(box[2] - box[0], box[3] - box[1]) < 7.5 * stride
        ]
        assert bool(small) == bool(valid[b].any())
        for x, y in (corner[b][valid[b]] * stride).tolist():
            reach = 16 * stride  # whole cells: the object may stick out by less than one
            assert any(
                x <= box[0] and y <= box[1] and box[2] <= x + reach and box[3] <= y + reach
                for box in small
            )


def test_fixed_capacity_completes_alike() -> None:
    targets = make_targets(3, largest=0.2)
    corner, valid = torch.zeros(3, 2, 2, dtype=torch.long), torch.tensor([[True, False]] * 3)
    results = []
    for capacity in (0, 12):
        torch.manual_seed(0)
        draws = torch.rand(500)
        completion = PatchCompletion(
            targets,
            capacity=capacity,
            uniform=lambda shape, device, draws=draws: torch.full(shape, float(draws[len(shape)])),
        )
        results.append(completion(16, corner, valid))
    variable, fixed = results
    assert fixed[0].shape[1] == 12
    for b in range(3):
        own = (variable[1][b], fixed[1][b])
        assert torch.equal(variable[0][b][own[0]], fixed[0][b][own[1]])
        assert torch.equal(variable[3][b][own[0]], fixed[3][b][own[1]])


# Targets of patches


def loop_targets(boxes: Tensor, window: tuple[float, ...], limit: float | None) -> list[list]:
    """(m, 4) xyxy pixels -> cxcywh in the window of those that belong to it."""
    x0, y0, w, h = window
    found = []
    for left, top, right, bottom in boxes.tolist():
        cx, cy = (left + right) / 2, (top + bottom) / 2
        inside = x0 <= cx <= x0 + w and y0 <= cy <= y0 + h
        if not inside or (limit is not None and max(right - left, bottom - top) > limit):
            continue
        left, right = max(left - x0, 0) / w, min(right - x0, w) / w
        top, bottom = max(top - y0, 0) / h, min(bottom - y0, h) / h
        found.append([(left + right) / 2, (top + bottom) / 2, right - left, bottom - top])
    return found


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_patch_targets_equal_loops(seed: int) -> None:
    targets = make_targets(seed)
    corner = torch.randint(8, (3, 4, 2), generator=torch.Generator().manual_seed(seed))
    quadrants, probed = quadrant_targets(targets), probed_targets(targets, corner, 8, 15)
    for b in range(3):
        boxes = targets.boxes_xyxy[b][targets.valid[b]]
        w, h = SIZES[b][0].item() / 2, SIZES[b][1].item() / 2
        for p in range(4):
            x, y = (corner[b, p] * 8).tolist()
            for found, window, limit in (
                (quadrants, (p % 2 * w, p // 2 * h, w, h), None),
                (probed, (x, y, 120, 120), 120),
            ):
                expected = torch.tensor(loop_targets(boxes, window, limit)).view(-1, 4)
                actual = found.boxes_cxcywh[b, p][found.valid[b, p]]
                torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_flipped_targets_are_the_mirror_image() -> None:
    targets = make_targets(1)
    whole = whole_image_targets(targets, flips=True)
    original, horizontal, vertical, both = whole.boxes_cxcywh.unbind(dim=1)
    torch.testing.assert_close(horizontal[..., 0], 1 - original[..., 0])
    torch.testing.assert_close(vertical[..., 1], 1 - original[..., 1])
    torch.testing.assert_close(both[..., :2], 1 - original[..., :2])
    for view in (horizontal, vertical, both):
        assert torch.equal(view[..., 2:], original[..., 2:])
    assert torch.equal(whole.valid[:, 3], targets.valid)


# Losses of the anchors


def loop_anchor_loss(
    raw: Tensor, gt: Tensor, cost: MatchingCost, large: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of one patch: (A, 5) against (m, 4)."""
    weights = QueryWeights()
    boxes, logit = raw[:, :4], raw[:, 4]
    score = logit.sigmoid()
    area = weigh_area(gt[:, 2] * gt[:, 3], cost.area_weight, large=large)
    iou = pairwise_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(gt))
    giou = generalized_box_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(gt))
    positive = 0.25 * (1 - score) ** 2 * -(score + 1e-8).log()
    negative = 0.75 * score**2 * -(1 - score + 1e-8).log()
    table = 2 * (positive - negative)[:, None] + 5 * torch.cdist(boxes, gt, p=1) - 2 * giou
    rows, columns = linear_sum_assignment((table * area).detach().numpy())
    ce = l1 = gi = raw.sum() * 0
    for i in range(len(raw)):
        if i in rows:
            t = int(columns[list(rows).index(i)])
            u = iou[i, t].detach()
            w = area[t] * weights.positive(score[i], u)
            bce = F.binary_cross_entropy_with_logits(logit[i], u)
            ce = ce + area[t] * bce * (u - score[i]) ** 2
            l1 = l1 + w * (boxes[i] - gt[t]).abs().sum()
            gi = gi + w * (1 - giou[i, t])
        elif not len(gt) or iou[i].max() < 0.5:
            ce = ce + F.softplus(logit[i]) * score[i] ** 2
    return ce, l1, gi


def make_raw(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randn(*shape, 5, generator=generator)
    return torch.cat((raw[..., :4].sigmoid(), raw[..., 4:]), dim=-1).requires_grad_()


def make_generated(seed: int) -> GeneratedAnchors:
    probed = []
    for level in (4, 3):
        corner = torch.randint(6, (3, 5, 2), generator=torch.Generator().manual_seed(seed + level))
        valid = torch.arange(5) < torch.tensor([[5], [2], [4]])
        raw = make_raw(seed + level, 3, 5, 6)
        kind = torch.zeros(3, 5, dtype=torch.long)
        probed.append(ProbedPatches(level, 15, corner, valid, valid, raw, valid.sum(dim=1), kind))
    anchors = Anchors(torch.empty(3, 0, 4), torch.empty(3, 0), torch.empty(3, 0).bool())
    return GeneratedAnchors(anchors, make_raw(seed, 3, 4, 7), make_raw(seed + 1, 3, 4, 7), probed)


@settings(max_examples=10, deadline=None)
@given(SEEDS)
def test_anchor_losses_equal_loops(seed: int) -> None:
    targets, generated = make_targets(seed), make_generated(seed)
    cost = MatchingCost(box_format="cxcywh", area_weight=4.0)
    criterion = AnchorCriterion(cost=cost)
    losses = criterion(generated, targets)
    sums = [torch.zeros(3), torch.zeros(3)]  # fixed part, probed patches
    patches = 0
    for g, group in enumerate(criterion.groups(generated, targets)):
        for b, p in group.valid.nonzero().tolist():
            own = group.targets.boxes_cxcywh[b, p][group.targets.valid[b, p]]
            found = loop_anchor_loss(group.raw[b, p], own, cost, large=g == 0)
            sums[g >= 2] = sums[g >= 2] + torch.stack(found)
            patches += g >= 2
    total = (sums[0] + sums[1] * 4 / patches) / 8  # objects
    for name, weight, value in zip(("ce", "bbox", "giou"), (8, 4, 2), total, strict=True):
        torch.testing.assert_close(
            losses[f"loss_{name}_anchor"], weight * value, rtol=1e-4, atol=1e-5
        )


def test_padded_patches_and_objects_say_nothing() -> None:
    targets, generated = make_targets(2), make_generated(2)
    criterion = AnchorCriterion(cost=MatchingCost(box_format="cxcywh", area_weight=4.0))
    before = criterion(generated, targets)
    sum(before.values()).backward()
    for probed in generated.probed:
        assert (probed.raw.grad[~probed.valid] == 0).all()
        assert (probed.raw.grad[probed.valid] != 0).any()
        probed.raw.data[~probed.valid] = 0.3
    targets.boxes_xyxy[~targets.valid] = 7.0
    after = criterion(generated, targets)
    for name in before:
        torch.testing.assert_close(after[name], before[name])


def test_nothing_to_find_still_trains_every_patch() -> None:
    targets, generated = make_targets(2, (0, 0, 0)), make_generated(2)
    losses = AnchorCriterion(cost=MatchingCost(box_format="cxcywh"))(generated, targets)
    assert losses["loss_bbox_anchor"] == losses["loss_giou_anchor"] == 0
    sum(losses.values()).backward()
    for raw in (generated.p6, generated.p5, *(x.raw for x in generated.probed)):
        assert raw.grad.isfinite().all() and (raw.grad[..., 4] != 0).any()


def test_anchors_that_fit_unmatched_are_no_negatives() -> None:
    gt = torch.tensor([[[[0.5, 0.5, 0.4, 0.4]]]])
    raw = torch.tensor([[[[0.5, 0.5, 0.4, 0.4, 1.0], [0.51, 0.5, 0.4, 0.4, 1.0]]]]).requires_grad_()
    valid = torch.ones(1, 1, 1, dtype=torch.bool)
    group = PatchGroup(raw, valid[..., 0], PatchTargets(gt, valid))
    criterion = AnchorCriterion(cost=MatchingCost(box_format="cxcywh"))
    match = criterion.match([group])[0]
    assert match.tolist() == [[[0, -1]]]
    criterion.terms(group, match)["ce"].backward()
    assert raw.grad[0, 0, 1].abs().max() == 0


def test_infinite_costs_are_reported() -> None:
    cost = np.zeros((2, 3, 2), dtype=np.float32)
    cost[1, 0, 1] = np.nan
    usable = np.array([[True, True], [True, False]])
    assert (solve_patches(cost, usable)[1] == [0, -1, -1]).all()  # the bad column is not used
    usable[1, 1] = True
    with pytest.raises(NonFiniteCostError, match="anchors"):
        solve_patches(cost, usable)


# Query Weighting


def make_predictions(seed: int, stages: int = 2, queries: int = 7) -> Predictions:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(stages, 3, queries, 2, generator=generator) * 0.6
    side = 0.05 + torch.rand(stages, 3, queries, 2, generator=generator) * 0.4
    boxes = torch.cat((corner, corner + side), dim=-1) * SIZES[:, None]
    logits = torch.randn(stages, 3, queries, 4, generator=generator)
    valid = torch.arange(queries) < torch.tensor([[7], [5], [6]])
    return Predictions(logits.requires_grad_(), boxes.requires_grad_(), valid)


def loop_query_weighting(
    predictions: Predictions, targets: Targets, assignment: Tensor
) -> list[Tensor]:
    weights, result = QueryWeights(), []
    for s in range(predictions.num_stages):
        ce = l1 = gi = torch.zeros(())
        for b in range(len(targets.counts)):
            scale = targets.image_whwh[b]
            for n in predictions.valid[b].nonzero()[:, 0].tolist():
                logit, box = predictions.logits[s, b, n], predictions.boxes_xyxy[s, b, n]
                t = int(assignment[s, b, n])
                background = logit.sigmoid() ** 2 * F.softplus(logit)
                if t < 0:
                    ce = ce + background.sum()
                    continue
                gt, k = targets.boxes_xyxy[b, t], int(targets.labels[b, t])
                iou = pairwise_iou(box[None], gt[None])[0, 0].detach()
                share = gt / scale
                area = 4 - 3 * ((share[2] - share[0]) * (share[3] - share[1])).sqrt()
                p = logit[k].sigmoid().detach()
                w_pos, w_neg = weights.positive(p, iou), weights.negative(p, iou)
                others = background.sum() - background[k]
                matched = w_pos * F.softplus(-logit[k]) + w_neg * F.softplus(logit[k])
                ce = ce + others + area * matched
                center = lambda x: torch.cat(((x[:2] + x[2:]) / 2, x[2:] - x[:2]))  # noqa: E731
                l1 = l1 + area * w_pos * (center(box / scale) - center(share)).abs().sum()
                giou = generalized_box_iou(box[None], gt[None])[0, 0]
                gi = gi + area * w_pos * (1 - giou)
        objects = max(sum(targets.counts), 1)
        result.append(torch.stack((2 * ce, 5 * l1, 2 * gi)) / objects)
    return result


@settings(max_examples=10, deadline=None)
@given(SEEDS)
def test_query_weighting_equals_loops(seed: int) -> None:
    targets, predictions = make_targets(seed, (3, 0, 2)), make_predictions(seed)
    cost = MatchingCost(box_format="cxcywh", area_weight=4.0)
    assignment = HungarianMatcher(cost=cost)(predictions, targets)
    criterion = QueryWeightingCriterion(l1_format="cxcywh")
    losses = criterion(predictions, targets, assignment)
    expected = loop_query_weighting(predictions, targets, assignment)
    for s, suffix in enumerate(("_0", "")):
        actual = torch.stack([losses[f"loss_{x}{suffix}"] for x in ("ce", "bbox", "giou")])
        torch.testing.assert_close(actual, expected[s], rtol=1e-4, atol=1e-6)


def test_several_queries_may_answer_for_one_object() -> None:
    targets, predictions = make_targets(5, (2, 0, 1)), make_predictions(5)
    assignment = torch.full((2, 3, 7), -1)
    assignment[:, 0, :4] = torch.tensor([0, 0, 1, 0])
    losses = QueryWeightingCriterion(l1_format="cxcywh")(predictions, targets, assignment)
    expected = loop_query_weighting(predictions, targets, assignment)
    actual = torch.stack([losses[f"loss_{x}"] for x in ("ce", "bbox", "giou")])
    torch.testing.assert_close(actual, expected[1], rtol=1e-4, atol=1e-6)


def test_invalid_queries_say_nothing() -> None:
    targets, predictions = make_targets(5, (2, 0, 1)), make_predictions(5)
    assignment = torch.full((2, 3, 7), -1)
    criterion = QueryWeightingCriterion(l1_format="cxcywh")
    sum(criterion(predictions, targets, assignment).values()).backward()
    assert (predictions.logits.grad[:, ~predictions.valid] == 0).all()
    predictions.boxes_xyxy.data[:, ~predictions.valid] = float("inf")
    sum(criterion(predictions, targets, assignment).values()).backward()
    assert predictions.boxes_xyxy.grad.isfinite().all()


def test_weights_rise_with_quality() -> None:
    weights, x = QueryWeights(), torch.linspace(0, 1, 50)
    positive = weights.positive(x[:, None], x[None])
    assert (positive.diff(dim=0) >= 0).all() and (positive.diff(dim=1) >= 0).all()
    assert positive.max() == pytest.approx(1, abs=1e-6)
    negative = weights.negative(x[:, None], x[None])
    assert (negative.diff(dim=0) >= -1e-7).all() and (negative.diff(dim=1) <= 1e-7).all()
    assert negative.min() == pytest.approx(0, abs=1e-6)


def test_softmax_classifiers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"MODEL\.CRITERION\.CLASS_LOSS"):
        QueryWeightingCriterion(class_loss="softmax")


# Denoising


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 9), st.integers(0, 9), st.integers(1, 20))
def test_denoising_groups(first: int, second: int, slots: int) -> None:
    targets = make_targets(0, (first, second))
    gt, group = noised_gt(targets, slots)
    for b, count in enumerate((first, second)):
        groups = slots // count if count else 0
        expected = list(range(count)) * groups
        assert gt[b].tolist() == expected + [-1] * (slots - len(expected))
        for k in range(groups):
            assert (group[b] == k).sum() == count
    valid = torch.tensor([[True] * 4, [True, True, False, False]])
    seen = attendable_pairs(group, valid, torch.tensor([first == 0, second == 0]))
    assert not seen[:, slots:, :slots].any()  # anchors never see the answers
    assert seen.diagonal(dim1=1, dim2=2)[:, :slots].all()
    real = group >= 0
    between = seen[:, :slots, :slots] & real[:, :, None]
    assert torch.equal(between, (group[:, :, None] == group[:, None]) & real[:, :, None])


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.floats(0, 0.8))
def test_noise_is_bounded(seed: int, noise: float) -> None:
    torch.manual_seed(seed)
    targets = make_targets(seed, (3, 2))
    gt, _ = noised_gt(targets, 12)
    found = noised_boxes(targets, gt, noise)
    for b in range(2):
        own = gt[b] >= 0
        clean, noisy = targets.boxes_xyxy[b][gt[b][own]], found[b][own]
        size = clean[:, 2:] - clean[:, :2]
        moved = ((noisy - clean)[:, :2] + (noisy - clean)[:, 2:]).abs() / 2
        assert (moved <= size / 2 * noise + 1e-3).all()
        grown = ((noisy[:, 2:] - noisy[:, :2]) - size).abs()
        assert (grown <= size * noise + 1e-3).all()
        assert (found[b][~own][:, 2:] == targets.image_whwh[b, 2:]).all()


@pytest.mark.parametrize("criterion", [SetCriterion(), QueryWeightingCriterion()])
def test_denoising_losses_are_those_of_known_answers(criterion: SetCriterion) -> None:
    targets, predictions, noised = (
        make_targets(1, (2, 0, 1)),
        make_predictions(1),
        make_predictions(2),
    )
    gt = torch.full((3, 7), -1)
    gt[0, :6], gt[2, :5] = torch.arange(6) % 2, 0
    noised.valid = gt >= 0
    assignment = torch.full((2, 3, 7), -1)
    alone = criterion(predictions, targets, assignment)
    predictions.noised = NoisedPredictions(noised, gt)
    losses = criterion(predictions, targets, assignment)
    for name, value in alone.items():
        assert losses[name] == value
    known = criterion(noised, targets, gt.expand(2, -1, -1))
    for name, value in known.items():
        expected = value * 3 / 21  # divided by objects there, by slots here
        torch.testing.assert_close(losses[name.replace("loss_", "loss_dn_")], expected)
