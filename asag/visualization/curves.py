"""Learning curves from Detectron2's metrics.json: losses, accuracy, learning rate, gradients."""

from __future__ import annotations

import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

PathLike = str | os.PathLike[str]
Series = dict[str, list[tuple[int, float]]]
"""Name of a quantity -> (iteration, value), iterations rising."""

# With more entries the legend of a panel becomes unreadable.
MAX_LINES = 12
COLORS = ("#2f6fde", "#e0592a", "#2a9d5c", "#9b4fc4", "#c99a06", "#12a5b8", "#d43d7f", "#6b7280")
STYLES = ("-", "--", ":", "-.")
ACCURACIES = ("AP", "AP50", "AP75", "mMR", "Recall")
STAGE_SUFFIX = re.compile(r"_\d+$")


def plot_curves(
    metrics: PathLike | Sequence[PathLike] | Mapping[str, PathLike], output_png: PathLike
) -> None:
    """Draws learning curves over the iterations.

    The panels are total loss, loss terms, accuracy, learning rate, gradient norm (before clipping)
    and seconds of a step. Each run has its color. The terms are those of the last stage (names
    without a stage number). Panels without data have a note.

    Args:
        metrics: a metrics.json, several (labeled by their folders), or files by label.
        output_png: image file to write; missing parent folders are created. The global state of
            matplotlib does not change, and no display is needed.

    Raises:
        FileNotFoundError: a metrics file does not exist.
        ValueError: no file is given, or one is not in the format of Detectron2's JSONWriter; the
            message names the file and the line.
    """
    runs = {label: read_metrics(path) for label, path in _labeled(metrics).items()}
    figure = Figure(figsize=(16, 8), layout="constrained")
    FigureCanvasAgg(figure)
    ((total, terms, accuracy), (rate, norm, seconds)) = figure.subplots(2, 3)
    losses = _present(runs, ["total_loss", "val_loss/total_loss"])
    _panel(total, "total loss", runs, losses, log=True)
    _panel(terms, "loss terms of the last stage", runs, _loss_terms(runs), log=True)
    _panel(accuracy, "accuracy on the validation set", runs, _accuracies(runs))
    _panel(rate, "learning rate", runs, _present(runs, ["lr"]))
    _panel(norm, "gradient norm", runs, _present(runs, ["grad_norm"]), log=True)
    _panel(seconds, "seconds an iteration", runs, _present(runs, ["time", "data_time"]))
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    Path(output_png).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output_png, format="png", dpi=110)


def read_metrics(path: PathLike) -> Series:
    """Reads a metrics.json, one JSON object a line.

    After a resume the file repeats iterations: records of the interrupted run after the checkpoint
    are dropped. An incomplete last line and values that are not finite are left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not a JSON object with an "iteration", or there is none at all.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no metrics file {path}; training writes it into OUTPUT_DIR")
    lines = path.read_text(encoding="utf-8").splitlines()
    records: dict[int, dict[str, float]] = {}  # by iteration, in ascending order
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        record = _parse(line)
        if record is None:
            if number == len(lines):
                break
            raise ValueError(
                f"{path}, line {number}: expected a JSON object with an 'iteration', "
                f"got {line[:60]!r}"
            )
        iteration = int(record.pop("iteration"))
        while records and next(reversed(records)) > iteration:
            records.popitem()
        records.setdefault(iteration, {}).update(record)
    if not records:
        raise ValueError(f"{path} holds no metrics")
    series: Series = defaultdict(list)
    for iteration, record in records.items():
        for name, value in record.items():
            if isinstance(value, int | float) and math.isfinite(value):
                series[name].append((iteration, float(value)))
    return dict(series)


def _parse(line: str) -> dict[str, float] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    is_record = isinstance(record, dict) and isinstance(record.get("iteration"), int)
    return record if is_record else None


def _labeled(
    metrics: PathLike | Sequence[PathLike] | Mapping[str, PathLike],
) -> dict[str, PathLike]:
    """Labels files by their folders, or by their paths if folders have the same name."""
    if isinstance(metrics, Mapping):
        labeled = dict(metrics)
    else:
        single = isinstance(metrics, str | os.PathLike)
        paths = [Path(p) for p in ([metrics] if single else metrics)]
        names = [path.resolve().parent.name for path in paths]
        unique = len(set(names)) == len(names)
        labeled = dict(zip(names if unique else map(str, paths), paths, strict=True))
    if not labeled:
        raise ValueError("no metrics file is given")
    return labeled


def _present(runs: Mapping[str, Series], names: Sequence[str]) -> list[str]:
    return [name for name in names if any(name in series for series in runs.values())]


def _loss_terms(runs: Mapping[str, Series]) -> list[str]:
    names = {name for series in runs.values() for name in series}
    return sorted(
        name
        for name in names
        if name.startswith("loss_") and not (STAGE_SUFFIX.search(name) and _last_stage(name, names))
    )


def _last_stage(name: str, names: set[str]) -> bool:
    """Returns True if the term of the last stage, named without a number, exists as well."""
    return STAGE_SUFFIX.sub("", name) in names


def _accuracies(runs: Mapping[str, Series]) -> list[str]:
    """Returns AP of every task and data set; for a single run, the other figures too."""
    names = {name for series in runs.values() for name in series}
    ranked = sorted(
        (ACCURACIES.index(figure), name)
        for name in names
        if (figure := name.rpartition("/")[2]) in ACCURACIES
    )
    main = [name for rank, name in ranked if rank == 0]
    return main if len(runs) > 1 else [name for _, name in ranked]


def _panel(
    axes: Axes, title: str, runs: Mapping[str, Series], names: Sequence[str], log: bool = False
) -> None:
    """Draws a line for each run and quantity, colored by run, or by quantity for a single run."""
    axes.set_title(title, fontsize=11)
    axes.set_xlabel("iteration")
    axes.set_ylabel(names[0] if len(names) == 1 else "")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    positive = True
    for r, (label, series) in enumerate(runs.items()):
        for q, name in enumerate(names):
            points = series.get(name, [])
            color, style = (r, q) if len(runs) > 1 else (q, 0)
            axes.plot(
                [iteration for iteration, _ in points],
                [value for _, value in points],
                color=COLORS[color % len(COLORS)],
                linestyle=STYLES[style % len(STYLES)],
                linewidth=1.6,
                # A single evaluation is a point, which a line would not show.
                marker="o" if len(points) < 30 else None,
                markersize=3.5,
                label=_legend(label, name, len(runs), len(names)),
            )
            positive &= all(value > 0 for _, value in points)
    if not names:
        axes.text(0.5, 0.5, "no data", ha="center", va="center", transform=axes.transAxes)
        return
    if log and positive:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    if len(runs) * len(names) <= MAX_LINES:
        axes.legend(fontsize=8, frameon=False)


def _legend(label: str, name: str, num_runs: int, num_names: int) -> str:
    if num_runs == 1:
        return name
    return label if num_names == 1 else f"{label}: {name}"
