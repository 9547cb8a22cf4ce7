"""Times the matchers side by side on one batch.

    python tools/benchmarks/benchmark_matching.py --help

Four arms take turns in every round, so that other load on the machine affects all of them alike:
Hungarian matching, exact optimal transport, optimal transport by batched Sinkhorn iterations, and
Sinkhorn iterations one image and stage after the other. The times of the first three include costs
and supplies; the last one gets them precomputed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

from asag.modeling.matching.cost import MatchingCost
from asag.modeling.matching.hungarian import HungarianMatcher
from asag.modeling.matching.optimal_transport import OptimalTransportMatcher
from asag.modeling.matching.transport_reference import reference_sinkhorn
from asag.structures import Predictions, Targets

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

PER_IMAGE = "per_image_sinkhorn"


class OperatorCounter(TorchDispatchMode):
    """Counts tensor operations, which approximate the kernel launches of a call on any device."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += not func.is_view
        return func(*args, **(kwargs or {}))


def make_batch(args: argparse.Namespace) -> tuple[Predictions, Targets]:
    """Makes random scenes whose predictions approach the objects from stage to stage."""
    rng = torch.Generator().manual_seed(args.seed)
    side = 800.0
    if args.counts == "fixed":
        counts = [args.objects] * args.images
    else:  # many images with few objects and a long tail, as in COCO
        draws = torch.empty(args.images).exponential_(1 / args.objects, generator=rng)
        counts = draws.round().clamp(1, 10 * args.objects).long().tolist()
    gt, labels, boxes, logits = [], [], [], []
    for count in counts:
        corner = torch.rand(count, 2, generator=rng) * side * 0.7
        size = (torch.rand(count, 2, generator=rng) * 0.25 + 0.03) * side
        gt.append(torch.cat((corner, corner + size), dim=-1))
        labels.append(torch.randint(args.classes, (count,), generator=rng))
        owner = torch.randint(count, (args.queries,), generator=rng)
        looseness = torch.linspace(1.0, 0.2, args.stages)[:, None, None]
        noise = torch.randn(args.stages, args.queries, 4, generator=rng)
        boxes.append(gt[-1][owner] + noise * looseness * size[owner].repeat(1, 2) * 0.3)
        guess = torch.randn(args.stages, args.queries, args.classes, generator=rng) - 4
        chosen = labels[-1][owner].expand(args.stages, -1)[..., None]
        logits.append(guess.scatter_add(-1, chosen, torch.full(chosen.shape, 3.0)))
    stacked = torch.stack(boxes, dim=1)
    stacked = torch.cat(
        (stacked[..., :2], torch.maximum(stacked[..., 2:], stacked[..., :2] + 1)), dim=-1
    )
    device = torch.device(args.device)
    predictions = Predictions(
        torch.stack(logits, dim=1).to(device),
        stacked.to(device),
        torch.ones(args.images, args.queries, dtype=torch.bool, device=device),
    )
    whwh = torch.full((args.images, 4), side, device=device)
    return predictions, Targets.from_lists(gt, labels, whwh)


def per_image_arm(
    matcher: OptimalTransportMatcher, predictions: Predictions, targets: Targets, iterations: int
) -> Callable[[], Tensor]:
    """Returns a Sinkhorn solver that loops over stages and images on precomputed costs."""
    supply = matcher.supplies(predictions, targets)
    cost = matcher.cost(predictions, targets).transpose(-1, -2)
    num_queries = cost.shape[-1]
    problems = []
    for s in range(len(cost)):
        for b, count in enumerate(targets.counts):
            table = torch.nn.functional.pad(cost[s, b, :count], (0, 0, 0, 1))
            units = supply[s, b, :count]
            problems.append((table, torch.cat((units, (num_queries - units.sum())[None]))))

    def run() -> Tensor:
        return torch.stack(
            [
                reference_sinkhorn(table, units, epsilon=0.1, iterations=iterations).argmax(dim=0)
                for table, units in problems
            ]
        )

    return run


def time_once(run: Callable[[], Tensor], device: torch.device) -> float:
    """Returns the milliseconds of one call, device work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1000 * (time.perf_counter() - start)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Runs all arms in turn, `args.rounds` times after one warm-up round."""
    predictions, targets = make_batch(args)
    device = predictions.boxes_xyxy.device
    matchers = {
        "hungarian": HungarianMatcher(cost=MatchingCost()),
        "exact": OptimalTransportMatcher(cost=MatchingCost(), solver="exact"),
        "sinkhorn": OptimalTransportMatcher(cost=MatchingCost(), solver="sinkhorn"),
    }
    arms: dict[str, Callable[[], Tensor]] = {
        name: lambda m=matcher: m(predictions, targets) for name, matcher in matchers.items()
    }
    arms[PER_IMAGE] = per_image_arm(
        matchers["sinkhorn"], predictions, targets, args.plain_iterations
    )
    times: dict[str, list[float]] = {name: [] for name in arms}
    for round_index in range(args.rounds + 1):
        for name, run in arms.items():
            elapsed = time_once(run, device)
            if round_index:
                times[name].append(elapsed)
    slow = statistics.median(times[PER_IMAGE])
    report = {}
    for name, run in arms.items():
        with OperatorCounter() as counter:
            answer = run()
        median = statistics.median(times[name])
        report[name] = {
            "median_ms": round(median, 3),
            "fastest_ms": round(min(times[name]), 3),
            "slowest_ms": round(max(times[name]), 3),
            "times_faster_than_per_image": round(slow / median, 2),
            "operators": counter.calls,
        }
        if name in matchers:
            report[name]["positives"] = int((answer >= 0).sum())
    metrics = {k: round(float(v), 4) for k, v in matchers["sinkhorn"].metrics.items()}
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "setting": vars(args),
        "objects": list(targets.counts),
        "arms": report,
        "sinkhorn_metrics": metrics,
    }


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=16, help="batch size")
    parser.add_argument("--stages", type=int, default=6)
    parser.add_argument("--queries", type=int, default=300)
    parser.add_argument("--objects", type=int, default=7, help="objects an image, or their mean")
    parser.add_argument("--counts", choices=("coco", "fixed"), default="coco")
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--plain-iterations", type=int, default=50, help="of per-image Sinkhorn")
    parser.add_argument("--rounds", type=int, default=7, help="timed calls of every arm")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", help="write the JSON here too")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    text = json.dumps(measure(args), indent=2)
    print(text)
    if args.output:
        with open(args.output, "w", encoding="utf-8") as file:
            file.write(text + "\n")


if __name__ == "__main__":
    main()
