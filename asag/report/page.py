"""Assembly of the report page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..files import atomic_writer
from .annotations import DatasetSummary, GroundTruth
from .html import Html, anchor, join, section, tag
from .matching import MatchingStatistics, matching_statistics
from .result_sections import accuracy_tables, data, images, matching, precision_recall
from .results import NoDataError, Result, class_names, compare_with_data, load_entries
from .run import Run
from .run_sections import configuration, curves, environment, key_figures, metrics_table
from .style import STYLE

REPORT_FILE = "report.html"
SECTIONS = (
    "Accuracy", "Curves", "Precision and recall", "Best and worst images", "Matching", "Data",
    "Configuration", "Environment",
)  # fmt: skip


def write_report(
    run: Run,
    output: Path,
    *,
    model: nn.Module | None = None,
    num_images: int = 4,
    train_dicts: Sequence[dict[str, Any]] | None = None,
    detections_folder: Path | None = None,
    metrics: Mapping[str, float] | None = None,
    weights: str = "",
) -> Path:
    """Writes the report of a run as one HTML file.

    The detections are those of the run's last evaluation. Data sets that cannot be read are left
    out, and the page says so.

    Args:
        run: the folder of the run.
        output: file to write.
        model: with the run's weights, for the statistics of the matching; None leaves them out.
        num_images: maximum number of best and of worst images.
        train_dicts: training images; default: those of DATASETS.TRAIN.
        detections_folder: folder with the detections of another evaluation.
        metrics: figures of that evaluation in percent, by `task/figure`.
        weights: file of the weights of that evaluation.

    Returns:
        `output`.

    Raises:
        ValueError: a file of detections does not match the data.
        OSError: the file cannot be written.
    """
    remarks: list[str] = []
    if train_dicts is None:
        train_dicts = _training_images(run, remarks)
    results = _results(run, detections_folder, remarks)
    statistics, reason = _matching(run, model, train_dicts)
    source = weights or "the run's last evaluation"
    figures = run.final_metrics() if metrics is None else metrics
    summaries, names = _summaries(run, train_dicts, results)
    tables = [accuracy_tables(x, figures) for x in results]
    content = join(
        section("Accuracy", metrics_table(figures, source), *tables),
        curves(run),
        precision_recall(results),
        images(results[0] if results else None, num_images),
        matching(statistics, reason),
        data(summaries, names, remarks),
        configuration(run),
        environment(run),
    )
    with atomic_writer(output) as file:
        file.write(_page(run, key_figures(run, figures), content))
    return output


def _page(run: Run, figures: Html, content: Html) -> str:
    model = run.cfg.MODEL.META_ARCHITECTURE
    title = f"{model}: {run.folder}"
    recipe = f", recipe {run.record.recipe}" if run.record else ""
    links = [tag("li", tag("a", name, href=f"#{anchor(name)}")) for name in SECTIONS]
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Html(STYLE)),
    )
    body = tag(
        "body",
        tag(
            "header",
            tag("h1", model),
            tag("p", f"{run.folder}{recipe}", class_="soft"),
            tag("nav", tag("ul", *links), aria_label="Sections"),
        ),
        tag("main", figures, content),
        tag("footer", "Lines of more than 240 points are drawn as means of neighboring points."),
    )
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _training_images(run: Run, remarks: list[str]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for name in run.cfg.DATASETS.TRAIN:
        try:
            found += load_entries(name)
        except NoDataError as error:
            remarks.append(str(error))
    return found


def _results(run: Run, folder: Path | None, remarks: list[str]) -> list[Result]:
    if not run.cfg.DATASETS.TEST:
        remarks.append("The run has no test set (DATASETS.TEST is empty).")
    found = []
    for name in run.cfg.DATASETS.TEST:
        try:
            found.append(compare_with_data(name, run.detections_file(name, folder)))
        except NoDataError as error:
            remarks.append(str(error))
    return found


def _matching(
    run: Run, model: nn.Module | None, dicts: Sequence[dict[str, Any]]
) -> tuple[MatchingStatistics | None, str]:
    """Returns the statistics of the matching, or the reason why there are none."""
    if model is None:
        return None, "There are no weights in the folder to look at the matching with."
    if not dicts:
        return None, "The training images cannot be read."
    try:
        return matching_statistics(run.cfg, model, dicts), (
            f"{run.cfg.MODEL.META_ARCHITECTURE} is no query-based detector of this library."
        )
    except (OSError, FloatingPointError) as error:  # a missing image, or weights that are NaN
        return None, f"The matching cannot be shown: {error}"


def _summaries(
    run: Run, train_dicts: Sequence[dict[str, Any]], results: Sequence[Result]
) -> tuple[dict[str, DatasetSummary], Sequence[str]]:
    """Summarizes the data sets by role and name; returns the class names as well."""
    summaries, names = {}, [x.class_names for x in results]
    if train_dicts and run.cfg.DATASETS.TRAIN:
        names.insert(0, class_names(run.cfg.DATASETS.TRAIN[0], train_dicts))
        gts = [GroundTruth.of(x) for x in train_dicts]
        title = " and ".join(run.cfg.DATASETS.TRAIN)
        summaries[f"train: {title}"] = DatasetSummary.of(gts, len(names[0]))
    for number, result in enumerate(results, start=1):
        role = "test" if len(results) == 1 else f"test {number}"
        summaries[f"{role}: {result.name}"] = result.summary
    return summaries, max(names, key=len, default=[])
