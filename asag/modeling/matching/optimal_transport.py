"""Dynamic label assignment of Dynamic Sparse R-CNN (Hong et al., CVPR 2022, Section 3.2).

Every ground truth supplies some units of positive labels, the background supplies the others, and
every prediction takes one label; the optimal transport plan has the least total cost (Eq. 1).

S stages, B images, N queries, M padded ground truths, P = S * B problems.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from ...structures import Predictions, Targets
from ..layers.boxes import at_least_float32, box_iou
from ..registry import MATCHER_REGISTRY
from .cost import MatchingCost
from .dynamic_k import UnitPolicy
from .transport import SinkhornTransport, Transport, exact_transport


@MATCHER_REGISTRY.register()
class OptimalTransportMatcher(nn.Module):
    """Matches several queries to an object: their number depends on the IoUs of its predictions,
    and they are chosen jointly at the least cost.

    All stages and images are solved together. The Sinkhorn solver needs no synchronization; the
    exact solver copies the costs to the host once and is faster on a CPU.

    `MatchingCost` computes the class cost of a positive minus that of the background, so both
    matchers share one cost, and the background has cost zero. In softmax mode the class cost is the
    negative probability, an approximation of that difference.

    Attributes:
        metrics: scalars of the latest call on its device: `ot_units_per_object` (mean supply),
            `ot_marginal_error` (largest deviation of a column of the entropic plan, 0 for `exact`)
            and `ot_misplaced` (predictions by which row counts miss their supplies, summed).
    """

    @configurable
    def __init__(
        self,
        *,
        cost: MatchingCost,
        units: UnitPolicy | None = None,
        solver: str = "auto",
        sinkhorn: SinkhornTransport | None = None,
    ) -> None:
        """
        Args:
            cost: of a pair of prediction and ground truth, relative to the background.
            units: number of units of every ground truth; None uses the paper's settings.
            solver: "exact", "sinkhorn", or "auto": exact on a CPU, sinkhorn elsewhere.
            sinkhorn: settings of the iterations; None uses the defaults.
        """
        super().__init__()
        self.cost = cost
        self.units = units or UnitPolicy()
        self.solver = solver
        self.sinkhorn = sinkhorn or SinkhornTransport()
        self.metrics: dict[str, Tensor] = {}

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        ot = cfg.MODEL.MATCHER.OT
        return {
            "cost": transport_cost(
                MatchingCost.from_config(cfg), alpha=ot.ALPHA, regression=tuple(ot.REG_COST)
            ),
            "units": UnitPolicy(
                q=ot.Q,
                fixed_k=ot.FIXED_K,
                unit_increase=ot.UNIT_INCREASE,
                unit_step=ot.UNIT_STEP,
                unit_rounding=ot.UNIT_ROUNDING,
                cap=ot.CAP,
            ),
            "solver": ot.SOLVER,
            "sinkhorn": SinkhornTransport(
                epsilon=ot.EPS,
                epsilon_start=ot.EPS_START,
                iterations=ot.ITERS,
                relaxation=ot.RELAXATION,
                row_rescale=ot.ROW_RESCALE,
                repair_rounds=ot.REPAIR_ROUNDS,
            ),
        }

    @torch.no_grad()
    def forward(self, predictions: Predictions, targets: Targets) -> Tensor:
        """Returns the assignment (S, B, N), int64, on the predictions' device; -1 is background."""
        if max(targets.counts) == 0:
            zero = torch.zeros((), device=predictions.boxes_xyxy.device)
            self._record(zero, zero, zero)
            return torch.full(
                predictions.boxes_xyxy.shape[:3], -1, dtype=torch.long, device=zero.device
            )
        with torch.autocast(predictions.logits.device.type, enabled=False):
            supply = self.supplies(predictions, targets)  # (S, B, M)
            cost = self.cost(predictions, targets).transpose(-1, -2)  # (S, B, M, N)
            valid = predictions.valid.expand(predictions.num_stages, -1, -1)
            result = self._solver(cost.device)(
                cost.flatten(0, 1), supply.flatten(0, 1), valid.flatten(0, 1)
            )
        objects = targets.valid.sum() * predictions.num_stages
        self._record(
            supply.sum() / objects, result.marginal_error.max(), result.misplaced.sum().float()
        )
        return result.assignment.unflatten(0, supply.shape[:2])

    def supplies(self, predictions: Predictions, targets: Targets) -> Tensor:
        """Returns the units of every ground truth and stage, (S, B, M) float32, zero on padding."""
        iou = None
        if not self.units.fixed_k:
            boxes = at_least_float32(predictions.boxes_xyxy)
            iou = box_iou(targets.boxes_xyxy[:, :, None], boxes[..., None, :, :]).nan_to_num(0)
            iou = iou * predictions.valid[:, None]  # (S, B, M, N)
        return self.units(iou, targets.valid, predictions.valid.sum(dim=-1), predictions.num_stages)

    def _solver(self, device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Transport]:
        exact = self.solver == "exact" or (self.solver == "auto" and device.type == "cpu")
        return exact_transport if exact else self.sinkhorn

    def _record(self, units: Tensor, error: Tensor, misplaced: Tensor) -> None:
        self.metrics = {
            "ot_units_per_object": units,
            "ot_marginal_error": error,
            "ot_misplaced": misplaced,
        }


def transport_cost(
    cost: MatchingCost, *, alpha: float = 1.0, regression: tuple[str, ...] = ("l1", "giou")
) -> MatchingCost:
    """Returns the cost of Eq. 1: class cost + alpha * regression cost.

    Args:
        cost: weights of Hungarian matching.
        alpha: weight of the regression terms (not given in the paper; 1 keeps their balance).
        regression: terms in use, of "l1" and "giou" (Table 3, "two losses", is both).
    """
    return replace(
        cost,
        l1_weight=alpha * cost.l1_weight * ("l1" in regression),
        giou_weight=alpha * cost.giou_weight * ("giou" in regression),
    )
