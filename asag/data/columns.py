"""Judging the boxes of a whole split: units, meaning of the four numbers, areas, crowd marks.

A single odd box is an odd object. The same oddity in most boxes is a mistake of the file, which
training would follow without a word.

A boxes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from asag.data.coco_table import CocoTable
from asag.data.errors import DataIssue, DatasetError

CENTERS = "[center x, center y, width, height]"
AS_WRITTEN_OUTSIDE = 0.2  # share of boxes beyond their images from which on the file is suspected
_SURE = 0.98  # share of boxes that must fit another reading of the four numbers
_MOST = 0.5  # share of boxes far beyond their images that no data set has
_TOLERANCE = 1.0  # pixels that a box may reach beyond its image
_MIN_BOXES = 4  # for a suspicion about the meaning of the numbers
_MIN_JUDGED = 10  # boxes for a suspicion about sizes of images, in
_MIN_CORNER_IMAGES = 4  # images at least where all boxes lie in one corner
_CORNER = 0.5  # share of both sides of the image that a corner has at most
_SMALL_CORNER = 0.34  # that of a corner in which boxes are not accepted
_DUPLICATES = 0.3  # share of repeated boxes from which on they are a mistake of the export
_MISFIT_AREAS = 0.2  # share of areas that do not fit from which on the column is not used
_TINY_AREA = 0.02  # median of area / box area below which the column has another unit
_OVERRIDE = "If the boxes are right as they are, set DATASETS.CHECK_BOXES False"


def check_boxes(*tables: CocoTable) -> None:
    """Raises DatasetError if boxes cannot be what COCO's [x, y, width, height] in pixels means.

    Args:
        tables: judged together, with the sizes of all images that have a file.
    """
    boxes = _Boxes.of(tables)
    if len(boxes.xywh) < _MIN_BOXES:
        return
    problem = next(_problems(boxes), None)
    if problem is not None:
        what, remedy = problem
        source = ", ".join(dict.fromkeys(str(table.source) for table in tables))
        raise DatasetError([DataIssue(source, what, f"{remedy}. {_OVERRIDE}")])


def corrected_columns(table: CocoTable) -> CocoTable:
    """The table without boxes that are repeated throughout, and with areas that fit the boxes.

    Changes are told in `repairs`, what looks odd in `notes`.
    """
    table = _with_areas(_without_duplicates(table))
    boxes = _Boxes.of([table])
    corner = _corner(boxes.xywh, boxes.image_wh, boxes.image)
    return table if corner is None else replace(table, notes=(*table.notes, corner[0]))


def all_crowd(table: CocoTable) -> DataIssue | None:
    """Says that a table has crowd regions only, which training leaves out."""
    if not len(table.iscrowd) or not table.iscrowd.all():
        return None
    return DataIssue(
        str(table.source),
        f"all {len(table.iscrowd)} annotations are crowd regions (iscrowd = 1), which are not "
        "trained on: no usable box",
        "set iscrowd to 0 for single objects; some exporters set 1 for every mask in RLE",
    )


@dataclass(frozen=True)
class _Boxes:
    """Boxes of positive, finite size in images of known size.

    Attributes:
        xywh: (A, 4) as written.
        image_wh: (A, 2) size of the image of each.
        areas: (A,) as written.
        image: (A,) number of the image of each.
    """

    xywh: np.ndarray
    image_wh: np.ndarray
    areas: np.ndarray
    image: np.ndarray

    @classmethod
    def of(cls, tables: Sequence[CocoTable]) -> _Boxes:
        parts, first_image = [], 0
        for table in tables:
            known = np.append((table.image_hw > 0).all(axis=1), False)
            finite = np.isfinite(table.boxes_xywh).all(axis=1)
            usable = known[table.box_image] & finite & (table.boxes_xywh[:, 2:] > 0).all(axis=1)
            image = table.box_image[usable]
            sizes = table.image_hw[image][:, ::-1].astype(np.float64)
            parts.append(
                (table.boxes_xywh[usable], sizes, table.areas[usable], image + first_image)
            )
            first_image += len(table.image_ids)
        return cls(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _problems(boxes: _Boxes) -> Iterator[tuple[str, str]]:
    """Problem and remedy of everything that is wrong with the boxes, the likeliest first."""
    xywh, wh = boxes.xywh, boxes.image_wh
    example = f"for example {_shown(xywh[0])} in an image of {_shown(wh[0], ' x ')} pixels"
    yield from _fractions(xywh, wh, example)
    yield from _other_units(xywh, wh, example)
    yield from _other_meaning(xywh, wh, boxes.areas, example)
    yield from _one_corner(xywh, wh, boxes.image)


def _fractions(boxes: np.ndarray, wh: np.ndarray, example: str) -> Iterator[tuple[str, str]]:
    tiny = ((boxes >= 0) & (boxes <= 1)).all(axis=1) & (wh > 2).all(axis=1)
    if tiny.mean() < AS_WRITTEN_OUTSIDE:
        return
    share = "the boxes" if tiny.all() else f"{np.count_nonzero(tiny)} of {len(tiny)} boxes"
    readings = {"[x, y, width, height]": boxes, **_readings(boxes)}
    unit = np.ones((np.count_nonzero(tiny), 2))
    kind = next((k for k, x in readings.items() if _fits(x[tiny], unit, 0.01).mean() > _SURE), "")
    remedy = "multiply x and width by the width of the image, y and height by its height"
    if kind != "[x, y, width, height]":
        remedy = f"{remedy}, as [x, y, width, height] with the upper left corner"
    yield (
        f"{share} look like fractions of the image size{f', {kind}' * bool(kind)}, not like "
        f"pixels: all numbers lie between 0 and 1, {example}",
        remedy,
    )


def _other_units(boxes: np.ndarray, wh: np.ndarray, example: str) -> Iterator[tuple[str, str]]:
    """Percent and thousandths: the far ends of the boxes approach 100 or 1000 on both axes, where
    images are much larger, or too small for the boxes."""
    ends = (boxes[:, :2] + boxes[:, 2:]).max(axis=0)
    outside = ~_fits(boxes, wh)
    for unit, name in ((100, "percent"), (1000, "thousandths")):
        near = (ends > 0.9 * unit).all() and (ends <= 1.005 * unit).all()
        unlike_sizes = (wh > 2 * unit).all() or outside.mean() >= AS_WRITTEN_OUTSIDE
        if near and unlike_sizes and len(boxes) >= _MIN_JUDGED:
            yield (
                f"the boxes look like {name} of the image size, not like pixels: the largest "
                f"x + width and y + height are {_shown(ends, ' and ')}, {example}",
                f"multiply x and width by the width of the image / {unit}, y and height by its "
                f"height / {unit}",
            )


def _other_meaning(
    boxes: np.ndarray, wh: np.ndarray, areas: np.ndarray, example: str
) -> Iterator[tuple[str, str]]:
    """Corners or centers where corner and size should be, and boxes of other images."""
    outside = ~_fits(boxes, wh)
    product = boxes[:, 2] * boxes[:, 3]
    for name, read in _readings(boxes).items():
        if _fits(read, wh).mean() < _SURE:
            continue
        evidence = ""
        if outside.mean() >= AS_WRITTEN_OUTSIDE:
            evidence = f"{np.count_nonzero(outside)} of {len(boxes)} reach beyond their images"
        elif name != CENTERS and _areas_are(areas, read[:, 2] * read[:, 3], product):
            evidence = "their `area` fits these only"
        if evidence:
            yield (
                f"the boxes look like {name}, not like [x, y, width, height]: {evidence}, "
                f"{example}",
                "write [center x - width / 2, center y - height / 2, width, height]"
                if name == CENTERS
                else "write [x1, y1, x2 - x1, y2 - y1]",
            )
    far = (boxes[:, :2] < -0.1 * wh) | (boxes[:, :2] + boxes[:, 2:] > 1.1 * wh)
    if len(boxes) >= _MIN_JUDGED and far.any(axis=1).mean() > _MOST:
        yield (
            f"{np.count_nonzero(far.any(axis=1))} of {len(boxes)} boxes reach far beyond their "
            f"images, {example}",
            "boxes and images are of different sizes: annotate these images, or scale the boxes",
        )


def _readings(boxes: np.ndarray) -> dict[str, np.ndarray]:
    """Other meanings of the four numbers -> the boxes as [x, y, width, height]."""
    a, b, c, d = boxes.T
    return {
        "corners [x1, y1, x2, y2]": np.stack([a, b, c - a, d - b], axis=1),
        "corners with y first [y1, x1, y2, x2]": np.stack([b, a, d - b, c - a], axis=1),
        CENTERS: np.stack([a - c / 2, b - d / 2, c, d], axis=1),
    }


def _one_corner(boxes: np.ndarray, wh: np.ndarray, image: np.ndarray) -> Iterator[tuple[str, str]]:
    found = _corner(boxes, wh, image)
    # Equal boxes are a mark at a fixed place, boxes of another scale differ.
    distinct = len(np.unique(boxes, axis=0))
    if found is not None and found[1] <= _SMALL_CORNER and 2 * distinct > len(boxes):
        yield (
            found[0],
            "were they drawn on copies of another size? Scale them to the images, or pass those "
            "copies",
        )


def _corner(boxes: np.ndarray, wh: np.ndarray, image: np.ndarray) -> tuple[str, float] | None:
    """Says that all boxes lie in one corner, and how much of the sides that corner has."""
    if len(boxes) < _MIN_JUDGED or len(np.unique(image)) < _MIN_CORNER_IMAGES:
        return None
    near = boxes[:, :2] / wh
    far = (boxes[:, :2] + boxes[:, 2:]) / wh
    low, high = (far <= _CORNER).all(axis=0), (near >= 1 - _CORNER).all(axis=0)
    if not (low | high).all():
        return None
    reach = np.where(low, far.max(axis=0), 1 - near.min(axis=0))
    corner = f"{'upper' if low[1] else 'lower'} {'left' if low[0] else 'right'}"
    text = (
        f"all {len(boxes)} boxes lie in the {corner} corner of their images: within "
        f"{reach[0]:.0%} of the width and {reach[1]:.0%} of the height"
    )
    return text, float(reach.max())


def _fits(boxes: np.ndarray, wh: np.ndarray, tolerance: float = _TOLERANCE) -> np.ndarray:
    """(A,) bool: boxes of positive size inside of their images."""
    ends = boxes[:, :2] + boxes[:, 2:]
    inside = (boxes[:, :2] >= -tolerance) & (ends <= wh + tolerance) & (boxes[:, 2:] > 0)
    return inside.all(axis=1)


def _areas_are(areas: np.ndarray, product: np.ndarray, other: np.ndarray) -> bool:
    """Returns True if areas are nearly all one product of sides, and not the other."""
    is_product = np.isclose(areas, product, rtol=0.01)
    return bool(is_product.mean() >= _SURE and np.isclose(areas, other, rtol=0.01).mean() < 0.5)


def _without_duplicates(table: CocoTable) -> CocoTable:
    columns = (table.box_image, table.box_class, *table.boxes_xywh.T, table.iscrowd)
    keys = np.column_stack([np.asarray(x, dtype=np.float64) for x in columns])
    _, first = np.unique(keys, axis=0, return_index=True)
    repeated = np.ones(len(keys), dtype=bool)
    repeated[first] = False
    count = np.count_nonzero(repeated)
    if not count:
        return table
    if count < _DUPLICATES * len(keys):
        note = f"{count} box(es) are exactly equal to another one of their image and class"
        return replace(table, notes=(*table.notes, note))
    every = np.ones(len(table.image_ids), dtype=bool)
    return table.select(
        every, ~repeated, f"{count} of {len(keys)} boxes repeat another one and are dropped"
    )


def _with_areas(table: CocoTable) -> CocoTable:
    """Takes the areas of the boxes where those of the file cannot be meant."""
    product = table.boxes_xywh[:, 2] * table.boxes_xywh[:, 3]
    judged = np.isfinite(product) & (product > 0) & np.isfinite(table.areas)
    if np.count_nonzero(judged) < 1:
        return table
    areas, boxes = table.areas[judged], product[judged]
    ratio = areas / boxes
    constant = len(areas) >= _MIN_BOXES and np.ptp(areas) == 0 and np.ptp(boxes) > 0
    misfits = ((areas <= 0) | (areas > 1.1 * boxes + 1)).mean()
    if not (constant or misfits >= _MISFIT_AREAS or np.median(ratio) < _TINY_AREA):
        return table
    example = f"{areas[0]:g} for a box of {boxes[0]:g}"
    reason = f"`area` does not fit the boxes ({example}), the area of the box is used"
    fixed = np.where(np.isfinite(product), product, 0.0)
    return replace(table, areas=fixed, repairs=(*table.repairs, reason))


def _shown(values: np.ndarray, separator: str = ", ") -> str:
    text = separator.join(f"{x:g}" for x in np.round(values, 4))
    return f"[{text}]" if separator == ", " else text
