"""One-to-one matching: optimal, indifferent to order and padding, clear about NaN."""

from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asag.modeling.matching import HungarianMatcher, MatchingCost, NonFiniteCostError
from asag.modeling.matching.hungarian import solve_assignment
from asag.structures import Predictions, Targets


def brute_force(cost):
    """Smallest total of any complete assignment of the smaller side."""
    rows, columns = cost.shape
    if rows < columns:
        cost, rows, columns = cost.T, columns, rows
    orders = permutations(range(rows), columns)
    return min(sum(cost[r, c] for c, r in enumerate(chosen)) for chosen in orders)


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 5), st.integers(0, 5), st.integers(0, 2**31))
def test_optimal_on_small_problems(queries, objects, seed):
    generator = np.random.default_rng(seed)
    cost = generator.normal(size=(2, 1, queries, max(objects, 1)))
    usable = np.ones((1, queries), dtype=bool)
    assignment = solve_assignment(cost, usable, (objects,))
    for s in range(2):
        chosen = assignment[s, 0]
        matched = np.flatnonzero(chosen >= 0)
        assert len(matched) == min(queries, objects)
        assert len(set(chosen[matched])) == len(matched)  # nobody twice
        total = sum(cost[s, 0, n, chosen[n]] for n in matched)
        assert total == pytest.approx(brute_force(cost[s, 0, :, :objects]))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31))
def test_padding_is_never_matched_and_changes_nothing(seed):
    generator = np.random.default_rng(seed)
    cost = generator.normal(size=(2, 2, 6, 4))
    counts = (3, 2)
    small = solve_assignment(cost, np.ones((2, 6), dtype=bool), counts)
    # Cheaper than anything, but not there.
    padded = np.full((2, 2, 9, 7), -100.0)
    padded[:, :, :6, :4] = cost
    usable = np.arange(9)[None].repeat(2, 0) < 6
    large = solve_assignment(padded, usable, counts)
    assert np.array_equal(large[:, :, :6], small) and (large[:, :, 6:] == -1).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31))
def test_permuted_problems_have_permuted_solutions(seed):
    generator = np.random.default_rng(seed)
    cost = generator.normal(size=(1, 1, 6, 4))
    rows, columns = generator.permutation(6), generator.permutation(4)
    usable = np.ones((1, 6), dtype=bool)
    plain = solve_assignment(cost, usable, (4,))[0, 0]
    permuted = solve_assignment(cost[:, :, rows][..., columns], usable, (4,))[0, 0]
    assert [columns[m] if m >= 0 else -1 for m in permuted] == plain[rows].tolist()


def make(counts=(2, 0, 3), stages=2, queries=6):
    g = torch.Generator().manual_seed(0)
    low = 40 * torch.rand(stages, len(counts), queries, 2, generator=g)
    predictions = Predictions(
        torch.randn(stages, len(counts), queries, 5, generator=g),
        torch.cat((low, low + 20), -1),
        torch.ones(len(counts), queries, dtype=torch.bool),
    )
    gt = [predictions.boxes_xyxy[-1, b].repeat(9, 1)[:n] + 0.5 for b, n in enumerate(counts)]
    labels = [torch.randint(5, (n,), generator=g) for n in counts]
    return predictions, Targets.from_lists(gt, labels, torch.full((len(counts), 4), 64.0))


def test_finds_the_boxes_that_fit():
    predictions, targets = make()
    matcher = HungarianMatcher(cost=MatchingCost(class_weight=0.0))
    assignment = matcher(predictions, targets)
    assert assignment.dtype is torch.int64 and assignment.shape == (2, 3, 6)
    assert assignment[-1].tolist() == [
        [0, 1, -1, -1, -1, -1], [-1] * 6, [0, 1, 2, -1, -1, -1]
    ]  # fmt: skip


def test_every_object_gets_exactly_one_query():
    predictions, targets = make()
    assignment = HungarianMatcher(cost=MatchingCost())(predictions, targets)
    for s in range(2):
        for b, count in enumerate(targets.counts):
            found = assignment[s, b][assignment[s, b] >= 0]
            assert sorted(found.tolist()) == list(range(count))


def test_a_batch_without_objects_is_all_background():
    predictions, targets = make(counts=(0, 0))
    assignment = HungarianMatcher(cost=MatchingCost())(predictions, targets)
    assert assignment.shape == (2, 2, 6) and (assignment == -1).all()


def test_more_objects_than_queries():
    predictions, targets = make(counts=(5, 1), queries=3)
    assignment = HungarianMatcher(cost=MatchingCost())(predictions, targets)
    assert (assignment[:, 0] >= 0).all()
    assert all(len(set(row.tolist())) == 3 for row in assignment[:, 0])


def test_padded_queries_answer_for_nothing():
    predictions, targets = make()
    predictions.valid[0, :2] = False
    predictions.boxes_xyxy[:, 0, :2] = float("nan")  # whatever padding holds
    assignment = HungarianMatcher(cost=MatchingCost())(predictions, targets)
    assert (assignment[:, 0, :2] == -1).all() and (assignment[:, 0] >= 0).sum() == 4


def test_fewer_valid_queries_than_objects():
    predictions, targets = make()
    predictions.valid[2] = False
    predictions.valid[2, 4] = True
    assignment = HungarianMatcher(cost=MatchingCost())(predictions, targets)
    assert (assignment[:, 2] >= 0).sum(dim=1).tolist() == [1, 1]


@pytest.mark.parametrize(
    "field, value",
    [("logits", float("nan")), ("boxes_xyxy", float("nan")), ("boxes_xyxy", float("inf"))],
)
def test_what_is_not_finite_is_named(field, value):
    predictions, targets = make()
    getattr(predictions, field)[1, 2, 3] = value
    matcher = HungarianMatcher(cost=MatchingCost())
    with pytest.raises(NonFiniteCostError, match=r"stage 1, image 2 .*\(1 queries.*BASE_LR"):
        matcher(predictions, targets)


def test_what_is_not_finite_in_an_image_without_objects_does_not_matter():
    predictions, targets = make()
    predictions.boxes_xyxy[0, 1] = float("nan")
    assert (HungarianMatcher(cost=MatchingCost())(predictions, targets)[:, 1] == -1).all()
