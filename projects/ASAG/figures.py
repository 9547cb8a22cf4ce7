#!/usr/bin/env python
"""Draws figures of adaptive anchors for any configuration and weights.

    python projects/ASAG/figures.py anchors    --config C --weights W --output x.png [--image 0 5 9]
    python projects/ASAG/figures.py maps       --config C --weights W --output x.png [--image 0 5 9]
    python projects/ASAG/figures.py statistics --config C --weights W --output x.png [--images 500]

anchors: patches red, anchors white; proposals; final boxes (Figs. 8 and C-2 of the paper). maps:
discriminability of each cell of each level (Figs. 3, 7, C-3). statistics: anchors against
objects, finest level used (Fig. 6), average recall of anchors and proposals (Table 5e), as JSON.
All read DATASETS.TEST, --dataset or --data, a COCO folder.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from asag.inference.figure_inputs import (
    add_dataset_options,
    open_model_and_dataset,
    read_samples,
)

import torch
from anchor_observations import Observation, Statistics, check_model, collect, normalized, observe
from detectron2.data import DatasetCatalog
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

LEVELS = {5: "P5 and P6", 4: "P4", 3: "P3"}


def draw_anchors(found: Sequence[Observation]) -> Figure:
    """Draws anchors, proposals and final boxes, one row for each image."""
    figure = _figure(15, 4.2 * len(found))
    rows = figure.subplots(len(found), 3, squeeze=False)
    for panels, x in zip(rows, found, strict=True):
        for panel in panels:
            panel.imshow(x.image_rgb)
            panel.set_axis_off()
            panel.set(xlim=(0, x.image_rgb.shape[1]), ylim=(x.image_rgb.shape[0], 0))
        _add_boxes(panels[0], x.anchors, "white", 0.8)
        for level, boxes in x.patches.items():
            _add_boxes(panels[0], boxes, "red", 1.0 if level == 3 else 2.0)
        _add_boxes(panels[1], x.proposals, "white", 0.8)
        _add_boxes(panels[2], x.detections, "lime", 1.5)
        probed = ", ".join(f"{len(boxes)} on P{k}" for k, boxes in x.patches.items()) or "none"
        panels[0].set_title(f"{len(x.anchors)} anchors; patches: {probed}")
        panels[1].set_title("proposals")
        panels[2].set_title(f"{len(x.detections)} detections, {len(x.objects)} objects")
    return figure


def draw_maps(found: Sequence[Observation]) -> Figure:
    """Draws the maps, one row for each image and one column for each level."""
    names = list(found[0].maps)
    figure = _figure(3.2 * (len(names) + 1), 3 * len(found))
    rows = figure.subplots(len(found), len(names) + 1, squeeze=False)
    for panels, x in zip(rows, found, strict=True):
        panels[0].imshow(x.image_rgb)
        for panel, name, scores in zip(
            panels[1:], names, normalized(list(x.maps.values())), strict=True
        ):
            panel.imshow(scores.numpy(), cmap="viridis", vmin=0, vmax=1)
            panel.set_title(name)
        for panel in panels:
            panel.set_axis_off()
    return figure


def draw_statistics(found: Statistics) -> Figure:
    """Draws anchors against objects, and the number of images by finest level."""
    figure = _figure(11, 4.5)
    left, right = figure.subplots(1, 2)
    left.scatter(found.objects, found.anchors, s=12, alpha=0.5)
    left.set(
        xlabel="objects of an image",
        ylabel="anchors of an image",
        title=f"correlation {found.correlation():.2f}",
        ylim=(0, None),
    )
    counts = [found.finest_level.count(level) for level in LEVELS]
    bars = right.bar(list(LEVELS.values()), counts)
    right.bar_label(bars, [f"{100 * n / max(sum(counts), 1):.0f} %" for n in counts])
    right.set(xlabel="finest level that gave anchors", ylabel="images")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _add_boxes(axes: Axes, boxes: Tensor, color: str, width: float) -> None:
    for x1, y1, x2, y2 in boxes.tolist():
        axes.add_patch(
            Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=color, linewidth=width)
        )


def observations(given: argparse.Namespace, scratch: str) -> Iterator[Observation]:
    """Yields the observations of the requested images.

    Raises:
        ValueError: there is no data set, an index is out of range, or the detector has no adaptive
            anchors.
    """
    cfg, model, dataset = open_model_and_dataset(given, scratch)
    check_model(model)
    if "images" in given:
        chosen = range(min(given.images, len(DatasetCatalog.get(dataset))))
    else:
        chosen = given.image
    for sample in read_samples(cfg, dataset, chosen):
        yield observe(model, sample, given.threshold)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("anchors", "maps", "statistics"):
        command = commands.add_parser(name)
        if name == "statistics":
            command.add_argument("--images", type=int, default=500, help="number of images")
        else:
            command.add_argument("--image", type=int, nargs="+", default=[0, 1, 2], help="indices")
        command.add_argument("--threshold", type=float, default=0.3, help="score of a detection")
        command.add_argument("--output", type=Path, required=True, help="image file to write")
        add_dataset_options(command)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    given = parse(arguments)
    torch.manual_seed(0)
    try:
        given.output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            found = observations(given, scratch)
            if given.command == "statistics":
                statistics = collect(found)
                print(json.dumps(statistics.summary(), indent=2))
                figure = draw_statistics(statistics)
            else:
                draw = draw_anchors if given.command == "anchors" else draw_maps
                figure = draw(list(found))
        figure.savefig(given.output, dpi=100)
    except (OSError, KeyError, ValueError, AssertionError) as error:
        print(f"figures: {error.args[0] if len(error.args) == 1 else error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
