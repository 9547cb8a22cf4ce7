"""Reference implementations of optimal transport matching, one image at a time.

They follow the definitions directly; tests and benchmarks compare the batched code with them. Here
the background is the last of the M + 1 rows, as in the papers; N columns.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.optimize import linprog
from scipy.sparse import coo_matrix
from torch import Tensor


def reference_linear_program(cost: np.ndarray, supply: np.ndarray) -> tuple[np.ndarray, float]:
    """Solves the transport problem by a general linear programming solver.

    Args:
        cost: (M + 1, N).
        supply: (M + 1,), summing to N.

    Returns:
        Optimal plan (M + 1, N) and its cost.
    """
    num_rows, num_columns = cost.shape
    variable = np.arange(cost.size)
    row, column = variable // num_columns, variable % num_columns
    constraints = coo_matrix(
        (
            np.ones(2 * cost.size),
            (np.concatenate((row, num_rows + column)), np.concatenate((variable, variable))),
        )
    )
    marginals = np.concatenate((supply, np.ones(num_columns)))
    solution = linprog(cost.ravel(), A_eq=constraints.tocsr(), b_eq=marginals, method="highs")
    if not solution.success:
        raise RuntimeError(f"no optimal transport plan: {solution.message}")
    return solution.x.reshape(cost.shape), float(solution.fun)


def reference_sinkhorn(
    cost: Tensor, supply: Tensor, *, epsilon: float = 0.1, iterations: int = 50
) -> Tensor:
    """Runs plain Sinkhorn iterations of one image in the log domain, columns first, rows last.

    Args:
        cost: (M + 1, N).
        supply: (M + 1,) positive.

    Returns:
        Entropic plan (M + 1, N) in the dtype of `cost`; its rows sum to `supply`.
    """
    u = torch.zeros_like(cost[:, 0])
    v = torch.zeros_like(cost[0])
    for _ in range(iterations):
        v = -epsilon * torch.logsumexp((u[:, None] - cost) / epsilon, dim=0)
        u = epsilon * (supply.log() - torch.logsumexp((v - cost) / epsilon, dim=1))
    return torch.exp((u[:, None] + v - cost) / epsilon)


def reference_dynamic_k(iou: np.ndarray, q: int) -> list[int]:
    """Computes dynamic k of every ground truth from its IoU (M, N) with the predictions."""
    return [max(1, math.floor(sum(sorted(row, reverse=True)[:q]))) for row in iou]


def reference_supply(
    k: list[int],
    num_predictions: int,
    *,
    stage: int = 6,
    num_stages: int = 6,
    unit_step: float = 0.5,
    unit_rounding: str = "floor",
    cap: float = 0.8,
) -> list[float]:
    """Computes supplies from units k: unit increase, minimum of one, rounding, cap.

    `stage` counts from 1.
    """
    grown = [max(1.0, units - unit_step * (num_stages - stage)) for units in k]
    if unit_rounding == "floor":
        grown = [float(math.floor(units)) for units in grown]
    elif unit_rounding == "round":
        grown = [float(math.floor(units + 0.5)) for units in grown]
    limit = cap * num_predictions
    whole_limit = math.floor(limit + 1e-9)
    if len(grown) > whole_limit:
        return [limit / len(grown)] * len(grown)
    total = sum(grown)
    if total <= limit + 1e-9:
        return grown
    grown = [max(1.0, float(math.floor(units * limit / total + 1e-9))) for units in grown]
    while sum(grown) > whole_limit:
        grown[grown.index(max(grown))] -= 1
    return grown
