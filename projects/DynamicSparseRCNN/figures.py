#!/usr/bin/env python
"""Draws figures of dynamic labels and dynamic proposals for any configuration and weights.

    python projects/DynamicSparseRCNN/figures.py positives --config C --weights W --output x.png
    python projects/DynamicSparseRCNN/figures.py experts   --config C --weights W --output x.png
    python projects/DynamicSparseRCNN/figures.py proposals --config C --weights W --output x.png
    python projects/DynamicSparseRCNN/figures.py stages results.json --output x.png
    python projects/DynamicSparseRCNN/figures.py curves STUDY_FOLDER --output x.png

positives: predictions of each stage that are assigned to each object of an image. experts: weights
of the experts over a data set. proposals: difference of the initial proposals of two images. stages
and curves: results of `tools/study.py`. The first three read DATASETS.TEST, --dataset or --data, a
COCO folder. S stages, N queries, M objects, E experts, I images.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from asag.inference.figure_inputs import (
    add_dataset_options,
    open_model_and_dataset,
    read_samples,
)
from asag.visualization import class_color, plot_curves

import numpy as np
import torch
from detectron2.data import DatasetCatalog
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from observations import (
    Positives,
    Proposals,
    collect_expert_weights,
    expert_statistics,
    find_positives,
    find_proposals,
    proposal_changes,
)
from torch import Tensor

PANELS_A_ROW = 3
# The bars are not wider than with this number of objects.
MIN_OBJECTS_SHOWN = 8


def draw_positives(found: Positives) -> Figure:
    """Draws a panel for each stage, with objects (thick), their predictions (thin) and counts."""
    stages, objects = found.counts.shape
    rows = -(-stages // PANELS_A_ROW)
    figure = _figure(5 * PANELS_A_ROW, 4 * rows + 3)
    upper, lower = figure.subfigures(2, 1, height_ratios=(4 * rows, 3))
    panels = upper.subplots(rows, PANELS_A_ROW, squeeze=False).flatten()
    for s, panel in enumerate(panels):
        panel.set_axis_off()
        if s >= stages:
            continue
        positive = found.assignment[s] >= 0
        panel.set_title(f"stage {s + 1}, positives: {int(positive.sum())}")
        panel.imshow(found.image_rgb)
        for n in positive.nonzero().flatten().tolist():
            color = _color(int(found.assignment[s, n]))
            _add_box(panel, found.boxes_xyxy[s, n], color, 1.2)
        for m, box in enumerate(found.gt_xyxy):
            _add_box(panel, box, _color(m), 3.5)
        _keep_to_image(panel, found.image_rgb)
    axes = lower.subplots()
    width = 0.8 / stages
    for s in range(stages):
        places = np.arange(objects) + (s - (stages - 1) / 2) * width
        # Later stages have darker bars.
        alpha = 0.35 + 0.65 * s / max(stages - 1, 1)
        colors = [_color(m) for m in range(objects)]
        axes.bar(places, found.counts[s].numpy(), width * 0.9, color=colors, alpha=alpha)
    axes.set(
        xticks=range(objects),
        xlim=(-0.6, max(objects, MIN_OBJECTS_SHOWN) - 0.4),
        xlabel="object",
        ylabel="positives",
        title=f"positives of each object, stages 1 to {stages} from left to right",
    )
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def draw_experts(weights: Tensor, temperature: float) -> Figure:
    """Draws mean, spread and distribution of the weights (I, E, N) of each expert."""
    figure = _figure(12, 4.5)
    left, right = figure.subplots(1, 2)
    numbers = expert_statistics(weights)
    means = [x["mean"] for x in numbers]
    for shift, kind in ((-0.2, "over proposals"), (0.2, "over images")):
        places = np.arange(len(means)) + shift
        left.bar(
            places,
            means,
            0.36,
            yerr=[x[kind] for x in numbers],
            capsize=4,
            color=[_color(e) for e in range(len(means))],
            alpha=1 if shift < 0 else 0.6,
        )
    left.axhline(1 / len(means), color="gray", linestyle=":", linewidth=1)
    left.set(
        xticks=range(len(means)),
        xticklabels=[str(e + 1) for e in range(len(means))],
        xlabel="expert",
        ylabel="weight",
        ylim=(0, None),
        title="mean; bars: spread over proposals (left), over images (right)",
    )
    bins = np.linspace(float(weights.min()), float(weights.max()) + 1e-6, 50)
    for e, own in enumerate(weights.unbind(dim=1)):
        values = own.flatten().numpy()
        right.hist(values, bins, histtype="step", linewidth=1.8, color=_color(e), label=str(e + 1))
    right.set(xlabel="weight", ylabel="proposals of all images", title="distribution")
    right.legend(title="expert", frameon=False)
    figure.suptitle(f"{len(weights)} images, {weights.shape[2]} proposals, τ = {temperature:.3g}")
    return figure


def draw_proposals(one: Proposals, other: Proposals) -> Figure:
    """Draws the proposals of two images, with one color for each index, and their differences."""
    boxes, content = proposal_changes(one, other)
    figure = _figure(16, 5)
    *panels, right = figure.subplots(1, 3)
    for panel, seen in zip(panels, (one, other), strict=True):
        height, width = seen.image_rgb.shape[:2]
        panel.imshow(seen.image_rgb, alpha=0.6)
        panel.set_axis_off()
        panel.set_title(f"{len(seen.boxes)} proposals")
        scale = torch.tensor([width, height, width, height])
        for n, box in enumerate(seen.boxes * scale):
            _add_box(panel, box, _color(n), 1)
        panel.set(xlim=(-0.1 * width, 1.1 * width), ylim=(1.1 * height, -0.1 * height))
    right.scatter(boxes, content, s=14, color=[_color(n) for n in range(len(boxes))])
    right.set(
        xlabel="change of the box (% of the image size)",
        ylabel="change of the feature (% of its length)",
        title=f"mean change: box {boxes.mean():.2f} %, feature {content.mean():.1f} %",
        xlim=(0, None),
        ylim=(0, None),
    )
    return figure


def draw_stages(results: dict[str, Any], requested: Sequence[str] | None = None) -> Figure:
    """Draws the AP of the first 1, 2, ... stages with mean and std over the seeds (Fig. 6).

    Args:
        results: data -> variant -> seed -> {"per_stage": [{"AP": ...}, ...]}.
        requested: variants to draw; None: all.

    Raises:
        ValueError: no run was evaluated by stage, or there is no such variant.
    """
    curves: dict[str, dict[str, list[tuple[float, ...]]]] = {}
    for data, variants in results.items():
        for variant, seeds in choose(variants, requested).items():
            runs = [[s["AP"] for s in x["per_stage"]] for x in seeds.values() if "per_stage" in x]
            if runs:
                curves.setdefault(data, {})[variant] = list(zip(*runs, strict=True))
    if not curves:
        raise ValueError("no run has 'per_stage'; set per_stage: true in the study")
    figure = _figure(6 * len(curves), 4.5)
    for panel, (data, variants) in zip(
        figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True
    ):
        for v, (variant, stages) in enumerate(variants.items()):
            mean = np.array([statistics.fmean(values) for values in stages])
            spread = np.array(
                [np.std(values, ddof=1 if len(values) > 1 else 0) for values in stages]
            )
            steps = np.arange(1, len(mean) + 1)
            panel.plot(steps, mean, "o-", color=_color(v), label=f"{variant} ({len(stages[0])})")
            panel.fill_between(steps, mean - spread, mean + spread, color=_color(v), alpha=0.15)
        panel.set(title=data, xlabel="stages", ylabel="AP", xticks=steps)
        panel.grid(alpha=0.25)
        panel.legend(frameon=False, title="variant (seeds)")
    return figure


def choose(variants: dict[str, Any], requested: Sequence[str] | None) -> dict[str, Any]:
    """Selects the requested variants in their order; all if None.

    Raises:
        ValueError: there is no such variant.
    """
    absent = [name for name in requested or () if name not in variants]
    if absent:
        raise ValueError(f"no variant {absent[0]!r}; there are {sorted(variants)}")
    return {name: variants[name] for name in requested or variants}


def study_metrics(folder: Path, data: str | None, seed: int | None) -> dict[str, Path]:
    """Finds the metrics.json of each variant for one data set and seed, by default the first ones.

    Raises:
        ValueError: there is no such data set or seed; the message lists the available ones.
    """
    runs = {x.parts[-4:-1]: x for x in sorted(folder.glob("*/*/seed*/metrics.json"))}
    data = data or next((d for d, _, _ in runs), None)
    seeds = sorted({int(s.removeprefix("seed")) for d, _, s in runs if d == data})
    seed = seed if seed is not None else next(iter(seeds), None)
    runs_of_seed = {k: path for k, path in runs.items() if k[0] == data and k[2] == f"seed{seed}"}
    found = {variant.replace("_", " "): path for (_, variant, _), path in runs_of_seed.items()}
    if not found:
        known = sorted({f"{d} seed {s.removeprefix('seed')}" for d, _, s in runs})
        raise ValueError(f"{folder} has no run of {data} seed {seed}; it has {known}")
    return found


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _color(index: int) -> tuple[float, ...]:
    return tuple(x / 255 for x in class_color(index))


def _add_box(axes: Axes, box: Tensor, color: tuple[float, ...], width: float) -> None:
    x1, y1, x2, y2 = box.tolist()
    axes.add_patch(
        Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=color, linewidth=width)
    )


def _keep_to_image(axes: Axes, image_rgb: np.ndarray) -> None:
    height, width = image_rgb.shape[:2]
    axes.set(xlim=(0, width), ylim=(height, 0))


def model_figure(given: argparse.Namespace, scratch: str) -> Figure:
    """Draws the figure of a command that needs a model."""
    cfg, model, dataset = open_model_and_dataset(given, scratch)
    with torch.no_grad():
        if given.command == "positives":
            (sample,) = read_samples(cfg, dataset, [given.image])
            return draw_positives(find_positives(model, sample))
        if given.command == "proposals":
            one, other = (find_proposals(model, x) for x in read_samples(cfg, dataset, given.image))
            return draw_proposals(one, other)
        count = min(given.images, len(DatasetCatalog.get(dataset)))
        weights = collect_expert_weights(model, read_samples(cfg, dataset, range(count)))
    for number, figures in enumerate(expert_statistics(weights), start=1):
        print(f"expert {number}: " + ", ".join(f"{k} {v:.4f}" for k, v in figures.items()))
    return draw_experts(weights, float(model.proposal_generator.temperature))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    of_model = {
        "positives": ("--image", {"type": int, "default": 0, "help": "index in the data set"}),
        "experts": ("--images", {"type": int, "default": 200, "help": "the first so many"}),
        "proposals": ("--image", {"type": int, "nargs": 2, "default": (0, 1), "help": "two"}),
    }
    for name, (option, settings) in of_model.items():
        command = commands.add_parser(name)
        command.add_argument(option, **settings)
        add_dataset_options(command)
    stages, curves = commands.add_parser("stages"), commands.add_parser("curves")
    stages.add_argument("results", type=Path, help="results.json of a study")
    curves.add_argument("study", type=Path, help="output folder of a study")
    curves.add_argument("--data", help="data set of the study; default: the first")
    curves.add_argument("--seed", type=int, help="default: the first")
    for command in (stages, curves):
        command.add_argument("--variants", nargs="+", metavar="NAME", help="default: all")
    for command in commands.choices.values():
        command.add_argument("--output", type=Path, required=True, help="image file to write")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    given = parse(arguments)
    try:
        given.output.parent.mkdir(parents=True, exist_ok=True)
        if given.command == "curves":
            runs = study_metrics(given.study, given.data, given.seed)
            plot_curves(choose(runs, given.variants), given.output)
            return 0
        if given.command == "stages":
            figure = draw_stages(json.loads(given.results.read_text()), given.variants)
        else:
            with tempfile.TemporaryDirectory() as scratch:
                figure = model_figure(given, scratch)
        figure.savefig(given.output, dpi=100)
    except (OSError, KeyError, ValueError, AssertionError) as error:
        print(f"figures: {error.args[0] if len(error.args) == 1 else error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
