"""What is in a data set, what was repaired, and whether it can be trained on.

Letters: I images, A annotations, K classes.
"""

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np

from asag.data.coco_table import CocoTable, missing_files
from asag.data.errors import DataIssue, DatasetError
from asag.data.image_io import ImageReadError, open_image

SMALL_AREA = 32**2  # COCO's limits between small, medium and large objects, square pixels
MEDIUM_AREA = 96**2
MAX_COORDINATE = 1e9  # pixels; beyond it areas and sums lose their meaning
MIN_SIDE = 1e-4  # pixels; the mapper takes a box that shows less for none
MAX_MISSING = 0.5  # more missing files than this share means a wrong folder, not a few losses


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
        boxes_per_class: K rows of (small, medium, large), COCO's limits of 32^2 and 96^2 square
            pixels; boxes of no size and crowd regions are not counted.
        max_boxes_per_image: boxes in the fullest image; a detector needs at least as many queries.
        mean_boxes_per_image: boxes / images.
        thin_boxes: width or height of 1 pixel or less, including the invalid ones.
        invalid_boxes: width or height not positive, or NaN, infinite or absurd numbers; dropped.
        boxes_beyond_image: partly outside their image by more than a pixel; clipped while loading.
        boxes_outside_image: not inside their image at all; dropped while loading.
        boxes_without_image: annotations of images the file does not list; dropped.
        missing_files: images whose file does not exist; dropped.
        repeated_files: file names listed for more than one image.
        repairs: what differs from the file so that evaluation reads a cleaned copy.
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

    @property
    def warnings(self) -> list[str]:
        """Sentences about everything that was dropped, repaired or looks odd."""
        notes = [
            (self.missing_files, "image file(s) do not exist; these images are dropped"),
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
            sentences.append(
                f"no boxes of class {', '.join(unused)} (an exporter's parent category? delete it "
                "from `categories` of every split if it is not wanted)"
            )
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


def inspect_table(table: CocoTable, name: str) -> tuple[DatasetReport, CocoTable]:
    """Count what a table holds and drop what cannot be used.

    Image sizes that the file does not state are read from the images.

    Args:
        table: as read from the file.
        name: of the data set, for the report.

    Returns:
        The report, and the table without missing images, invalid boxes and boxes of no image.

    Raises:
        DatasetError: most image files are missing, an image needed for its size cannot be read, or
            no usable box is left.
    """
    absent = missing_files(table.image_root, table.file_names)
    _check_files(table, absent)
    table = _with_sizes(table, ~absent)

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
    box_areas = np.where(counted, wh[:, 0] * wh[:, 1], 0.0)
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
    if not (~usable.iscrowd).any():
        raise DatasetError(
            [
                DataIssue(
                    str(table.json_file),
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
        repairs=usable.repairs,
    )
    return report, usable


def _check_files(table: CocoTable, absent: np.ndarray) -> None:
    if absent.mean() <= MAX_MISSING:
        return
    first = table.file_names[int(absent.argmax())]
    raise DatasetError(
        [
            DataIssue(
                str(table.json_file),
                f"{np.count_nonzero(absent)} of {len(absent)} image files are not in "
                f"{table.image_root} (first: {first})",
                "name the folder that the file names are relative to, or copy the images there",
            )
        ]
    )


def _with_sizes(table: CocoTable, present: np.ndarray) -> CocoTable:
    """Fill in the sizes that the file leaves out, from the images (EXIF orientation applied)."""
    sizes = table.image_hw.copy()
    issues = []
    for row in np.flatnonzero(present & (sizes == 0).any(axis=1)):
        path = table.image_root / table.file_names[row]
        try:
            sizes[row] = open_image(str(path)).size[::-1]
        except ImageReadError as error:
            remedy = "replace the image, or take its entry out of the file"
            issues.append(DataIssue(str(path), str(error), remedy))
    if issues:
        raise DatasetError(issues)
    # Images without a file keep 0 and are dropped with it.
    return replace(table, image_hw=sizes)
