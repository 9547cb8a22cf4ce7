"""Mending an assignment whose row counts miss their supplies, along shortest paths.

An assignment that gives every column the row of least `cost - potential` is optimal for its own row
counts. Moving one column from row a to row b costs the slack of b there; a chain of such moves
hands one unit from a row with too many columns to a row with too few. The cheapest chain keeps the
assignment optimal for its new counts (successive shortest paths, with Johnson's potentials to keep
lengths non-negative), so mending ends in the transport optimum if its rounds suffice.

P problems, R rows with the background first, N columns. All problems advance together, each by one
chain a round, and nothing waits for the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SUPPLY_SLACK = 1e-4  # float32 noise around whole supplies
MAX_HOPS = 8  # rows a chain may pass; longer ones are never the cheapest in practice
HOP_COST = 1e-6  # makes every move cost something, so that chains cannot run in circles


class RowBounds(NamedTuple):
    """Fewest and most columns of every row, (P, R) int64 each; they differ for fractional
    supplies only."""

    lower: Tensor
    upper: Tensor

    @classmethod
    def from_supply(cls, supply: Tensor, num_columns: int) -> RowBounds:
        """Bounds of supplies (P, M) and of the background, which takes all other columns."""
        lower = (supply + SUPPLY_SLACK).floor()
        upper = torch.maximum((supply - SUPPLY_SLACK).ceil(), lower)
        rest = num_columns - (supply.sum(dim=-1, keepdim=True) + SUPPLY_SLACK).floor()
        return cls(torch.cat((rest, lower), dim=-1).long(), torch.cat((rest, upper), dim=-1).long())

    def violation(self, counts: Tensor) -> Tensor:
        """(P,) columns that must move before `counts` (P, R) lie within the bounds."""
        missing = (self.lower - counts).clamp(min=0).sum(dim=-1)
        excess = (counts - self.upper).clamp(min=0).sum(dim=-1)
        return torch.maximum(missing, excess)


def count_rows(assignment: Tensor, num_rows: int) -> Tensor:
    """(P, N) row of each column -> (P, R) columns of each row."""
    rows = torch.arange(num_rows, device=assignment.device)
    return (assignment[:, None] == rows[:, None]).sum(dim=-1)


def repair_assignment(
    rows: Tensor, potentials: Tensor, assignment: Tensor, bounds: RowBounds, *, rounds: int
) -> Tensor:
    """Brings row counts within their bounds at the least cost.

    Args:
        rows: (P, R, N) costs.
        potentials: (P, R) for which `assignment` is the column-wise argmin of `rows - potentials`.
        assignment: (P, N) int64 in 0..R-1.
        bounds: permitted counts.
        rounds: chains tried in each problem.

    Returns:
        (P, N) int64. No row exceeds its upper bound and the background reaches its lower one even
        if the rounds were too few; rows may then lack columns.
    """
    for _ in range(rounds):
        counts = count_rows(assignment, rows.shape[1])
        if counts.device.type == "cpu" and not bool(bounds.violation(counts).any()):
            return assignment
        potentials, assignment = _move_one_unit(rows, potentials, assignment, counts, bounds)
    return _drop_excess(rows, assignment, bounds)


def _move_one_unit(
    rows: Tensor, potentials: Tensor, assignment: Tensor, counts: Tensor, bounds: RowBounds
) -> tuple[Tensor, Tensor]:
    """One cheapest chain in every problem that needs one; potentials and assignment afterwards."""
    givers, takers = _ends(counts, bounds)
    reduced = rows - potentials[..., None]
    slack = (reduced - reduced.gather(1, assignment[:, None])).clamp_(min=HOP_COST)  # (P, R, N)
    price = _pair_prices(slack, assignment)  # (P, R to, R from)
    distance = torch.where(takers, 0.0, torch.inf)
    for _ in range(min(MAX_HOPS, rows.shape[1] - 1)):
        distance = torch.minimum(distance, (price + distance[..., None]).amin(dim=1))
    towards = (price + distance[..., None]).argmin(dim=1)  # next row on the way to a taker

    length, start = distance.masked_fill(~givers, torch.inf).min(dim=1, keepdim=True)
    on_chain = _follow(start, towards, takers) & length.isfinite()
    assignment = _shift_along(on_chain & ~takers, towards, slack, price, assignment)
    descent = torch.where(length.isfinite(), torch.minimum(distance, length), 0)
    return potentials - descent, assignment


def _ends(counts: Tensor, bounds: RowBounds) -> tuple[Tensor, Tensor]:
    """Rows that may start and that may end a chain, (P, R) bool each; none where all is well."""
    lacking, excessive = counts < bounds.lower, counts > bounds.upper
    any_lacking = lacking.any(dim=1, keepdim=True)
    any_excessive = excessive.any(dim=1, keepdim=True)
    givers = torch.where(any_lacking, counts > bounds.lower, excessive)
    takers = torch.where(any_lacking, lacking, (counts < bounds.upper) & any_excessive)
    return givers, takers


def _pair_prices(slack: Tensor, assignment: Tensor) -> Tensor:
    """(P, R, R): entry (b, a) is the least slack of row b in the columns of row a, or infinity."""
    num_problems, num_rows, _ = slack.shape
    price = slack.new_full((num_problems, num_rows, num_rows), torch.inf)
    return price.scatter_reduce_(2, assignment[:, None].expand_as(slack), slack, "amin")


def _follow(start: Tensor, towards: Tensor, takers: Tensor) -> Tensor:
    """(P, R) bool, rows from `start` (P, 1) to a taker; all False where none is reached."""
    itself = torch.arange(towards.shape[1], device=towards.device).expand_as(towards)
    step = torch.where(takers, itself, towards)
    visited = torch.zeros_like(takers).scatter_(1, start, True)
    current = start
    for _ in range(min(MAX_HOPS + 1, towards.shape[1] - 1)):
        current = step.gather(1, current)
        visited = visited.scatter_(1, current, True)
    return visited & takers.gather(1, current)


def _shift_along(
    leaving: Tensor, towards: Tensor, slack: Tensor, price: Tensor, assignment: Tensor
) -> Tensor:
    """Moves the cheapest column of every row in `leaving` (P, R) on to the row `towards` it."""
    num_columns = assignment.shape[1]
    target = towards.gather(1, assignment)  # (P, N), where each column would go
    move_slack = slack.gather(1, target[:, None]).squeeze(1)
    least = price.gather(1, towards[:, None]).squeeze(1)  # (P, R)
    candidate = leaving.gather(1, assignment) & (move_slack == least.gather(1, assignment))
    index = torch.arange(num_columns, device=assignment.device).expand_as(assignment)
    first = torch.full_like(towards, num_columns).scatter_reduce_(
        1, assignment, index.masked_fill(~candidate, num_columns), "amin"
    )
    moves = candidate & (first.gather(1, assignment) == index)
    return torch.where(moves, target, assignment)


def _drop_excess(rows: Tensor, assignment: Tensor, bounds: RowBounds) -> Tensor:
    """Turns the dearest columns of rows above their bound, and of the whole, into background."""
    dearness = rows.gather(1, assignment[:, None]).squeeze(1)
    index = torch.arange(assignment.shape[1], device=assignment.device)
    ahead = (dearness[:, None] < dearness[..., None]) | (
        (dearness[:, None] == dearness[..., None]) & (index < index[:, None])
    )  # (P, N, N): the second column is served before the first
    same_row = assignment[:, None] == assignment[..., None]
    place = (ahead & same_row).sum(dim=-1)
    kept = (assignment > 0) & (place < bounds.upper.gather(1, assignment))
    place = (ahead & kept[:, None]).sum(dim=-1)
    kept &= place < assignment.shape[1] - bounds.lower[:, :1]
    return torch.where(kept, assignment, 0)
