#!/usr/bin/env python3
"""Counts parameters and multiply-adds of detectors and compares them with published figures.

    python tools/analyze.py configs/SparseRCNN/sparse_rcnn_r50_100pro_3x.yaml
    python tools/analyze.py CONFIG CONFIG --input 800x1333 --json
    python tools/analyze.py CONFIG --annotations val.json --images 100

`tools/analysis/flops.py` describes the operations that are counted. Weights are not loaded: the
figures depend on shapes only. The published figures of a configuration are read from
`projects/*/reference_figures.json`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from asag import load_config

import torch
from analysis.flops import Count, components, count_flops, count_parameters
from benchmarks.measuring import image_size
from detectron2.config import CfgNode
from detectron2.modeling import build_model

ROOT = Path(__file__).resolve().parents[1]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    args = parse(arguments)
    try:
        reports = [
            report(
                path,
                load_config(path, [*args.opts, "MODEL.DEVICE", "cpu", "MODEL.COMPILE", "False"]),
                args,
            )
            for path in args.configs
        ]
    except (OSError, KeyError, ValueError) as error:
        print(f"analyze: {error.args[0] if len(error.args) == 1 else error}", file=sys.stderr)
        return 2
    print(json.dumps(reports, indent=2) if args.json else "\n\n".join(map(render, reports)))
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("configs", nargs="+", metavar="CONFIG", help="yaml files")
    parser.add_argument(
        "--input",
        type=image_size,
        default=(800, 1216),
        metavar="HxW",
        help="image size in pixels before padding (default 800x1216)",
    )
    parser.add_argument(
        "--annotations",
        metavar="FILE",
        help="COCO json: mean over its images, resized as the configuration tests them, instead "
        "of --input",
    )
    parser.add_argument(
        "--images", type=int, default=100, help="first images of --annotations (default 100)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE overrides, last"
    )
    return parser.parse_args(arguments)


def report(path: str, cfg: CfgNode, args: argparse.Namespace) -> dict[str, Any]:
    """Returns all figures of one configuration, as plain numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the weights decide about the level of each box
        model = build_model(cfg)
    sizes = resized_sizes(cfg, args.annotations, args.images) if args.annotations else {}
    counts = [
        (count_flops(model, *size), weight)
        for size, weight in (sizes or {tuple(args.input): 1}).items()
    ]
    total, trainable = count_parameters(model)
    result = {
        "config": path,
        "input": f"mean of {sum(sizes.values())} images"
        if sizes
        else "x".join(map(str, args.input)),
        "parameters": total,
        "trainable": trainable,
        "gmacs": _mean(counts, lambda c: c.macs),
        "gflops": _mean(counts, lambda c: c.flops),
        "components": {},
        "by_operator": {
            name: _mean(counts, lambda c, name=name: c.by_operator[name])
            for name in counts[0][0].by_operator
        },
        "uncounted": counts[0][0].uncounted,
    }
    for component in components(model):
        total, trainable = component.count_parameters(model)
        result["components"][component.name] = {
            "parameters": total,
            "trainable": trainable,
            "gmacs": _mean(counts, component.macs),
        }
    result["reference"] = compare(path, result)
    return result


def resized_sizes(cfg: CfgNode, annotations: str, images: int) -> dict[tuple[int, int], int]:
    """Counts the first images by (height, width) after the resize of testing."""
    from asag.data.json_files import load_json

    from detectron2.data.transforms import ResizeShortestEdge

    data = load_json(Path(annotations))
    entries = data.get("images") if isinstance(data, dict) else None
    if not isinstance(entries, list) or not entries[:images]:
        raise ValueError(f"{annotations} has no list `images`, or --images {images} takes none")
    shapes = [_shape(annotations, i, entry) for i, entry in enumerate(entries[:images])]
    resize = ResizeShortestEdge([cfg.INPUT.MIN_SIZE_TEST] * 2, cfg.INPUT.MAX_SIZE_TEST)
    sizes: Counter[tuple[int, int]] = Counter()
    for height, width in shapes:
        transform = resize.get_transform(_BlankImage(height, width))
        sizes[transform.new_h, transform.new_w] += 1
    return dict(sizes)


def _shape(annotations: str, index: int, entry: Any) -> tuple[int, int]:
    """Reads height and width of an entry of `images`."""
    written = [entry.get(key) if isinstance(entry, dict) else None for key in ("height", "width")]
    try:
        height, width = map(int, written)
    except (TypeError, ValueError, OverflowError):
        height = width = 0
    if min(height, width) < 1:
        raise ValueError(
            f"{annotations}: images[{index}] has height {written[0]!r} and width {written[1]!r}; "
            "write its size in pixels"
        )
    return height, width


class _BlankImage:
    """An image of which only the shape is read."""

    def __init__(self, height: int, width: int) -> None:
        self.shape = (height, width, 3)


def compare(path: str, result: dict[str, Any]) -> dict[str, Any] | None:
    """Compares with the published figures of this configuration; None if there are none."""
    known: dict[str, Any] = {}
    for file in sorted(ROOT.glob("projects/*/reference_figures.json")):
        known |= json.loads(file.read_text(encoding="utf-8"))
    figures = known.get(_relative(path))
    if figures is None:
        return None
    compared = {"source": figures["source"], "parameters": figures["parameters"]}
    compared["parameters_differ_by"] = result["parameters"] - figures["parameters"]
    if result["input"] in figures.get("gmacs", {}):
        expected = figures["gmacs"][result["input"]]
        compared["gmacs"] = expected
        compared["gmacs_differ_by_percent"] = 100 * (result["gmacs"] / expected - 1)
    return compared


def render(result: dict[str, Any]) -> str:
    """Formats the figures as a table."""
    lines = [
        f"{result['config']}, input {result['input']}",
        f"{'component':<20}{'parameters':>14}{'trainable':>14}{'GMACs':>10}",
    ]
    for name, component in [*result["components"].items(), ("total", result)]:
        lines.append(
            f"{name:<20}{component['parameters']:>14,}{component['trainable']:>14,}{component['gmacs']:>10.2f}"
        )
    lines.append(
        f"GFLOPs (a multiply-add is two operations): {result['gflops']:.2f}; not counted: "
        "RoIAlign, softmax, element-wise"
    )
    reference = result["reference"]
    if reference:
        difference = reference["parameters_differ_by"]
        lines.append(
            f"reference ({reference['source']}): {reference['parameters']:,} parameters, "
            + ("equal" if difference == 0 else f"here {difference:+,}")
        )
        if "gmacs" in reference:
            lines[-1] += f"; {reference['gmacs']:.2f} GMACs, here "
            lines[-1] += f"{reference['gmacs_differ_by_percent']:+.2f} %"
    return "\n".join(lines)


def _mean(counts: list[tuple[Count, int]], figure: Callable[[Count], float]) -> float:
    """Returns the weighted mean in units of 1e9."""
    return sum(figure(c) * n for c, n in counts) / sum(n for _, n in counts) / 1e9


def _relative(path: str) -> str:
    resolved = Path(path).resolve()
    return resolved.relative_to(ROOT).as_posix() if resolved.is_relative_to(ROOT) else path


if __name__ == "__main__":
    sys.exit(main())
