"""Batched optimal transport from ground truth to predictions, exact and by Sinkhorn iterations.

A problem has M suppliers (ground truths), each with a number of units, and N demanders
(predictions) that take one unit each; the background supplies the remaining units. Costs are
relative to the background's: entry (i, j) is the cost of label i minus the cost of the background
label for prediction j, and the background row is zero. All marginals are fixed, so this subtraction
does not change the optimal plan (Dynamic Sparse R-CNN, Eq. 1).

P problems (stages x images), M ground truths, R = M + 1 rows with the background first, N columns.

Supplies may be fractional, but a prediction takes one label. The solution is then the cheapest
assignment in which row i gets floor(s_i) or ceil(s_i) predictions and floor(sum of s) predictions
are positive; for whole supplies that is the transport optimum itself.
"""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from .transport_repair import RowBounds, all_free, count_rows, repair_assignment

NON_FINITE_PENALTY = 1e3  # above the row's largest finite cost
CHECK_EVERY = 10  # Sinkhorn iterations at one entropy weight, between tests of the stopping rule
PARALLEL_CELLS = 2_000_000  # cost entries from which several threads are faster


class Transport(NamedTuple):
    """Result of a solver.

    Attributes:
        assignment: (P, N) int64, ground truth of each prediction, -1 for background.
        marginal_error: (P,) largest deviation of a column sum of the plan from one.
        misplaced: (P,) int64 number of predictions by which the row counts deviate from the
            supplies.
    """

    assignment: Tensor
    marginal_error: Tensor
    misplaced: Tensor


def finite_cost(cost: Tensor) -> Tensor:
    """Replaces NaN and infinities in (..., M, N) by the row's largest finite cost + 1000."""
    finite = cost.isfinite()
    largest = cost.masked_fill(~finite, -torch.inf).amax(dim=-1, keepdim=True)
    largest = torch.where(largest.isfinite(), largest, 0)
    return torch.where(finite, cost, largest + NON_FINITE_PENALTY)


def background(cost: Tensor) -> Transport:
    """Returns the solution of problems (P, M, N) in which nothing is assigned."""
    num_problems, _, num_columns = cost.shape
    return Transport(
        torch.full((num_problems, num_columns), -1, dtype=torch.long, device=cost.device),
        torch.zeros(num_problems, device=cost.device),
        torch.zeros(num_problems, dtype=torch.long, device=cost.device),
    )


def exact_transport(cost: Tensor, supply: Tensor, column_valid: Tensor) -> Transport:
    """Solves every problem exactly on the host, with one copy in each direction.

    Each row is repeated once per unit, which makes the problem a rectangular assignment.

    Args:
        cost: (P, M, N) relative to the background, any float dtype.
        supply: (P, M), zero on padding; a problem's sum is at most its number of valid columns.
        column_valid: (P, N) bool, False for padded predictions.

    Returns:
        The optimum on the device of `cost`, with error measures of zero.
    """
    if cost.numel() == 0:
        return background(cost)
    # Supplies are copied as one more column and validity as one more row, in a single transfer.
    table = torch.cat((finite_cost(cost), supply.to(cost.dtype)[..., None]), dim=-1)
    valid = torch.nn.functional.pad(column_valid.to(cost.dtype), (0, 1))[:, None]
    host = torch.cat((table, valid), dim=1).cpu().numpy()
    assignment = np.full(column_valid.shape, -1, dtype=np.int64)

    def solve(p: int) -> None:
        columns = np.flatnonzero(host[p, -1, :-1])
        rows = np.flatnonzero(host[p, :-1, -1])
        if rows.size and columns.size:
            chosen = _solve_one(host[p][np.ix_(rows, columns)], host[p, rows, -1])
            assignment[p, columns] = np.where(chosen < 0, -1, rows[chosen])

    if host.size < PARALLEL_CELLS:
        for p in range(len(host)):
            solve(p)
    else:  # scipy releases the interpreter lock
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            list(pool.map(solve, range(len(host))))
    solved = torch.from_numpy(assignment).to(cost.device, non_blocking=True)
    return background(cost)._replace(assignment=solved)


def _solve_one(cost: np.ndarray, supply: np.ndarray) -> np.ndarray:
    """Returns the optimal labels (n,) of one problem (m, n) without padding; -1 is background."""
    slack = 1e-4  # rounding error around whole supplies
    cost = cost.astype(np.float64)
    lower = np.floor(supply + slack).astype(np.int64)
    upper = np.maximum(np.ceil(supply - slack).astype(np.int64), lower)
    owner = np.repeat(np.arange(len(supply)), upper)  # row behind each unit
    num_columns = cost.shape[1]
    table = cost[owner]
    spare = int(upper.sum()) - int(np.floor(supply.sum() + slack))
    if spare:
        # Extra columns take the units beyond the total. Only the optional units of rows may be
        # assigned to them, and their very low cost ensures that all of them are.
        first_unit = np.cumsum(upper) - upper
        optional = np.arange(len(owner)) - first_unit[owner] >= lower[owner]
        bait = (np.ptp(cost) + 1) * (len(owner) + 1)
        bin_cost = np.where(optional, -bait, bait)[:, None]
        table = np.concatenate((table, np.repeat(bin_cost, spare, axis=1)), axis=1)
    units, columns = linear_sum_assignment(table)
    labels = np.full(num_columns, -1, dtype=np.int64)
    served = columns < num_columns
    labels[columns[served]] = owner[units[served]]
    return labels


@dataclass(frozen=True, kw_only=True)
class SinkhornTransport:
    """Annealed, over-relaxed Sinkhorn iterations in the log domain, then a repair of row counts.

    For any row potentials u, assigning each column to the row of least `cost - u` is optimal among
    the assignments with the same row counts (linear programming duality). Sinkhorn iterations are a
    batched way to find potentials whose counts nearly equal the supplies. A problem stops once they
    are equal: it is then solved exactly. For the other problems, `repair_assignment` corrects the
    counts along shortest paths. No step synchronizes with the device; on a CPU the loop ends once
    all problems have stopped.

    The default bounds suffice for the optimum, or a cost well within 1 % of it, unless dozens of
    costs in a row are exactly equal (within some percent) or fractional supplies leave a choice of
    ground truths to serve (within some 15 %). Row counts never exceed their bounds.

    `epsilon_start == epsilon`, `relaxation=1` and `repair_rounds=0` give OTA's plain iterations.

    Attributes:
        epsilon: entropy weight of the last iteration, in units of cost.
        epsilon_start: entropy weight of the first; decreases geometrically every ten iterations.
        iterations: largest number of iterations (one column and one row update each).
        relaxation: factor of every update, in [1, 1.7]; larger ones diverge.
        row_rescale: divide each row of the plan by its maximum before reading it, as OTA does.
        repair_rounds: largest number of units moved afterwards; 0 returns the column-wise argmax of
            the plan.
    """

    epsilon: float = 0.001
    epsilon_start: float = 1.0
    iterations: int = 60
    relaxation: float = 1.5
    row_rescale: bool = False
    repair_rounds: int = 8

    def __post_init__(self) -> None:
        if self.epsilon > self.epsilon_start:
            raise ValueError(
                f"MODEL.MATCHER.OT.EPS is {self.epsilon}; it must be at most "
                f"MODEL.MATCHER.OT.EPS_START ({self.epsilon_start})"
            )

    def __call__(self, cost: Tensor, supply: Tensor, column_valid: Tensor) -> Transport:
        """Solves all problems; arguments and result as in `exact_transport`, in float32."""
        if cost.numel() == 0:
            return background(cost)
        with torch.autocast(cost.device.type, enabled=False):
            rows = table_with_background(cost, column_valid)
            bounds = RowBounds.from_supply(supply, column_valid.shape[-1])
            potentials, assignment, error = self._iterate(rows, supply, bounds)
            if self.repair_rounds:
                assignment = repair_assignment(
                    rows,
                    potentials,
                    assignment,
                    bounds,
                    rounds=self.repair_rounds,
                    tie=self.epsilon,
                )
            missed = bounds.violation(count_rows(assignment, rows.shape[1]))
        return Transport(assignment - 1, error, missed)

    def schedule(self) -> list[tuple[float, int]]:
        """Returns entropy weight and number of iterations between tests of the stopping rule."""
        levels = math.ceil(self.iterations / CHECK_EVERY)
        ratio = self.epsilon / self.epsilon_start
        steps = []
        for level in range(levels):
            share = level / (levels - 1) if levels > 1 else 1.0
            length = min(CHECK_EVERY, self.iterations - level * CHECK_EVERY)
            steps.append((self.epsilon_start * ratio**share, length))
        return steps

    def _iterate(
        self, rows: Tensor, supply: Tensor, bounds: RowBounds
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns potentials (P, R), assignment (P, N) in 0..M and marginal error (P,) of each
        problem when it stopped.

        The state is (u + v - cost) / epsilon. Normalizing rows or columns shifts u or v, and a new
        epsilon scales the state, so the iterations need no explicit potentials.
        """
        every_supply = with_background_supply(supply, rows.shape[-1])[..., None]
        # An empty supply corresponds to a potential far below all costs. The potential is fixed,
        # not the logarithm, which over-relaxed iterations would overshoot when epsilon decreases.
        bottomless = -8 * (rows.amax(dim=(1, 2), keepdim=True) + 1)  # (P, 1, 1)
        unused = torch.nn.functional.pad(supply == 0, (1, 0))  # padded rows; never the background
        cheapest = rows.argmin(dim=-1, keepdim=True)  # (P, R, 1) columns for `_potentials`
        schedule = self.schedule()
        state, previous = rows / -schedule[0][0], schedule[0][0]
        done = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        result = None
        for epsilon, length in schedule:
            state *= previous / epsilon
            previous = epsilon
            log_supply = torch.where(every_supply > 0, every_supply.log(), bottomless / epsilon)
            for _ in range(length):
                state.lerp_(state.log_softmax(dim=1), self.relaxation)
                state.lerp_(state.log_softmax(dim=2).add_(log_supply), self.relaxation)
            potentials = self._potentials(state, rows, cheapest, epsilon)
            potentials = potentials.masked_fill(unused, -torch.inf)
            assignment = (rows - potentials[..., None]).argmin(dim=1)
            error = (state.logsumexp(dim=1).exp() - 1).abs().amax(dim=-1)
            current = (potentials, assignment, error)
            result = current if result is None else _keep_where(done, result, current)
            done = done | (bounds.violation(count_rows(assignment, rows.shape[1])) == 0)
            if all_free(done):
                break
        return result

    def _potentials(self, state: Tensor, rows: Tensor, cheapest: Tensor, epsilon: float) -> Tensor:
        """Computes row potentials (P, R) in units of cost, zero for the background."""
        entry = state.gather(2, cheapest).squeeze(2)
        against = state[:, 0].gather(1, cheapest.squeeze(2))
        # The costs of the background are zero.
        potentials = epsilon * (entry - against) + rows.gather(2, cheapest).squeeze(2)
        if self.row_rescale:
            potentials = potentials - epsilon * state.amax(dim=2)
            potentials = potentials - potentials[:, :1]
        return potentials


def _keep_where(
    done: Tensor, old: tuple[Tensor, ...], new: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """Returns, field by field, `old` for problems that are done and `new` for the others."""
    return tuple(
        torch.where(done.view(-1, *(1,) * (y.dim() - 1)), x, y)
        for x, y in zip(old, new, strict=True)
    )


def table_with_background(cost: Tensor, column_valid: Tensor) -> Tensor:
    """Adds the background row: (P, M, N) -> (P, R, N) float32, background first.

    The minimum of each row is subtracted before the cast, which does not change the plan and keeps
    float32 accurate for costs with large offsets. Padded columns get high costs in all rows but the
    background's.
    """
    cost = finite_cost(cost)
    lowest = cost.masked_fill(~column_valid[:, None], torch.inf).amin(dim=-1, keepdim=True)
    cost = cost - torch.where(lowest.isfinite(), lowest, 0)
    barrier = 2 * cost.abs().amax(dim=(1, 2), keepdim=True) + 1
    cost = torch.where(column_valid[:, None], cost, barrier)
    return torch.nn.functional.pad(cost, (0, 0, 1, 0)).float()


def with_background_supply(supply: Tensor, num_columns: int) -> Tensor:
    """Adds the supply of the background, all other columns (padded ones too): (P, M) -> (P, R)."""
    rest = num_columns - supply.sum(dim=-1, keepdim=True)
    return torch.cat((rest, supply), dim=-1).float()
