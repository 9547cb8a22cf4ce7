"""Counts of a data set, corrections, and the checks that it has to pass before training.

Letters: I images, A annotations, K classes.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from asag.checkpoint.class_names import loose_name
from asag.data.coco_table import CocoTable
from asag.data.columns import all_crowd, check_boxes, corrected_columns
from asag.data.errors import DataIssue, DatasetError
from asag.data.image_check import with_checked_images
from asag.data.image_names import printable

SMALL_AREA = 32**2  # COCO's limits between small, medium and large objects, square pixels
MEDIUM_AREA = 96**2
MAX_COORDINATE = 1e9  # pixels; beyond it areas and sums lose their meaning
MIN_SIDE = 1e-4  # pixels; the mapper takes a box that shows less for none
MAX_NAMED = 10  # classes without boxes that are named
MAX_MISSING = 0.5  # more missing files than this share means a wrong folder, not a few losses


@dataclass(frozen=True)
class DataChecks:
    """Checks beside those of the entries of the annotation files.

    Attributes:
        decode_images: decode all pixels of all images; None does so for small sets. Headers are
            always read.
        max_pixels: larger images are an error; None is `asag.data.image_io.MAX_PIXELS`.
        boxes: refuse boxes that look wrong over the whole split (`asag.data.columns`).
    """

    decode_images: bool | None = None
    max_pixels: int | None = None
    boxes: bool = True


@dataclass(frozen=True)
class DatasetReport:
    """Counts of one split, taken before anything is dropped.

    Attributes:
        name: which data set this is.
        images: images named in the file.
        empty_images: images without any box.
        boxes: annotations in the file.
        crowd_boxes: annotations marked `iscrowd`, regions to ignore.
        class_names: K names.
        boxes_per_class: K rows of (small, medium, large) by `area` as in the evaluation, COCO's
            limits of 32^2 and 96^2 square pixels; boxes of no size and crowd regions are not
            counted.
        max_boxes_per_image: boxes in the fullest image; a detector needs at least as many queries.
        mean_boxes_per_image: boxes / images.
        thin_boxes: width or height of 1 pixel or less, including the invalid ones.
        invalid_boxes: width or height not positive, or NaN, infinite or absurd numbers; dropped.
        boxes_beyond_image: partly outside their image by more than a pixel; clipped while loading.
        boxes_outside_image: not inside their image at all; dropped while loading.
        boxes_without_image: annotations of images the file does not list; dropped.
        missing_files: images whose file does not exist; dropped.
        missing_hint: name of the first of these, and the nearest file there is.
        repeated_files: file names listed for more than one image.
        repairs: differences from the source for which the evaluation reads a copy in COCO form.
        notes: what else the reader found worth telling.
    """

    name: str
    images: int
    empty_images: int
    boxes: int
    crowd_boxes: int
    class_names: tuple[str, ...]
    boxes_per_class: tuple[tuple[int, int, int], ...]
    max_boxes_per_image: int
    mean_boxes_per_image: float
    thin_boxes: int
    invalid_boxes: int
    boxes_beyond_image: int
    boxes_outside_image: int
    boxes_without_image: int
    missing_files: int
    repeated_files: int
    repairs: tuple[str, ...]
    missing_hint: str = ""
    notes: tuple[str, ...] = ()

    @property
    def warnings(self) -> list[str]:
        """Sentences about everything that was dropped, repaired or looks odd."""
        hint = f" (first: {self.missing_hint})" if self.missing_hint else ""
        notes = [
            (self.missing_files, f"image file(s) do not exist; these images are dropped{hint}"),
            (self.invalid_boxes, "box(es) without a positive, finite size are dropped"),
            (self.boxes_without_image, "annotation(s) of images not in the file are dropped"),
            (self.boxes_outside_image, "box(es) lie outside their image and are ignored"),
            (self.boxes_beyond_image, "box(es) reach beyond their image and are clipped"),
            (self.thin_boxes - self.invalid_boxes, "box(es) are at most 1 pixel wide or high"),
            (self.repeated_files, "file name(s) stand for more than one image"),
        ]
        sentences = [f"{count} {text}" for count, text in notes if count]
        unused = [
            name
            for name, sizes in zip(self.class_names, self.boxes_per_class, strict=True)
            if not sum(sizes)
        ]
        if unused:
            shown = ", ".join(unused[:MAX_NAMED])
            more = f" and {len(unused) - MAX_NAMED} more" if len(unused) > MAX_NAMED else ""
            sentences.append(
                f"no boxes of class {shown}{more} (an exporter's parent category? delete it "
                "from `categories` of every split if it is not wanted)"
            )
        forms = Counter(loose_name(name) for name in self.class_names)
        alike = [name for name in self.class_names if forms[loose_name(name)] > 1]
        if alike:
            sentences.append(f"classes that differ in spelling only: {', '.join(alike)}")
        sentences += self.notes
        if self.repairs:
            sentences.append(f"evaluation uses a cleaned copy: {'; '.join(self.repairs)}")
        return sentences

    def table(self) -> str:
        """The report as text for a terminal or a log."""
        lines = [
            f"{self.name}: {self.images} images ({self.empty_images} empty), {self.boxes} boxes "
            f"({self.crowd_boxes} crowd), {len(self.class_names)} classes; "
            f"{self.mean_boxes_per_image:.1f} boxes an image, at most {self.max_boxes_per_image}"
        ]
        width = max(len("class"), *(len(name) for name in self.class_names))
        lines.append(f"  {'class':<{width}} {'small':>9} {'medium':>9} {'large':>9} {'all':>9}")
        rows = list(zip(self.class_names, self.boxes_per_class, strict=True))
        if len(rows) > 1:
            totals = np.array(self.boxes_per_class).sum(axis=0).tolist()
            rows.append(("all", totals))
        for name, sizes in rows:
            numbers = " ".join(f"{n:>9}" for n in (*sizes, sum(sizes)))
            lines.append(f"  {name:<{width}} {numbers}")
        lines += [f"  note: {sentence}" for sentence in self.warnings]
        return "\n".join(lines)


def inspect_table(
    table: CocoTable, name: str, checks: DataChecks | None = None
) -> tuple[DatasetReport, CocoTable]:
    """Check a table against its images, and count what is in it.

    Args:
        table: as it was read.
        name: for the report.
        checks: what is checked; None is `DataChecks()`.

    Returns:
        The report, and the table with everything that can be used: sizes filled in, images without
        a file and boxes without a size dropped.

    Raises:
        DatasetError: most image files are missing, an image cannot be opened or has another size
            than its entry says, the boxes cannot be meant, or no box is left.
    """
    checks = checks or DataChecks()
    absent = np.array([not path for path in table.image_files], dtype=bool)
    _check_files(table, absent)
    table = with_checked_images(table, decode=checks.decode_images, max_pixels=checks.max_pixels)
    if checks.boxes:
        check_boxes(table)
    table = corrected_columns(table)

    xy, wh = table.boxes_xywh[:, :2], table.boxes_xywh[:, 2:]
    in_range = (np.abs(table.boxes_xywh) < MAX_COORDINATE).all(axis=1)  # False for NaN
    valid = in_range & (wh >= MIN_SIDE).all(axis=1)
    listed = table.box_image >= 0
    # Boxes of unlisted images look up row -1, the appended size of no limit.
    image_wh = np.vstack([table.image_hw[:, ::-1], [[np.iinfo(np.int64).max] * 2]])[table.box_image]
    with np.errstate(invalid="ignore"):  # infinite boxes are not valid
        visible = np.minimum(xy + wh, image_wh) - np.maximum(xy, 0)
    outside = valid & (visible < MIN_SIDE).any(axis=1)
    beyond = valid & ~outside & ((xy < -1) | (xy + wh > image_wh + 1.0)).any(axis=1)

    boxes_of_image = np.bincount(table.box_image[listed], minlength=len(table.image_ids))
    counted = valid & ~table.iscrowd
    box_areas = np.where(counted, table.areas, 0.0)
    size_class = (box_areas >= SMALL_AREA).astype(np.int64) + (box_areas >= MEDIUM_AREA)
    cells = np.bincount(
        3 * table.box_class[counted] + size_class[counted], minlength=3 * len(table.class_names)
    )

    reasons = []
    if absent.any():
        reasons.append(f"{np.count_nonzero(absent)} images without a file")
    if not (valid & listed).all():
        reasons.append(f"{np.count_nonzero(~(valid & listed))} unusable annotations")
    usable = table.select(~absent, valid, *reasons) if reasons else table
    if (issue := all_crowd(table)) is not None:
        raise DatasetError([issue])
    if not (~usable.iscrowd).any():
        raise DatasetError(
            [
                DataIssue(
                    str(table.source),
                    f"no usable box among {len(table.boxes_xywh)} annotations",
                    "choose the file that holds the boxes; they need a positive width and height",
                )
            ]
        )
    report = DatasetReport(
        name=name,
        images=len(table.image_ids),
        empty_images=int(np.count_nonzero(boxes_of_image == 0)),
        boxes=len(table.boxes_xywh),
        crowd_boxes=int(np.count_nonzero(table.iscrowd)),
        class_names=table.class_names,
        boxes_per_class=tuple(tuple(row) for row in cells.reshape(-1, 3).tolist()),
        max_boxes_per_image=int(boxes_of_image.max(initial=0)),
        mean_boxes_per_image=float(boxes_of_image.mean()),
        thin_boxes=int(np.count_nonzero(~valid | (wh <= 1).any(axis=1))),
        invalid_boxes=int(np.count_nonzero(~valid)),
        boxes_beyond_image=int(np.count_nonzero(beyond)),
        boxes_outside_image=int(np.count_nonzero(outside)),
        boxes_without_image=int(np.count_nonzero(~listed)),
        missing_files=int(np.count_nonzero(absent)),
        repeated_files=sum(count > 1 for count in Counter(table.file_names).values()),
        missing_hint=_first_missing(table, absent),
        repairs=usable.repairs,
        notes=usable.notes,
    )
    return report, usable


def _check_files(table: CocoTable, absent: np.ndarray) -> None:
    if absent.mean() <= MAX_MISSING:
        return
    raise DatasetError(
        [
            DataIssue(
                str(table.source),
                f"{np.count_nonzero(absent)} of {len(absent)} image files are not in "
                f"{table.image_root} (first: {_first_missing(table, absent)})",
                "name the folder that the file names are relative to, or copy the images there",
            )
        ]
    )


def _first_missing(table: CocoTable, absent: np.ndarray) -> str:
    """Name of the first image without a file, and the nearest name there is; "" without one."""
    if not absent.any():
        return ""
    name = printable(table.file_names[int(absent.argmax())])[:200]
    return f"{name}; {table.missing_hint}" if table.missing_hint else name
