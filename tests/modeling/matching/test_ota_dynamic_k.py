"""Units of optimal transport matching: dynamic k, unit increase, cap; compared with plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asag.modeling.matching.dynamic_k import (
    UnitPolicy,
    cap_units,
    grow_units,
    iou_units,
    take_from_largest,
)
from asag.modeling.matching.transport_reference import reference_dynamic_k, reference_supply

PROPERTY = settings(max_examples=40, deadline=None)


@PROPERTY
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 40), st.integers(1, 12))
def test_dynamic_k_equals_the_loop(seed: int, m: int, n: int, q: int) -> None:
    iou = np.random.default_rng(seed).random((m, n))
    assert iou_units(torch.from_numpy(iou), q).tolist() == reference_dynamic_k(iou, q)


@PROPERTY
@given(
    k=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    n=st.integers(2, 60),
    stage=st.integers(1, 6),
    rounding=st.sampled_from(["floor", "round"]),
    cap=st.sampled_from([0.8, 0.7, 0.5, 1.0]),
    padding=st.integers(0, 3),
)
def test_supplies_equal_the_loop(
    k: list[int], n: int, stage: int, rounding: str, cap: float, padding: int
) -> None:
    units = torch.tensor([float(x) for x in k] + [5.0] * padding)
    present = torch.tensor([True] * len(k) + [False] * padding)
    grown = grow_units(units.expand(6, 1, -1), step=0.5, rounding=rounding)[stage - 1, 0]
    ours = cap_units(grown, present, torch.tensor(n), cap=cap, largest=9)
    expected = reference_supply(k, n, stage=stage, unit_rounding=rounding, cap=cap)
    assert ours[: len(k)].tolist() == pytest.approx(expected, abs=1e-5)
    assert ours[len(k) :].eq(0).all()
    assert ours.sum() <= cap * n + 1e-3


@PROPERTY
@given(st.lists(st.integers(0, 9), min_size=1, max_size=10), st.integers(0, 60))
def test_taking_from_the_largest_equals_single_steps(units: list[int], limit: int) -> None:
    expected = list(units)
    while sum(expected) > limit:
        expected[expected.index(max(expected))] -= 1
    ours = take_from_largest(torch.tensor(units, dtype=torch.float), torch.tensor([limit]), 9)
    assert ours.tolist() == expected


def test_every_object_keeps_a_unit_and_a_fifth_stays_negative() -> None:
    k = torch.randint(1, 9, (50, 30), generator=torch.Generator().manual_seed(0)).float()
    present = torch.ones_like(k, dtype=torch.bool)
    supply = cap_units(k, present, torch.full((50,), 40), cap=0.8, largest=8)
    assert (supply >= 1).all()
    assert (supply.sum(dim=-1) <= 32).all()
    assert (supply.sum(dim=-1) >= 30).all()


def test_early_stages_supply_less() -> None:
    grown = grow_units(torch.full((6, 1, 1), 6.0), step=0.5, rounding="none")
    assert grown.flatten().tolist() == [3.5, 4.0, 4.5, 5.0, 5.5, 6.0]
    floored = grow_units(torch.full((6, 1, 1), 6.0), step=0.5, rounding="floor")
    assert floored.flatten().tolist() == [3, 4, 4, 5, 5, 6]
    assert grow_units(torch.ones(6, 1, 1), step=0.5, rounding="none").min() == 1


def test_literal_units_shrink_by_one_factor() -> None:
    units = torch.tensor([3.5, 1.0, 4.5])
    ours = cap_units(units, units > 0, torch.tensor(5), cap=0.8, largest=8, whole=False)
    assert torch.allclose(ours, units * 4 / 9)


def test_policy_with_fixed_units_needs_no_iou() -> None:
    present = torch.tensor([[True, True, False]])
    policy = UnitPolicy(fixed_k=2, unit_increase=False)
    assert policy(None, present, torch.tensor([50]), 3).tolist() == [[[2, 2, 0]]] * 3


def test_policy_counts_only_real_predictions() -> None:
    present = torch.ones(1, 4, dtype=torch.bool)
    policy = UnitPolicy(fixed_k=3, unit_increase=False)
    assert policy(None, present, torch.tensor([10]), 1).sum() == 8
    assert policy(None, present, torch.tensor([100]), 1).sum() == 12
