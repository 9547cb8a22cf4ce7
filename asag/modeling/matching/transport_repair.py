"""Repair of assignments whose row counts deviate from the supplies, along shortest paths.

An assignment that gives every column the row of least `cost - potential` is optimal for its own row
counts. Moving one column from row a to row b costs the slack of b there; a chain of such moves
transfers one unit from a row with too many columns to a row with too few. The cheapest chain keeps
the assignment optimal for its new counts (successive shortest paths, with Johnson's potentials to
keep lengths non-negative), so the repair ends in the transport optimum if its rounds suffice.

Ties are resolved first, many units at a time: columns move directly to rows of equal cost. What
remains after the chains is moved directly at any cost.

P problems, R rows with the background first, N columns. All problems advance together without
synchronization.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SUPPLY_SLACK = 1e-4  # rounding error around whole supplies
MAX_HOPS = 6  # rows in a chain; longer ones are never the cheapest in practice
HOP_COST = 1e-6  # smallest cost of a move, which prevents cycles
SETTLING_ROUNDS = 3  # of direct moves, before and after the chains
JITTER = 1e-6  # distributes columns with equal costs over the rows


class RowBounds(NamedTuple):
    """Smallest and largest number of columns of every row, (P, R) int64 each; they differ only for
    fractional supplies."""

    lower: Tensor
    upper: Tensor

    @classmethod
    def from_supply(cls, supply: Tensor, num_columns: int) -> RowBounds:
        """Returns the bounds of supplies (P, M) and of the background, which takes the rest."""
        lower = (supply + SUPPLY_SLACK).floor()
        upper = torch.maximum((supply - SUPPLY_SLACK).ceil(), lower)
        rest = num_columns - (supply.sum(dim=-1, keepdim=True) + SUPPLY_SLACK).floor()
        return cls(torch.cat((rest, lower), dim=-1).long(), torch.cat((rest, upper), dim=-1).long())

    def violation(self, counts: Tensor) -> Tensor:
        """Returns the number of columns (P,) that must move to bring `counts` (P, R) within the
        bounds."""
        missing = (self.lower - counts).clamp(min=0).sum(dim=-1)
        excess = (counts - self.upper).clamp(min=0).sum(dim=-1)
        return torch.maximum(missing, excess)


def count_rows(assignment: Tensor, num_rows: int) -> Tensor:
    """Counts the columns (P, R) of each row in an assignment (P, N)."""
    rows = torch.arange(num_rows, device=assignment.device)
    return (assignment[:, None] == rows[:, None]).sum(dim=-1)


def repair_assignment(
    rows: Tensor,
    potentials: Tensor,
    assignment: Tensor,
    bounds: RowBounds,
    *,
    rounds: int,
    tie: float,
) -> Tensor:
    """Moves columns at the least cost until row counts are within their bounds.

    Args:
        rows: (P, R, N) costs.
        potentials: (P, R) for which `assignment` is the column-wise argmin of `rows - potentials`;
            minus infinity for rows without supply.
        assignment: (P, N) int64 in 0..R-1.
        bounds: permitted counts.
        rounds: largest number of chains in each problem.
        tie: largest difference of costs that count as equal.

    Returns:
        (P, N) int64. If the rounds do not suffice, rows may lack columns; still no row exceeds its
        upper bound and the background reaches its lower one.
    """
    assignment = _settle(rows, potentials, assignment, bounds, tolerance=tie)
    for _ in range(rounds):
        spare, space = _ends(count_rows(assignment, rows.shape[1]), bounds)
        if all_free(space == 0):
            return assignment
        potentials, assignment = _move_one_unit(rows, potentials, assignment, spare > 0, space > 0)
    assignment = _settle(rows, potentials, assignment, bounds, tolerance=torch.inf)
    return _drop_excess(rows - potentials[..., None], assignment, bounds)


def all_free(flags: Tensor) -> bool:
    """Returns True if all flags are set on a CPU; always False on a GPU, without reading them."""
    return flags.device.type == "cpu" and bool(flags.all())


def _ends(counts: Tensor, bounds: RowBounds) -> tuple[Tensor, Tensor]:
    """Returns the number of columns that each row can give and can take, (P, R) each."""
    lacking = (bounds.lower - counts).clamp(min=0)
    excess = (counts - bounds.upper).clamp(min=0)
    urgent = lacking.any(dim=1, keepdim=True)
    spare = torch.where(urgent, (counts - bounds.lower).clamp(min=0), excess)
    relief = (bounds.upper - counts).clamp(min=0) * excess.any(dim=1, keepdim=True)
    return spare, torch.where(urgent, lacking, relief)


def _settle(
    rows: Tensor, potentials: Tensor, assignment: Tensor, bounds: RowBounds, *, tolerance: float
) -> Tensor:
    """Moves columns directly from rows that can give to rows that can take, the cheapest first, at
    a cost of at most `tolerance` each."""
    _, num_rows, num_columns = rows.shape
    reduced = rows - potentials[..., None] + JITTER * _scatter(num_rows, num_columns, rows.device)
    for _ in range(SETTLING_ROUNDS):
        spare, space = _ends(count_rows(assignment, num_rows), bounds)
        if all_free(space == 0):
            break
        extra = reduced - reduced.gather(1, assignment[:, None])
        price, taker = extra.masked_fill((space == 0)[..., None], torch.inf).min(dim=1)  # (P, N)
        willing = (spare.gather(1, assignment) > 0) & (price <= tolerance) & price.isfinite()
        ahead = _served_first(price.masked_fill(~willing, torch.inf))
        to_same = (ahead & (taker[:, None] == taker[..., None])).sum(dim=-1)
        moves = willing & (to_same < space.gather(1, taker))
        from_same = ahead & moves[:, None] & (assignment[:, None] == assignment[..., None])
        moves &= from_same.sum(dim=-1) < spare.gather(1, assignment)
        assignment = torch.where(moves, taker, assignment)
    return assignment


def _scatter(num_rows: int, num_columns: int, device: torch.device) -> Tensor:
    """Returns pseudo-random numbers (R, N) in [0, 1), the same in every call."""
    row = torch.arange(num_rows, device=device)[:, None]
    column = torch.arange(num_columns, device=device)
    return (12.9898 * row + 78.233 * column).sin().mul(43758.5453).remainder(1)


def _served_first(price: Tensor) -> Tensor:
    """Returns a mask (P, N, N), True if the second column is cheaper than the first, or as cheap
    and earlier."""
    index = torch.arange(price.shape[1], device=price.device)
    earlier = index < index[:, None]
    cheaper = price[:, None] < price[..., None]
    return cheaper | ((price[:, None] == price[..., None]) & earlier)


def _move_one_unit(
    rows: Tensor, potentials: Tensor, assignment: Tensor, givers: Tensor, takers: Tensor
) -> tuple[Tensor, Tensor]:
    """Applies the cheapest chain in every problem that needs one; returns potentials and
    assignment."""
    reduced = rows - potentials[..., None]
    slack = (reduced - reduced.gather(1, assignment[:, None])).clamp_(min=HOP_COST)  # (P, R, N)
    price = _pair_prices(slack, assignment)  # (P, R to, R from)
    distance = torch.where(takers, 0.0, torch.inf)
    for _ in range(min(MAX_HOPS, rows.shape[1] - 1)):
        distance = torch.minimum(distance, (price + distance[..., None]).amin(dim=1))
    toward = (price + distance[..., None]).argmin(dim=1)  # next row on the way to a taker

    length, start = distance.masked_fill(~givers, torch.inf).min(dim=1, keepdim=True)
    on_chain = _follow(start, toward, takers) & length.isfinite()
    assignment = _shift_along(on_chain & ~takers, toward, slack, price, assignment)
    descent = torch.where(length.isfinite(), torch.minimum(distance, length), 0)
    return potentials - descent, assignment


def _pair_prices(slack: Tensor, assignment: Tensor) -> Tensor:
    """Returns the least slack (P, R, R) of row b in the columns of row a; infinity if it is
    empty."""
    num_problems, num_rows, _ = slack.shape
    price = slack.new_full((num_problems, num_rows, num_rows), torch.inf)
    return price.scatter_reduce_(2, assignment[:, None].expand_as(slack), slack, "amin")


def _follow(start: Tensor, toward: Tensor, takers: Tensor) -> Tensor:
    """Returns a mask (P, R) of the rows from `start` (P, 1) to a taker; all False if none is
    reached."""
    itself = torch.arange(toward.shape[1], device=toward.device).expand_as(toward)
    step = torch.where(takers, itself, toward)
    visited = torch.zeros_like(takers).scatter_(1, start, True)
    current = start
    for _ in range(min(MAX_HOPS + 1, toward.shape[1] - 1)):
        current = step.gather(1, current)
        visited = visited.scatter_(1, current, True)
    return visited & takers.gather(1, current)


def _shift_along(
    leaving: Tensor, toward: Tensor, slack: Tensor, price: Tensor, assignment: Tensor
) -> Tensor:
    """Moves the cheapest column of every row in the mask `leaving` (P, R) to its row `toward`."""
    num_columns = assignment.shape[1]
    target = toward.gather(1, assignment)  # (P, N), where each column would go
    move_slack = slack.gather(1, target[:, None]).squeeze(1)
    least = price.gather(1, toward[:, None]).squeeze(1)  # (P, R)
    candidate = leaving.gather(1, assignment) & (move_slack == least.gather(1, assignment))
    index = torch.arange(num_columns, device=assignment.device).expand_as(assignment)
    first = torch.full_like(toward, num_columns).scatter_reduce_(
        1, assignment, index.masked_fill(~candidate, num_columns), "amin"
    )
    moves = candidate & (first.gather(1, assignment) == index)
    return torch.where(moves, target, assignment)


def _drop_excess(reduced: Tensor, assignment: Tensor, bounds: RowBounds) -> Tensor:
    """Turns the most expensive columns of rows above their bounds, and of the whole, into
    background."""
    price = reduced.gather(1, assignment[:, None]).squeeze(1) - reduced[:, 0]
    ahead = _served_first(price)
    same_row = assignment[:, None] == assignment[..., None]
    place = (ahead & same_row).sum(dim=-1)
    kept = (assignment > 0) & (place < bounds.upper.gather(1, assignment))
    place = (ahead & kept[:, None]).sum(dim=-1)
    kept &= place < assignment.shape[1] - bounds.lower[:, :1]
    return torch.where(kept, assignment, 0)
