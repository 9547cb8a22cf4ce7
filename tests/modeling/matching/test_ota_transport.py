"""Transport solvers: optimality, invariances, bounds and failure paths."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from asag.modeling.matching import transport, transport_repair
from asag.modeling.matching.transport import (
    SinkhornTransport,
    exact_transport,
    finite_cost,
    table_with_background,
)
from asag.modeling.matching.transport_reference import (
    reference_linear_program,
    reference_sinkhorn,
)
from asag.modeling.matching.transport_repair import (
    RowBounds,
    _drop_excess,
    count_rows,
    repair_assignment,
)

PROPERTY = settings(max_examples=20, deadline=None)
SOLVERS = {"exact": exact_transport, "sinkhorn": SinkhornTransport()}
seeds = st.integers(0, 10**6)


def problem(seed: int, p: int, m: int, n: int, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    """Costs (p, m, n) relative to the background and whole supplies of at most 80 % of n."""
    rng = torch.Generator().manual_seed(seed)
    cost = scale * (torch.rand(p, m, n, generator=rng) - torch.rand(p, 1, n, generator=rng))
    most = max(1, int(0.8 * n / m))
    return cost, torch.randint(1, min(most, 8) + 1, (p, m), generator=rng).float()


def everything(cost: Tensor) -> Tensor:
    return torch.ones(cost.shape[0], cost.shape[2], dtype=torch.bool)


def total(cost: Tensor, assignment: Tensor) -> Tensor:
    """(P,) cost of assignments, relative to calling everything background."""
    chosen = cost.double().gather(1, assignment.clamp(min=0)[:, None]).squeeze(1)
    return torch.where(assignment >= 0, chosen, 0).sum(dim=-1)


def positives(assignment: Tensor, m: int) -> Tensor:
    return count_rows(assignment, m)


@PROPERTY
@given(seeds, st.integers(1, 6), st.integers(8, 30))
def test_exact_equals_linear_program(seed: int, m: int, n: int) -> None:
    cost, supply = problem(seed, 1, m, n)
    result = exact_transport(cost, supply, everything(cost))
    table = np.concatenate((cost[0].double().numpy(), np.zeros((1, n))))
    units = np.append(supply[0].double().numpy(), n - float(supply.sum()))
    _, best = reference_linear_program(table, units)
    assert float(total(cost, result.assignment)) == pytest.approx(best, abs=1e-6)
    assert torch.equal(positives(result.assignment, m), supply.long())


def test_exact_equals_linear_program_at_full_size() -> None:
    cost, supply = problem(1, 1, 100, 500)
    result = exact_transport(cost, supply, everything(cost))
    table = np.concatenate((cost[0].double().numpy(), np.zeros((1, 500))))
    units = np.append(supply[0].double().numpy(), 500 - float(supply.sum()))
    _, best = reference_linear_program(table, units)
    assert float(total(cost, result.assignment)) == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("scale", [0.5, 1.0, 5.0])
@pytest.mark.parametrize(("p", "m", "n"), [(8, 1, 20), (8, 6, 40), (4, 30, 300), (2, 100, 500)])
def test_sinkhorn_costs_at_most_one_percent_more(p: int, m: int, n: int, scale: float) -> None:
    cost, supply = problem(7, p, m, n, scale)
    best = total(cost, exact_transport(cost, supply, everything(cost)).assignment)
    result = SinkhornTransport()(cost, supply, everything(cost))
    assert torch.equal(positives(result.assignment, m), supply.long())
    assert result.misplaced.eq(0).all()
    excess = total(cost, result.assignment) - best
    assert (excess >= -1e-4).all()
    assert (excess <= 0.01 * best.abs()).all()


@pytest.mark.parametrize("solver", SOLVERS)
@PROPERTY
@given(seed=seeds)
def test_shifting_rows_and_columns_changes_nothing(solver: str, seed: int) -> None:
    cost, supply = problem(seed, 2, 4, 25)
    cost = cost.double()
    rng = torch.Generator().manual_seed(seed + 1)
    plain = SOLVERS[solver](cost, supply, everything(cost)).assignment
    shifted = cost + 1e3 * torch.rand(2, 4, 1, generator=rng, dtype=torch.float64)
    moved = SOLVERS[solver](shifted, supply, everything(cost)).assignment
    assert torch.allclose(total(cost, plain), total(cost, moved), atol=5e-3)
    # A shift of a column of the full table, background included, is gone in the relative cost.
    offset = torch.rand(2, 1, 25, generator=rng, dtype=torch.float64)
    full = torch.cat((cost, torch.zeros(2, 1, 25, dtype=torch.float64)), dim=1) + offset
    again = SOLVERS[solver](full[:, :-1] - full[:, -1:], supply, everything(cost)).assignment
    assert torch.allclose(total(cost, plain), total(cost, again), atol=5e-3)


@pytest.mark.parametrize("solver", SOLVERS)
@PROPERTY
@given(seed=seeds)
def test_permutations_permute_the_answer(solver: str, seed: int) -> None:
    cost, supply = problem(seed, 3, 5, 30)
    rng = torch.Generator().manual_seed(seed)
    image, row, column = (torch.randperm(size, generator=rng) for size in cost.shape)
    plain = SOLVERS[solver](cost, supply, everything(cost)).assignment
    mixed = SOLVERS[solver](
        cost[image][:, row][:, :, column], supply[image][:, row], everything(cost)
    ).assignment
    named = torch.where(mixed >= 0, row[mixed.clamp(min=0)], -1)  # back to the original rows
    expected = plain[image][:, column]
    if solver == "exact":
        assert torch.equal(named, expected)
    else:
        assert torch.allclose(
            total(cost[image][:, :, column], named),
            total(cost[image][:, :, column], expected),
            atol=5e-3,
        )


@pytest.mark.parametrize("solver", SOLVERS)
@PROPERTY
@given(seed=seeds, more_rows=st.integers(0, 3), more_columns=st.integers(0, 5))
def test_padding_changes_nothing(solver: str, seed: int, more_rows: int, more_columns: int) -> None:
    cost, supply = problem(seed, 2, 4, 24)
    plain = SOLVERS[solver](cost, supply, everything(cost)).assignment
    rng = torch.Generator().manual_seed(seed)
    padded = 50 * torch.randn(2, 4 + more_rows, 24 + more_columns, generator=rng)
    padded[:, :4, :24] = cost
    units = torch.nn.functional.pad(supply, (0, more_rows))
    valid = (torch.arange(24 + more_columns) < 24).expand(2, -1)
    answer = SOLVERS[solver](padded, units, valid).assignment
    assert answer[:, 24:].eq(-1).all()
    assert torch.equal(positives(answer, 4 + more_rows)[:, :4], supply.long())
    assert answer.max() < 4
    assert torch.allclose(total(cost, answer[:, :24]), total(cost, plain), atol=5e-3)


@pytest.mark.parametrize("solver", SOLVERS)
def test_batched_equals_single(solver: str) -> None:
    cost, supply = problem(3, 12, 7, 60)
    together = SOLVERS[solver](cost, supply, everything(cost))
    for p in range(12):
        single = SOLVERS[solver](cost[p : p + 1], supply[p : p + 1], everything(cost[:1]))
        assert torch.equal(single.assignment[0], together.assignment[p])


def cheapest_by_enumeration(cost: Tensor, supply: Tensor) -> float:
    """Least cost over all labelings that respect floor, ceiling and total of the supplies."""
    m, n = cost.shape
    best = math.inf
    for labels in itertools.product(range(-1, m), repeat=n):
        counts = [labels.count(i) for i in range(m)]
        if sum(counts) != math.floor(float(supply.sum()) + 1e-4):
            continue
        if any(
            not math.floor(float(s) + 1e-4) <= c <= math.ceil(float(s) - 1e-4)
            for c, s in zip(counts, supply, strict=True)
        ):
            continue
        best = min(best, sum(float(cost[i, j]) for j, i in enumerate(labels) if i >= 0))
    return best


@pytest.mark.parametrize("supply", [[0.8, 0.8, 0.8, 0.8], [1.5, 0.5, 1.5], [1.5, 2.0], [0.6]])
@pytest.mark.parametrize("seed", range(3))
def test_fractional_supplies_get_the_best_whole_answer(supply: list[float], seed: int) -> None:
    units = torch.tensor([supply])
    cost, _ = problem(seed, 1, len(supply), 5)
    best = cheapest_by_enumeration(cost[0], units[0])
    exact = exact_transport(cost, units, everything(cost))
    assert float(total(cost, exact.assignment)) == pytest.approx(best, abs=1e-5)
    counts = positives(SinkhornTransport()(cost, units, everything(cost)).assignment, len(supply))
    assert (counts <= units.ceil()).all()
    assert counts.sum() <= units.sum() + 1e-4


def test_more_objects_than_positives_stay_within_the_cap() -> None:
    cost, _ = problem(0, 4, 40, 45)
    supply = torch.full((4, 40), 0.8 * 45 / 40)
    for solve in SOLVERS.values():
        answer = solve(cost, supply, everything(cost)).assignment
        assert positives(answer, 40).max() <= 1
        assert ((answer >= 0).sum(dim=-1) == 36).all()


@pytest.mark.parametrize("seed", range(5))
def test_chains_reach_the_optimum_from_any_potentials(seed: int) -> None:
    cost, supply = problem(seed, 6, 5, 24)
    rows = table_with_background(cost, everything(cost))
    potentials = torch.randn(6, 6, generator=torch.Generator().manual_seed(seed))
    start = (rows - potentials[..., None]).argmin(dim=1)
    bounds = RowBounds.from_supply(supply, 24)
    assert bounds.violation(count_rows(start, 6)).max() > 2
    repaired = repair_assignment(rows, potentials, start, bounds, rounds=60, tie=-1.0)
    best = total(cost, exact_transport(cost, supply, everything(cost)).assignment)
    assert torch.allclose(total(cost, repaired - 1), best, atol=1e-3)


@pytest.mark.parametrize("m", [1, 5, 30])
def test_never_looking_gives_the_same_answer(m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU runs all iterations and rounds, whether or not problems are already solved."""
    cost, supply = problem(13, 6, m, 40, scale=1.0)
    looking = SinkhornTransport()(cost, supply, everything(cost))
    for module in (transport, transport_repair):
        monkeypatch.setattr(module, "all_free", lambda flags: False)
    blind = SinkhornTransport()(cost, supply, everything(cost))
    assert torch.equal(blind.misplaced, looking.misplaced)
    assert torch.equal(blind.assignment, looking.assignment)
    assert torch.equal(blind.marginal_error, looking.marginal_error)


def test_many_ties_are_settled_together() -> None:
    cost = torch.zeros(2, 10, 200)  # every prediction alike, as freshly initialized ones may be
    supply = torch.full((2, 10), 7.0)
    result = SinkhornTransport()(cost, supply, everything(cost))
    assert torch.equal(positives(result.assignment, 10), supply.long())


def test_excess_is_dropped_dearest_first() -> None:
    rows = torch.tensor([[[0.0] * 6, [1.0, 5.0, 2.0, 4.0, 3.0, 9.0]]])
    bounds = RowBounds.from_supply(torch.tensor([[3.0]]), 6)
    kept = _drop_excess(rows, torch.tensor([[1, 1, 1, 1, 1, 0]]), bounds)
    assert kept.tolist() == [[1, 0, 1, 0, 1, 0]]


@pytest.mark.parametrize("iterations", [1, 10])
def test_plain_settings_equal_the_loop(iterations: int) -> None:
    cost, supply = problem(5, 3, 4, 30)
    plain = SinkhornTransport(
        epsilon=0.1, epsilon_start=0.1, relaxation=1.0, iterations=iterations, repair_rounds=0
    )
    answer = plain(cost, supply, everything(cost))
    for p in range(3):
        # Row minima are subtracted first, which matters while the iterations are few.
        table = torch.nn.functional.pad(cost[p], (0, 0, 0, 1)).double()
        table = table - table.amin(dim=1, keepdim=True)
        units = torch.cat((supply[p], 30 - supply[p].sum()[None])).double()
        plan = reference_sinkhorn(table, units, epsilon=0.1, iterations=iterations)
        top = plan.topk(2, dim=0).values
        clear = top[0] > 1.01 * top[1]
        label = plan.argmax(dim=0)
        label = torch.where(label == 4, -1, label)
        assert clear.sum() > 20
        assert torch.equal(answer.assignment[p][clear], label[clear])
        error = (plan.sum(dim=0) - 1).abs().max()
        assert float(answer.marginal_error[p]) == pytest.approx(float(error), abs=1e-3)


def test_row_rescaling_equals_the_definition() -> None:
    cost, supply = problem(9, 2, 4, 30)
    settings_ = {"epsilon": 0.1, "epsilon_start": 0.1, "relaxation": 1.0, "iterations": 10}
    answer = SinkhornTransport(**settings_, repair_rounds=0, row_rescale=True)(
        cost, supply, everything(cost)
    ).assignment
    for p in range(2):
        table = torch.nn.functional.pad(cost[p], (0, 0, 0, 1)).double()
        table = table - table.amin(dim=1, keepdim=True)
        units = torch.cat((supply[p], 30 - supply[p].sum()[None])).double()
        plan = reference_sinkhorn(table, units, epsilon=0.1, iterations=10)
        plan = plan / plan.amax(dim=1, keepdim=True)
        top = plan.topk(2, dim=0).values
        clear = top[0] > 1.01 * top[1]
        label = torch.where(plan.argmax(dim=0) == 4, -1, plan.argmax(dim=0))
        assert torch.equal(answer[p][clear], label[clear])


@pytest.mark.parametrize("solver", SOLVERS)
def test_broken_costs_are_avoided(solver: str) -> None:
    cost, supply = problem(2, 2, 3, 20)
    broken = torch.zeros_like(cost, dtype=torch.bool)
    broken[0, :, :4] = True
    cost[0, 0, :4], cost[0, 1, :4], cost[0, 2, :4] = math.nan, math.inf, -math.inf
    answer = SOLVERS[solver](cost, supply, everything(cost)).assignment
    assert answer[0, :4].eq(-1).all()
    assert torch.equal(positives(answer, 3), supply.long())


@pytest.mark.parametrize("solver", SOLVERS)
def test_supplies_may_use_up_every_prediction(solver: str) -> None:
    cost, _ = problem(11, 4, 3, 12)
    supply = torch.tensor([[4.0, 5.0, 3.0]]).expand(4, -1)
    answer = SOLVERS[solver](cost, supply, everything(cost)).assignment
    assert torch.equal(positives(answer, 3), supply.long())
    best = total(cost, exact_transport(cost, supply, everything(cost)).assignment)
    assert torch.allclose(total(cost, answer), best, atol=5e-3)


def test_a_row_of_broken_costs_becomes_finite() -> None:
    assert finite_cost(torch.full((1, 2, 3), math.nan)).eq(1000).all()


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5), (2, 3, 0)])
def test_empty_problems(solver: str, shape: tuple[int, int, int]) -> None:
    p, m, n = shape
    result = SOLVERS[solver](
        torch.zeros(shape), torch.ones(p, m), torch.ones(p, n, dtype=torch.bool)
    )
    assert result.assignment.shape == (p, n)
    assert result.assignment.eq(-1).all()


@pytest.mark.parametrize("solver", SOLVERS)
def test_no_supply_and_no_real_column_mean_background(solver: str) -> None:
    cost, _ = problem(0, 2, 3, 10)
    nothing = SOLVERS[solver](cost, torch.zeros(2, 3), everything(cost))
    assert nothing.assignment.eq(-1).all()
    hidden = SOLVERS[solver](cost, torch.zeros(2, 3), ~everything(cost))
    assert hidden.assignment.eq(-1).all()


@pytest.mark.parametrize("solver", SOLVERS)
def test_huge_costs_are_safe_in_float32(solver: str) -> None:
    cost, supply = problem(4, 1, 3, 20)
    best = SOLVERS[solver](cost, supply, everything(cost)).assignment
    forbidden = torch.rand(cost.shape, generator=torch.Generator().manual_seed(0)) < 0.4
    forbidden &= torch.arange(3)[:, None] != best.clamp(min=0)[:, None]
    answer = SOLVERS[solver](cost + 1e6 * forbidden, supply, everything(cost)).assignment
    assert torch.equal(answer, best)


def test_entropy_weight_must_not_grow() -> None:
    with pytest.raises(ValueError, match=r"OT\.EPS is 2\.0; it must be at most .*EPS_START"):
        SinkhornTransport(epsilon=2.0)
