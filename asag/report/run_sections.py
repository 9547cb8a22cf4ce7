"""Sections of the page about the run: key figures, curves, configuration, environment."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping

from ..engine.hooks import BestResult
from ..visualization.curves import STAGE_SUFFIX, Series
from .charts import Line, line_chart
from .html import Html, details, join, note, number, section, table, tag
from .run import CONFIG_FILE, Run

FIGURES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "mMR", "Recall")
HEADLINES = ("AP", "AP50", "AP75", "mMR", "Recall")


def split_metrics(metrics: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Groups metrics named `bbox/AP` or `data set/bbox/AP` by the prefix of the figure."""
    found: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        group, _, figure = name.rpartition("/")
        found.setdefault(group, {})[figure] = value
    return found


def key_figures(run: Run, metrics: Mapping[str, float]) -> Html:
    """Shows the most important results."""
    facts: list[tuple[str, str]] = []
    for group, figures in split_metrics(metrics).items():
        prefix = group.rpartition("/")[0]
        for name in HEADLINES:
            if name in figures:
                facts.append((f"{name} {prefix}".strip(), number(figures[name])))
    best = BestResult.read(run.folder)
    if best is not None:
        facts.append((f"best AP, iteration {best.iterations}", number(best.ap)))
    facts.append(("iterations", f"{run.iterations:,}"))
    if "time" in run.series:
        seconds = statistics.median(value for _, value in run.series["time"])
        facts.append(("seconds an iteration", f"{seconds:.3g}"))
    cells = [tag("div", tag("dt", name), tag("dd", value)) for name, value in facts]
    return tag("dl", *cells, class_="facts")


def metrics_table(metrics: Mapping[str, float], source: str) -> Html:
    """Tabulates the final metrics except those of single classes."""
    groups = split_metrics(metrics)
    named = {figure for figures in groups.values() for figure in figures}
    others = sorted(x for x in named if x not in FIGURES and not x.startswith("AP-"))
    columns = [x for x in FIGURES if x in named] + others
    if not columns:
        return note("The run has not been evaluated: metrics.json has no figures of a test set.")
    rows = [
        [group, *(number(figures.get(x, float("nan")), 2) for x in columns)]
        for group, figures in groups.items()
    ]
    return table(["task", *columns], rows, caption=f"Final metrics in percent ({source})")


def curves(run: Run) -> Html:
    """Draws the logged losses, accuracy, learning rate, gradient norm and speed."""
    series = run.series
    charts = [
        ("Total loss", _lines(series, TOTALS), True),
        ("Loss terms of the last stage", _loss_terms(series), True),
        ("Accuracy on the test set, percent", _accuracies(series), False),
        ("Learning rate", _lines(series, {"lr": "learning rate"}), False),
        ("Gradient norm before clipping", _lines(series, {"grad_norm": "norm"}), True),
        ("Seconds an iteration", _lines(series, SPEEDS), False),
        ("Units an object (optimal transport)", _lines(series, {UNITS: "units"}), False),
    ]
    shown = [
        line_chart(title, lines, x_label="iteration", log_y=log, x_range=(0, run.iterations))
        for title, lines, log in charts
        if lines
    ]
    return section("Curves", tag("div", *shown, class_="charts"))


TOTALS = {"total_loss": "training", "val_loss/total_loss": "validation"}
SPEEDS = {"time": "all", "data_time": "waiting for data"}
UNITS = "ot_units_per_object"


def _lines(series: Series, names: Mapping[str, str]) -> list[Line]:
    return [Line(label, series[name]) for name, label in names.items() if name in series]


def _loss_terms(series: Series) -> list[Line]:
    """Returns loss terms without the number of a stage; those with one if there are no others."""
    terms = [x for x in series if x.startswith("loss_")]
    last = [
        x for x in terms if STAGE_SUFFIX.sub("", x) == x or STAGE_SUFFIX.sub("", x) not in terms
    ]
    return [Line(x.removeprefix("loss_"), series[x]) for x in sorted(last)]


def _accuracies(series: Series) -> list[Line]:
    names = [x for x in series if "/" in x and x.rpartition("/")[2] in HEADLINES]
    tasks = {x.rpartition("/")[0] for x in names}
    return [
        Line(x if len(tasks) > 1 else x.rpartition("/")[2], series[x])
        for x in sorted(names, key=lambda x: HEADLINES.index(x.rpartition("/")[2]))
    ]


def configuration(run: Run) -> Html:
    """Shows the differences from the recipe, then the whole configuration."""
    source, changes = run.changes()
    rows = [(_breakable(key), _text(now), _text(before)) for key, (before, now) in changes.items()]
    header = ["key", "this run", "recipe" if run.record else "default"]
    compared = table(header, rows, wide_text=True, caption=f"Differences from {source}")
    if not rows:
        compared = tag("p", f"Nothing differs from {source}.")
    elif run.record is None:
        # Without a record the list includes all values of the recipe.
        remark = "The run does not say which recipe it started from, so this is the whole of it."
        compared = join(note(remark), details(f"{len(rows)} keys differ from {source}", compared))
    everything = tag("pre", run.cfg.dump(), tabindex="0")
    return section("Configuration", compared, details(f"All keys ({CONFIG_FILE})", everything))


def environment(run: Run) -> Html:
    """Shows the environment of the run."""
    if not run.environment:
        return section("Environment", note("There is no environment.txt in the folder."))
    text = tag("pre", run.environment, tabindex="0")
    return section("Environment", details("Machine and packages (environment.txt)", text))


def _breakable(key: str) -> Html:
    """Adds line break opportunities after dots and underscores of a key."""
    parts = re.findall(r"[^._]+[._]*", key)
    return join(*(x for part in parts for x in (part, tag("wbr"))))


def _text(value: object) -> str:
    return "–" if value is None or value == "" else str(value)
