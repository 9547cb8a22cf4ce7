"""Sections of the page about accuracy, images, matching and data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .accuracy import AREAS, CocoAccuracy
from .annotations import SIZES, DatasetSummary
from .charts import Line, line_chart
from .html import Html, details, join, note, number, section, table, tag
from .image_errors import best_and_worst
from .matching import MatchingStatistics
from .pictures import compared
from .results import Result

PICTURE_BYTES = 1_500_000  # of all JPEG files together
UNFOLDED_CLASSES = 9  # with more classes, the precision-recall curves of classes are collapsed
MOST_CLASSES = 80  # classes with the most objects, whose curves are drawn
NO_CURVES = "These curves are drawn of detections on data sets that are evaluated by COCO's rules."
DISAGREEMENT = 0.05  # difference in AP between two sources that is reported


def accuracy_tables(result: Result, metrics: Mapping[str, float]) -> Html:
    """Tabulates AP by class and by size."""
    remarks = [note(x) for x in result.remarks]
    accuracy = result.accuracy
    if accuracy is None:
        return join(*remarks)
    logged = [v for k, v in metrics.items() if k in ("bbox/AP", f"{result.name}/bbox/AP")]
    if logged and abs(logged[0] - accuracy.ap()) > DISAGREEMENT:
        text = (
            f"The detections in the folder give {accuracy.ap():.2f} AP, but the final metrics say "
            f"{logged[0]:.2f}: they come from another evaluation, or the data has changed since."
        )
        remarks.append(note(text))
    counts = result.summary.objects
    sizes = [
        [area, int(n), *(number(accuracy.ap(area=area, iou=iou)) for iou in (None, 0.5, 0.75))]
        for area, n in zip(AREAS, (counts.sum(), *counts.sum(axis=0)), strict=True)
    ]
    classes = [
        [
            name,
            int(counts[k].sum()),
            *(number(accuracy.ap(label=k, iou=iou)) for iou in (None, 0.5, 0.75)),
            *(number(accuracy.ap(label=k, area=area)) for area in AREAS[1:]),
        ]
        for k, name in enumerate(accuracy.class_names)
    ]
    by_size = table(
        ["size", "objects", "AP", "AP50", "AP75"],
        sizes,
        caption=f"By size of the object, {result.name}",
    )
    by_class = table(
        ["class", "objects", "AP", "AP50", "AP75", *(f"AP {x}" for x in SIZES)],
        classes,
        caption=f"By class, {result.name}",
    )
    explained = tag(
        "p", "Small is below 32² pixels of area, large above 96², in the original image. Objects "
        "are counted by the area of their box.",
        class_="soft",
    )  # fmt: skip
    return join(*remarks, by_size, explained, by_class)


def precision_recall(results: Sequence[Result]) -> Html:
    """Draws precision-recall curves: the mean over classes, and each class."""
    parts: list[Html] = []
    for result in results:
        if result.accuracy is None:
            continue
        if len(results) > 1:
            parts.append(tag("h3", result.name))
        parts.append(_curves_of(result, result.accuracy))
    if not parts:
        return section("Precision and recall", note(NO_CURVES))
    text = "Precision when the detections of highest score are kept until the recall is reached, "
    text += "at an IoU of 0.5, of 0.75, and as the mean over 0.5 to 0.95."
    return section("Precision and recall", tag("p", text), *parts)


def _curves_of(result: Result, accuracy: CocoAccuracy) -> Html:
    counts = result.summary.objects.sum(axis=1)
    shown = [k for k in (-counts).argsort(kind="stable")[:MOST_CLASSES].tolist() if counts[k]]
    mean = _curve("All classes", accuracy, None)
    each = [_curve(accuracy.class_names[k], accuracy, k) for k in sorted(shown)]
    if len(accuracy.class_names) == 1:
        return tag("div", mean, class_="charts")
    if len(shown) <= UNFOLDED_CLASSES:
        return tag("div", mean, *each, class_="charts")
    folded = details(f"Curves of {len(shown)} classes", tag("div", *each, class_="charts"))
    return join(tag("div", mean, class_="charts"), folded)


def _curve(title: str, accuracy: CocoAccuracy, label: int | None) -> Html:
    recalls = accuracy.recalls.tolist()
    lines = []
    for name, iou in (("IoU 0.5", 0.5), ("IoU 0.75", 0.75), ("mean", None)):
        values = accuracy.curve(label=label, iou=iou).tolist()
        lines.append(Line(name, list(zip(recalls, values, strict=True))))
    title = f"{title}: AP {number(accuracy.ap(label=label))}"
    return line_chart(title, lines, x_label="recall", x_range=(0, 1), y_range=(0, 1))


def images(result: Result | None, requested: int) -> Html:
    """Shows the worst and the best images."""
    title = "Best and worst images"
    if result is None or not result.counts:
        return section(title, note("There are no detections to look at."))
    best, worst = best_and_worst(result.counts, requested)
    each = PICTURE_BYTES // max(1, 2 * (len(best) + len(worst)))
    parts = [_explained(result)]
    for heading, chosen in (("Worst", worst), ("Best", best)):
        if not chosen:
            parts.append(join(tag("h3", heading), note("There are none.")))
            continue
        parts.append(tag("h3", heading))
        for counts in chosen:
            try:
                parts.append(
                    compared(
                        result.entries[counts.index],
                        result.found[counts.index],
                        counts,
                        result.class_names,
                        threshold=result.threshold,
                        max_bytes=each,
                    )
                )
            except OSError as error:
                parts.append(note(f"An image cannot be shown: {error}"))
    return section(title, *parts)


def _explained(result: Result) -> Html:
    found, missed, false = (
        sum(getattr(x, kind) for x in result.counts) for kind in ("found", "missed", "false")
    )
    text = (
        f"On {result.name}, at the score threshold {result.threshold:.2f}, where the F1 of all "
        f"images at an IoU of 0.5 is highest ({result.f1:.2f}), {found} objects are found, "
        f"{missed} are missed and {false} detections are false (nothing there, the wrong class, "
        "or a second time). The worst images have the most misses and false detections together; "
        "the best have objects and the fewest."
    )
    return tag("p", text)


def matching(statistics: MatchingStatistics | None, reason: str) -> Html:
    """Shows the statistics of the matching."""
    if statistics is None:
        return section("Matching", note(reason))
    text = (
        f"What the model's own matcher decides on {statistics.images} training images with "
        f"{statistics.objects} objects, without augmentation; an image has "
        f"{statistics.queries:.1f} queries on average."
    )
    rows = [
        [stage, number(positives, 2), number(100 * unmatched)]
        for stage, (positives, unmatched) in enumerate(
            zip(statistics.positives, statistics.unmatched, strict=True), start=1
        )
    ]
    header = ["stage", "queries an object", "objects without a query, %"]
    stages = table(header, rows, caption="Matched queries by stage")
    return section("Matching", tag("p", text), stages, _usage(statistics))


def _usage(statistics: MatchingStatistics) -> Html:
    if statistics.matched is None:
        return note(
            "The queries are made from each image, so it means nothing which of them are used."
        )
    total = len(statistics.matched)
    text = (
        f"In the last stage {statistics.used} of {total} queries are matched at least once, and "
        f"{statistics.best_scored} of {total} are in some image among as many best-scored ones as "
        "it has objects."
    )
    often = sorted(statistics.matched.tolist(), reverse=True)
    line = Line("times matched", list(enumerate(often, start=1)))
    chart = line_chart("How often each query is matched", [line], x_label="queries by frequency")
    return join(tag("p", text), tag("div", chart, class_="charts"))


def data(
    summaries: Mapping[str, DatasetSummary], class_names: Sequence[str], remarks: Sequence[str]
) -> Html:
    """Tabulates the statistics of the data sets side by side.

    Args:
        summaries: by role and name, such as "train: shapes_train".
        class_names: K names.
        remarks: about data sets that cannot be read.
    """
    notes = [note(x) for x in remarks]
    if not summaries:
        return section("Data", *notes)
    rows = [
        [
            name,
            f"{x.images:,}",
            f"{x.empty:,}",
            f"{x.objects.sum():,}",
            number(x.objects.sum() / x.images if x.images else float("nan")),
            x.fullest,
            number(x.median_side),
            f"{x.ignored:,}",
        ]
        for name, x in summaries.items()
    ]
    header = [
        "data set",
        "images",
        "empty",
        "objects",
        "an image",
        "fullest image",
        "median side, px",
    ]
    overview = table([*header, "crowd regions"], rows, caption="Images and objects")
    columns = [
        f"{name.partition(':')[0]}{f' {size}' if size else ''}"
        for name in summaries
        for size in ("", *SIZES)
    ]
    by_class = [
        [name, *(n for x in summaries.values() for n in _row(x, k))]
        for k, name in enumerate(class_names)
    ]
    sizes = table(["class", *columns], by_class, caption="Objects by class and size of their box")
    return section("Data", *notes, overview, sizes)


def _row(summary: DatasetSummary, label: int) -> list[int]:
    if label >= len(summary.objects):
        return [0] * (1 + len(SIZES))
    return [int(summary.objects[label].sum()), *summary.objects[label].tolist()]
