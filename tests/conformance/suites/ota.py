"""Golden cases of optimal transport matching: transport plans, supplies, whole scenes.

M ground truths, N predictions; stored tables have M + 1 rows with the background last.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from asag.modeling.matching.cost import MatchingCost
from asag.modeling.matching.dynamic_k import UnitPolicy, cap_units, grow_units, iou_units
from asag.modeling.matching.optimal_transport import OptimalTransportMatcher
from asag.modeling.matching.transport import SinkhornTransport, exact_transport
from asag.modeling.matching.transport_reference import reference_sinkhorn
from asag.structures import Predictions, Targets

from .common import Check, UnknownCase

SUITE = "ota"
AGREEMENT = 0.95  # fraction of columns in which Sinkhorn must equal the optimum
COST_EXCESS = 0.02  # relative, of the total cost with the background row
SOLVERS = {"exact": exact_transport, "sinkhorn": SinkhornTransport()}


def verify(path: Path) -> Iterator[Check]:
    """Compares this library with every case of one stored file.

    Raises:
        UnknownCase: the keys of a case fit none of the three kinds.
    """
    stored = torch.load(path, map_location="cpu", weights_only=True)
    cases = stored.items() if isinstance(stored, dict) else enumerate(stored)
    iou_of_case: dict[Any, Tensor] = {}
    for name, case in cases:
        keys = set(case) if isinstance(case, dict) else set()
        if {"logits", "gt_boxes_xyxy", "supply"} <= keys:
            yield from _scene(f"scene {name}", case)
        elif {"iou", "q", "k", "supply_no_increase"} <= keys:
            if case["iou"] is not None:  # stored once and shared by the cases that follow
                iou_of_case[case["case"]] = case["iou"].double()
            yield from _dynamic_k(f"dynamic k {name}", case, iou_of_case[case["case"]])
        elif {"cost", "supply"} <= keys or {"cost", "cost_row_shifted"} <= keys:
            yield from _transport(f"transport {name}", case)
        else:
            raise UnknownCase(
                f"{path}: case {name!r} has the keys {sorted(keys)}; expected a scene (logits, "
                "gt_boxes_xyxy, supply), dynamic k (iou, q, k) or transport (cost, supply) case"
            )


def _solve(solver: str, cost: Tensor, supply: Tensor) -> Tensor:
    """Returns the labels (N,) of one stored problem, M for background."""
    reduced = (cost[:-1] - cost[-1:]).double()[None]
    valid = torch.ones(1, cost.shape[1], dtype=torch.bool)
    labels = SOLVERS[solver](reduced, supply[None, :-1], valid).assignment[0]
    return torch.where(labels < 0, len(cost) - 1, labels)


def _total(cost: Tensor, labels: Tensor) -> Tensor:
    return cost.double().gather(0, labels[None]).sum()


def _transport(name: str, case: dict[str, Any]) -> Iterator[Check]:
    cost, supply = case["cost"], case["supply"]
    if "k_before_cap" in case:
        k = case["k_before_cap"]
        capped = cap_units(
            k,
            torch.ones_like(k, dtype=torch.bool),
            torch.tensor(cost.shape[1]),
            cap=0.8,
            largest=99,
        )
        yield Check(f"{name}: capped supplies", capped, supply[:-1], 1e-6)
    if "plan_entropic_eps0.1" in case:
        plan = reference_sinkhorn(cost, supply, epsilon=0.1, iterations=case["entropic_iters"])
        yield Check(f"{name}: entropic plan", plan, case["plan_entropic_eps0.1"], 1e-5)
    if "assign_exact" not in case:
        return
    expected = case["assign_exact"]
    total = _total(cost, expected)
    for solver in SOLVERS:
        for form in ("cost", "cost_row_shifted", "cost_col_shifted"):
            if form not in case:
                continue
            labels = _solve(solver, case[form], supply)
            counts = torch.bincount(labels, minlength=len(cost))
            title = f"{name}: {solver} on {form}"
            yield Check(f"{title}, row counts", counts, supply, 1e-9)
            yield Check(f"{title}, total cost", _total(cost, labels), total, 1e-5, 1e-6)
            if case.get("unique", True):
                yield Check(f"{title}, assignment", labels, expected, 0)
            if "forbidden" in case:
                taken = torch.nn.functional.pad(case["forbidden"], (0, 0, 0, 1)).gather(
                    0, labels[None]
                )
                yield Check(f"{title}, forbidden pairs", taken.sum(), 0, 0)


def _dynamic_k(name: str, case: dict[str, Any], iou: Tensor) -> Iterator[Check]:
    best = iou.topk(min(case["q"], iou.shape[1])).values.sum(dim=1)
    clear = (best - best.round()).abs() > 1e-5  # the stored IoU is rounded
    yield Check(f"{name}: k", iou_units(iou, case["q"])[clear], case["k"][clear], 0)
    k = case["k"]
    present = torch.ones_like(k, dtype=torch.bool)
    count = torch.tensor(case["n"])
    flat = cap_units(k, present, count, cap=0.8, largest=case["q"])
    yield Check(f"{name}: supplies without increase", flat, case["supply_no_increase"][:-1], 1e-6)
    for rounding, key in (("floor", "supply_per_stage_floor"), ("none", "supply_per_stage_float")):
        stages = case[key]
        grown = grow_units(k.expand(len(stages), 1, -1), step=0.5, rounding=rounding)
        for t, supply in stages.items():
            capped = cap_units(
                grown[int(t) - 1, 0],
                present,
                count,
                cap=0.8,
                largest=case["q"],
                whole=rounding == "floor",
            )
            expected = torch.as_tensor(supply)[:-1]
            yield Check(f"{name}: supplies ({rounding}) of stage {t}", capped, expected, 1e-6)


def _scene(name: str, case: dict[str, Any]) -> Iterator[Check]:
    stage, stages = case["stage_t"], case["num_stages_T"]
    height, width = case["image_hw"].tolist()
    num_columns = len(case["boxes_xyxy"])
    predictions = Predictions(
        case["logits"].expand(stages, 1, -1, -1),
        case["boxes_xyxy"].expand(stages, 1, -1, -1),
        torch.ones(1, num_columns, dtype=torch.bool),
    )
    whwh = torch.tensor([[width, height, width, height]], dtype=torch.float32)
    targets = Targets.from_lists([case["gt_boxes_xyxy"]], [case["gt_labels"]], whwh)
    expected, cost = case["assign_exact"], case["cost"].double()
    m = len(case["gt_labels"])
    for solver in SOLVERS:
        matcher = OptimalTransportMatcher(
            cost=MatchingCost(), units=UnitPolicy(q=case["q"]), solver=solver
        )
        supply = matcher.supplies(predictions, targets)[stage - 1, 0, :m]
        yield Check(f"{name}: supplies for {solver}", supply, case["supply"][:-1], 1e-6)
        labels = matcher(predictions, targets)[stage - 1, 0]
        labels = torch.where(labels < 0, m, labels)
        agreement = (labels == expected).double().mean()
        required = 1.0 if solver == "exact" else AGREEMENT
        yield Check(f"{name}: {solver} disagreement", (required - agreement).clamp(min=0), 0.0, 0)
        total = case["total_cost_exact"]
        yield Check(f"{name}: {solver} cost", _total(cost, labels), total, 1e-5, COST_EXCESS)
    if m:
        relative = (case["cost"][:-1] - case["cost"][-1:]).float()
        ours = MatchingCost()(predictions, targets)[stage - 1, 0].T
        difference = ours - relative
        yield Check(  # equal up to the constant of 1 - GIoU and the authors' 1e-8 in logarithms
            f"{name}: cost", difference, torch.full_like(difference, -2.0), 1e-3
        )
