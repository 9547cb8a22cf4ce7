"""OptimalTransportMatcher: contract, invariances, golden cases, and no waiting for the device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from asag.config import add_asag_config
from asag.modeling.matching.cost import MatchingCost
from asag.modeling.matching.dynamic_k import UnitPolicy
from asag.modeling.matching.optimal_transport import OptimalTransportMatcher, transport_cost
from asag.modeling.matching.transport import SinkhornTransport
from asag.modeling.registry import MATCHER_REGISTRY
from asag.structures import Predictions, Targets

SOLVERS = ("exact", "sinkhorn")
S, B, N, K = 3, 4, 40, 6
COUNTS = (3, 0, 7, 1)


def matcher(solver: str = "exact", **values) -> OptimalTransportMatcher:
    return OptimalTransportMatcher(cost=MatchingCost(), solver=solver, **values)


def scene(seed: int = 0, counts: tuple[int, ...] = COUNTS) -> tuple[Predictions, Targets]:
    """Random objects, and predictions scattered around them."""
    rng = torch.Generator().manual_seed(seed)
    boxes, labels = [], []
    for count in counts:
        corner = torch.rand(count, 2, generator=rng) * 300
        size = 30 + torch.rand(count, 2, generator=rng) * 100
        boxes.append(torch.cat((corner, corner + size), dim=-1))
        labels.append(torch.randint(K, (count,), generator=rng))
    images = len(counts)
    predicted = torch.rand(S, images, N, 4, generator=rng) * 200
    predicted[..., 2:] += predicted[..., :2] + 5
    for b, count in enumerate(counts):
        if count:
            owner = torch.randint(count, (N // 2,), generator=rng)
            noise = 8 * torch.randn(S, N // 2, 4, generator=rng)
            predicted[:, b, : N // 2] = boxes[b][owner] + noise
    logits = torch.randn(S, images, N, K, generator=rng) - 2
    valid = torch.ones(images, N, dtype=torch.bool)
    valid[-1, N - 10 :] = False
    whwh = torch.tensor([[480.0, 400.0, 480.0, 400.0]]).expand(images, -1).contiguous()
    return Predictions(logits, predicted, valid), Targets.from_lists(boxes, labels, whwh)


def counts_of(assignment: Tensor, m: int) -> Tensor:
    return (assignment[..., None] == torch.arange(m)).sum(dim=-2)


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_object_gets_its_supply(solver: str) -> None:
    predictions, targets = scene()
    module = matcher(solver)
    assignment = module(predictions, targets)
    assert assignment.shape == (S, B, N)
    assert assignment.dtype == torch.long
    supply = module.supplies(predictions, targets)
    assert torch.equal(counts_of(assignment, 7), supply.long())
    assert (supply[:, targets.valid] >= 1).all()
    assert (supply[:, ~targets.valid] == 0).all()
    assert assignment[:, 1].eq(-1).all(), "an image without objects is all background"
    assert assignment[:, -1, N - 10 :].eq(-1).all(), "padded predictions answer for nothing"
    limit = (0.8 * predictions.valid.sum(dim=-1)).floor()
    assert ((assignment >= 0).sum(dim=-1) <= limit).all()


def test_solvers_agree() -> None:
    predictions, targets = scene(5)
    exact, sinkhorn = (matcher(s)(predictions, targets) for s in SOLVERS)
    assert (exact == sinkhorn).double().mean() > 0.99


def test_supplies_follow_the_predicted_boxes() -> None:
    _, targets = scene(1, (2,))
    boxes = targets.boxes_xyxy[:, :1].expand(1, N, 4)[None].clone()  # all sit on the first object
    boxes[:, :, 5:] = torch.tensor([400.0, 350.0, 410.0, 360.0])
    predictions = Predictions(torch.zeros(1, 1, N, K), boxes, torch.ones(1, N, dtype=torch.bool))
    supply = matcher(units=UnitPolicy(unit_increase=False)).supplies(predictions, targets)
    assert supply[0, 0, 0] == 5
    predictions.valid[:, :2] = False
    supply = matcher(units=UnitPolicy(unit_increase=False)).supplies(predictions, targets)
    assert supply[0, 0, 0] == 3


@pytest.mark.parametrize("solver", SOLVERS)
def test_permuting_predictions_and_images_permutes_the_answer(solver: str) -> None:
    predictions, targets = scene(2)
    plain = matcher(solver)(predictions, targets)
    rng = torch.Generator().manual_seed(0)
    column, image = torch.randperm(N, generator=rng), torch.randperm(B, generator=rng)
    mixed = Predictions(
        predictions.logits[:, image][:, :, column],
        predictions.boxes_xyxy[:, image][:, :, column],
        predictions.valid[image][:, column],
    )
    mixed_targets = Targets(
        targets.boxes_xyxy[image],
        targets.labels[image],
        targets.valid[image],
        targets.image_whwh[image],
        tuple(targets.counts[b] for b in image.tolist()),
    )
    assert torch.equal(matcher(solver)(mixed, mixed_targets), plain[:, image][:, :, column])


@pytest.mark.parametrize("solver", SOLVERS)
def test_batched_equals_single(solver: str) -> None:
    predictions, targets = scene(3)
    plain = matcher(solver)(predictions, targets)
    for b, count in enumerate(targets.counts):
        alone = Targets.from_lists(
            [targets.boxes_xyxy[b, :count]],
            [targets.labels[b, :count]],
            targets.image_whwh[b : b + 1],
        )
        part = Predictions(
            predictions.logits[:, b : b + 1],
            predictions.boxes_xyxy[:, b : b + 1],
            predictions.valid[b : b + 1],
        )
        assert torch.equal(matcher(solver)(part, alone)[:, 0], plain[:, b])


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_batch_without_objects(solver: str) -> None:
    predictions, targets = scene(0, (0, 0))
    module = matcher(solver)
    assert module(predictions, targets).eq(-1).all()
    assert float(module.metrics["ot_units_per_object"]) == 0


@pytest.mark.parametrize("solver", SOLVERS)
def test_more_objects_than_permitted_positives(solver: str) -> None:
    predictions, targets = scene(0, (60, 35))
    assignment = matcher(solver)(predictions, targets)
    assert ((assignment >= 0).sum(dim=-1)[:, :1] == 32).all()
    assert counts_of(assignment, 60).max() <= 1
    assert (assignment[:, 1, :30] >= 0).sum(dim=-1).max() <= 24


@pytest.mark.parametrize("solver", SOLVERS)
def test_autocast_changes_nothing(solver: str) -> None:
    predictions, targets = scene(4)
    plain = matcher(solver)(predictions, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(matcher(solver)(predictions, targets), plain)
    half = Predictions(predictions.logits.bfloat16(), predictions.boxes_xyxy, predictions.valid)
    rounded = Predictions(
        predictions.logits.bfloat16().float(), predictions.boxes_xyxy, predictions.valid
    )
    assert torch.equal(matcher(solver)(half, targets), matcher(solver)(rounded, targets)), (
        "half-precision logits are matched in float32"
    )


@pytest.mark.parametrize("solver", SOLVERS)
def test_broken_predictions_are_never_positive(solver: str) -> None:
    predictions, targets = scene(6)
    predictions.boxes_xyxy[0, 0, 3] = float("nan")
    predictions.logits[1, 2, 5] = float("inf")
    predictions.logits[1, 2, 6] = float("nan")
    module = matcher(solver)
    assignment = module(predictions, targets)
    assert assignment[0, 0, 3] == -1
    assert assignment[1, 2, 6] == -1
    assert all(value.isfinite() for value in module.metrics.values())


def test_no_gradient_reaches_the_predictions() -> None:
    predictions, targets = scene()
    predictions.logits.requires_grad_()
    predictions.boxes_xyxy.requires_grad_()
    module = matcher("sinkhorn")
    assert not module(predictions, targets).requires_grad
    assert not any(value.requires_grad for value in module.metrics.values())


def fake_cuda_call(solver: str) -> Tensor:
    """Runs the matcher on tensors that claim to live on a GPU and hold no data: whatever needs a
    value on the host, or a shape that depends on values, raises."""
    with FakeTensorMode():
        predictions = Predictions(
            torch.empty(S, B, N, K, device="cuda"),
            torch.empty(S, B, N, 4, device="cuda"),
            torch.empty(B, N, device="cuda", dtype=torch.bool),
        )
        targets = Targets(
            torch.empty(B, 7, 4, device="cuda"),
            torch.empty(B, 7, device="cuda", dtype=torch.long),
            torch.empty(B, 7, device="cuda", dtype=torch.bool),
            torch.empty(B, 4, device="cuda"),
            COUNTS,
        )
        return matcher(solver)(predictions, targets)


@pytest.mark.parametrize("solver", ["sinkhorn", "auto"])
def test_sinkhorn_never_waits_for_the_device(solver: str) -> None:
    answer = fake_cuda_call(solver)
    assert answer.shape == (S, B, N)
    assert answer.device.type == "cuda"


def test_the_check_for_waiting_notices_a_copy_to_the_host() -> None:
    with pytest.raises(Exception, match=r"(?i)fake|data|numpy"):
        fake_cuda_call("exact")


def test_auto_is_exact_on_the_cpu() -> None:
    predictions, targets = scene(8)
    module = matcher("auto", sinkhorn=SinkhornTransport(iterations=1, repair_rounds=0))
    assert torch.equal(module(predictions, targets), matcher("exact")(predictions, targets))
    assert float(module.metrics["ot_marginal_error"]) == 0


def test_metrics_report_what_bounded_iterations_left() -> None:
    predictions, targets = scene(8)
    hasty = matcher("sinkhorn", sinkhorn=SinkhornTransport(iterations=1, repair_rounds=0))
    hasty(predictions, targets)
    assert float(hasty.metrics["ot_misplaced"]) > 0
    assert float(hasty.metrics["ot_marginal_error"]) > 0.01
    patient = matcher("sinkhorn")
    patient(predictions, targets)
    assert float(patient.metrics["ot_misplaced"]) == 0
    assert float(patient.metrics["ot_units_per_object"]) >= 1


def transport_config(**values) -> CfgNode:
    cfg = get_cfg()
    add_asag_config(cfg)
    cfg.MODEL.MATCHER.NAME = "OptimalTransportMatcher"
    cfg.MODEL.MATCHER.OT = CfgNode(
        {
            "Q": 8,
            "FIXED_K": 0,
            "UNIT_INCREASE": True,
            "UNIT_STEP": 0.5,
            "UNIT_ROUNDING": "floor",
            "CAP": 0.8,
            "ALPHA": 1.0,
            "REG_COST": ("l1", "giou"),
            "SOLVER": "auto",
            "EPS": 0.001,
            "EPS_START": 1.0,
            "ITERS": 60,
            "RELAXATION": 1.5,
            "ROW_RESCALE": False,
            "REPAIR_ROUNDS": 8,
            **values,
        }
    )
    return cfg


def build(cfg: CfgNode) -> OptimalTransportMatcher:
    return MATCHER_REGISTRY.get("OptimalTransportMatcher")(cfg)


def test_built_from_config() -> None:
    module = build(transport_config(Q=5, FIXED_K=2, CAP=0.5, SOLVER="sinkhorn", ITERS=30))
    assert module.units == UnitPolicy(q=5, fixed_k=2, cap=0.5)
    assert module.sinkhorn == SinkhornTransport(iterations=30)
    assert module.cost == MatchingCost()
    predictions, targets = scene()
    assert counts_of(module(predictions, targets), 7).max() == 2


def test_regression_cost_is_chosen_and_weighted() -> None:
    module = build(transport_config(ALPHA=1.5, REG_COST=("giou",)))
    assert module.cost.l1_weight == 0
    assert module.cost.giou_weight == pytest.approx(1.5 * MatchingCost().giou_weight)
    assert module.cost.class_weight == MatchingCost().class_weight


def test_entropy_weights_of_the_configuration_are_compared() -> None:
    with pytest.raises(ValueError, match=r"MODEL\.MATCHER\.OT\.EPS is 5\.0"):
        build(transport_config(EPS=5.0))


def test_softmax_cost_is_accepted() -> None:
    predictions, targets = scene()
    module = OptimalTransportMatcher(cost=transport_cost(MatchingCost(class_cost="softmax")))
    supply = module.supplies(predictions, targets)
    assert torch.equal(counts_of(module(predictions, targets), 7), supply.long())


def test_golden_cases(golden_dir: Path) -> None:
    from conformance.suites import ota
    from conformance.suites.common import compare

    files = sorted((golden_dir / "ota").glob("*.pt"))
    assert files
    checks = [check for path in files for check in ota.verify(path)]
    assert len(checks) > 200
    wrong = [(check.name, compare(check)[0]) for check in checks if not compare(check)[1]]
    assert not wrong


def test_unknown_golden_case_is_refused(tmp_path: Path) -> None:
    from conformance.suites import ota
    from conformance.suites.common import UnknownCase

    torch.save({"basic": {"weights": torch.ones(3)}}, tmp_path / "transport_cases.pt")
    with pytest.raises(UnknownCase, match="weights"):
        list(ota.verify(tmp_path / "transport_cases.pt"))


def test_benchmark_measures_every_arm(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    import json

    import benchmark_matching

    sizes = "--images 2 --stages 2 --queries 30 --objects 3 --classes 4 --rounds 2 --device cpu"
    output = tmp_path / "matching.json"
    benchmark_matching.main([*sizes.split(), "--output", str(output)])
    report = json.loads(output.read_text())
    assert json.loads(capsys.readouterr().out) == report
    assert set(report["arms"]) == {"hungarian", "exact", "sinkhorn", "per_image_sinkhorn"}
    arms = report["arms"]
    assert all(arm["median_ms"] > 0 for arm in arms.values())
    assert arms["exact"]["positives"] == arms["sinkhorn"]["positives"]
    assert arms["hungarian"]["positives"] == 2 * sum(report["objects"])
