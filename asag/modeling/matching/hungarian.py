"""One-to-one matching of minimum total cost (Hungarian) for all stages and images.

B images, N queries, S stages, M padded ground truths.
"""

from __future__ import annotations

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from ...structures import Predictions, Targets
from ..registry import MATCHER_REGISTRY
from .cost import MatchingCost


class NonFiniteCostError(FloatingPointError):
    """A matching cost is NaN or infinite because the model diverged or its input is not finite."""


@MATCHER_REGISTRY.register()
class HungarianMatcher(nn.Module):
    """Matches every object to exactly one query, if there are enough queries, and every query to at
    most one object.

    The costs of a training step are copied from device to host at once; SciPy then solves the small
    assignment problems exactly.
    """

    @configurable
    def __init__(self, *, cost: MatchingCost) -> None:
        super().__init__()
        self.cost = cost

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        return {"cost": MatchingCost.from_config(cfg)}

    @torch.no_grad()
    def forward(self, predictions: Predictions, targets: Targets) -> Tensor:
        """Returns the assignment (S, B, N), int64, on the predictions' device; -1 is background.

        Raises:
            NonFiniteCostError: a cost is NaN or infinite. The message names stage and image.
        """
        cost = self.cost(predictions, targets)
        usable = predictions.valid
        if max(targets.counts) == 0:
            return torch.full(cost.shape[:3], -1, dtype=torch.long, device=cost.device)
        # The mask of valid queries is copied together with the costs, as one more column.
        column = usable[None, :, :, None].expand(*cost.shape[:3], 1).to(cost.dtype)
        host = torch.cat((cost, column), dim=-1).cpu().numpy()
        assignment = solve_assignment(host[..., :-1], host[0, ..., -1] > 0, targets.counts)
        return torch.from_numpy(assignment).to(cost.device, non_blocking=True)


def solve_assignment(cost: np.ndarray, usable: np.ndarray, counts: tuple[int, ...]) -> np.ndarray:
    """Solves the assignment problem of each stage and image.

    Args:
        cost: (S, B, N, M) float.
        usable: (B, N) bool, False for padded queries.
        counts: objects of each image, the first `counts[b]` columns.

    Returns:
        (S, B, N) int64 index of the ground truth, or -1.

    Raises:
        NonFiniteCostError: see `HungarianMatcher.forward`.
    """
    assignment = np.full(cost.shape[:3], -1, dtype=np.int64)
    for b, count in enumerate(counts):
        if count == 0:
            continue
        rows = np.flatnonzero(usable[b])
        for s in range(cost.shape[0]):
            problem = cost[s, b, rows, :count]
            if not np.isfinite(problem).all():
                raise NonFiniteCostError(_message(problem, s, b))
            queries, objects = linear_sum_assignment(problem)
            assignment[s, b, rows[queries]] = objects
    return assignment


def _message(problem: np.ndarray, stage: int, image: int) -> str:
    bad = ~np.isfinite(problem)
    return (
        f"{int(bad.sum())} of {bad.size} matching costs are NaN or infinite in stage {stage}, "
        f"image {image} of the batch ({int(bad.any(axis=1).sum())} queries affected). The "
        "predictions diverged: lower SOLVER.BASE_LR, keep gradient clipping on, or train in "
        "bfloat16 or float32 instead of float16."
    )
