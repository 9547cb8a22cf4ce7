#!/usr/bin/env python
"""Compares the convergence of runs: accuracy over iterations (Fig. 2), iterations to reach an AP.

    python projects/ConditionalDETR/convergence.py --output curves.png \\
        "Conditional DETR=output/conditional/metrics.json" "DETR=output/detr/metrics.json"

The table lists the iteration at which each run first reaches a level, interpolated linearly between
evaluations, and its ratio to the first run; "> 500" stands for a run that ended at iteration 500
without reaching the level. With --losses the four panels of losses and rates are drawn as well.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from asag.visualization.curves import plot_curves, read_metrics

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Points = list[tuple[int, float]]
DEFAULT_SHARES = (0.25, 0.5, 0.75, 0.9)


def accuracy(path: str, figure: str) -> Points:
    """Reads (iteration, value) of each evaluation from a metrics.json.

    Args:
        path: the file.
        figure: name of the accuracy, or its end behind a slash: "AP" finds "bbox/AP".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: there is no such figure, or several; the message lists the available ones.
    """
    series = read_metrics(path)
    names = [n for n in series if n == figure or n.endswith(f"/{figure}")]
    if len(names) != 1:
        there = sorted(n for n in series if "/" in n)
        raise ValueError(f"{path} has {len(names)} figures named {figure!r}; choose one of {there}")
    return series[names[0]]


def reached(points: Points, level: float) -> float | None:
    """Interpolates the iteration that first reaches a level; None if no iteration does."""
    before: tuple[int, float] | None = None
    for iteration, value in points:
        if value >= level:
            if before is None:
                return float(iteration)
            share = (level - before[1]) / (value - before[1])
            return before[0] + share * (iteration - before[0])
        before = (iteration, value)
    return None


def default_levels(runs: dict[str, Points]) -> list[float]:
    """Returns 25, 50, 75 and 90 percent of the best accuracy of the weakest run."""
    common = min(max(value for _, value in points) for points in runs.values())
    return [float(f"{share * common:.2g}") for share in DEFAULT_SHARES]


def table(runs: dict[str, Points], levels: Sequence[float]) -> str:
    """Formats a markdown table with one row for each level.

    Cells have the iterations of a run and their ratio to the first run, or lower bounds of both if
    the run ended below the level.
    """
    lines = [
        "| AP | " + " | ".join(runs) + " |",
        "|---|" + "---|" * len(runs),
    ]
    for level in levels:
        cells, base = [], None
        for i, points in enumerate(runs.values()):
            at = reached(points, level)
            base = at if i == 0 else base
            more, count = ("", at) if at is not None else ("> ", points[-1][0])
            ratio = f" ({more}{count / base:.2f}x)" if i and base else ""
            cells.append(f"{more}{count:.0f}{ratio}")
        lines.append(f"| {level:g} | " + " | ".join(cells) + " |")
    best = (f"{max(v for _, v in points):.2f}" for points in runs.values())
    lines.append("| best | " + " | ".join(best) + " |")
    return "\n".join(lines)


def draw(runs: dict[str, Points], figure: str, output: Path) -> None:
    """Draws the accuracy of each run over its iterations."""
    canvas = Figure(figsize=(6, 4.5), layout="constrained")
    FigureCanvasAgg(canvas)
    axes = canvas.subplots()
    for label, points in runs.items():
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
    axes.set(xlabel="iteration", ylabel=figure, title="convergence")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    output.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(output, format="png", dpi=120)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="NAME=metrics.json")
    parser.add_argument("--figure", default="AP", help='accuracy to compare (default "AP")')
    parser.add_argument("--levels", type=float, nargs="+", help="default: from the weakest run")
    parser.add_argument("--output", type=Path, required=True, help="image file to write")
    parser.add_argument("--losses", type=Path, metavar="PNG", help="losses and rates as well")
    given = parser.parse_args(arguments)
    try:
        files = dict(_named(run) for run in given.runs)
        runs = {name: accuracy(path, given.figure) for name, path in files.items()}
        draw(runs, given.figure, given.output)
        if given.losses:
            plot_curves(files, given.losses)
    except (OSError, ValueError) as error:
        print(f"convergence: {error}", file=sys.stderr)
        return 1
    print(table(runs, given.levels or default_levels(runs)))
    return 0


def _named(run: str) -> tuple[str, str]:
    name, separator, path = run.partition("=")
    if not separator or not name or not path:
        raise ValueError(f"{run!r} is not NAME=metrics.json")
    return name, path


if __name__ == "__main__":
    sys.exit(main())
