"""A COCO-format data set as columns: what box detection uses of it, and nothing else.

Letters: I images, A annotations, K classes.

Arrays instead of dicts keep the largest public sets small in memory, and let them be checked and
filtered without a Python loop a box.
"""

import json
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from asag.files import atomic_writer


@dataclass(frozen=True)
class CocoTable:
    """The columns of one COCO file that box detection uses.

    Attributes:
        json_file: the file read.
        image_root: folder the file names are relative to.
        class_names: K names, in the order of rising category id.
        category_ids: K ids, rising.
        image_ids: I ids (integers or strings), unique.
        file_names: I names relative to `image_root`.
        image_hw: (I, 2) int64, pixels; 0 where the file does not say.
        box_image: (A,) int64, row of the image; -1 if that image is not in the file.
        box_class: (A,) int64, index into `class_names`.
        boxes_xywh: (A, 4) float64, absolute pixels, as written (may be degenerate or NaN).
        areas: (A,) float64, square pixels; width * height where the file does not say.
        iscrowd: (A,) bool, regions to ignore.
        annotation_ids: (A,) int64, unique and positive; renumbered from 1 if the file's were not.
        repairs: what differs from the file and would disturb pycocotools; empty if nothing does.
    """

    json_file: Path
    image_root: Path
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    image_ids: list[int | str]
    file_names: list[str]
    image_hw: np.ndarray
    box_image: np.ndarray
    box_class: np.ndarray
    boxes_xywh: np.ndarray
    areas: np.ndarray
    iscrowd: np.ndarray
    annotation_ids: np.ndarray
    repairs: tuple[str, ...]

    def select(self, keep_images: np.ndarray, keep_boxes: np.ndarray, *reasons: str) -> "CocoTable":
        """The table without some images and boxes.

        Args:
            keep_images: (I,) bool; boxes of dropped images go too.
            keep_boxes: (A,) bool.
            reasons: sentences added to `repairs`.
        """
        new_row = np.where(keep_images, np.cumsum(keep_images) - 1, -1)
        # The appended -1 is what boxes without an image (row -1) look up.
        box_image = np.append(new_row, -1)[self.box_image]
        keep = keep_boxes & (box_image >= 0)
        rows = np.flatnonzero(keep_images)
        return replace(
            self,
            image_ids=[self.image_ids[i] for i in rows],
            file_names=[self.file_names[i] for i in rows],
            image_hw=self.image_hw[keep_images],
            box_image=box_image[keep],
            box_class=self.box_class[keep],
            boxes_xywh=self.boxes_xywh[keep],
            areas=self.areas[keep],
            iscrowd=self.iscrowd[keep],
            annotation_ids=self.annotation_ids[keep],
            repairs=self.repairs + reasons,
        )

    def write(self, path: Path) -> None:
        """Write the table as a COCO file, at once (a reader never sees half of it)."""
        images = [
            {"id": i, "file_name": name, "height": h, "width": w}
            for i, name, (h, w) in zip(
                self.image_ids, self.file_names, self.image_hw.tolist(), strict=True
            )
        ]
        columns = zip(
            self.annotation_ids.tolist(),
            self.box_image.tolist(),
            self.box_class.tolist(),
            self.boxes_xywh.tolist(),
            self.areas.tolist(),
            self.iscrowd.tolist(),
            strict=True,
        )
        annotations = [
            {
                "id": i,
                "image_id": self.image_ids[row],
                "category_id": self.category_ids[label],
                "bbox": box,
                "area": area,
                "iscrowd": int(crowd),
            }
            for i, row, label, box, area, crowd in columns
        ]
        categories = [
            {"id": i, "name": name}
            for i, name in zip(self.category_ids, self.class_names, strict=True)
        ]
        info = {"description": f"cleaned copy of {self.json_file.name}", "repairs": self.repairs}
        content = {"info": info, "images": images, "annotations": annotations}
        with atomic_writer(path) as file:
            file.write(json.dumps(content | {"categories": categories}))


def missing_files(image_root: Path, file_names: Sequence[str]) -> np.ndarray:
    """Which files do not exist. Lists each folder once, which is fast on network storage as well.

    Returns:
        (len(file_names),) bool.
    """
    rows_of_folder: dict[str, list[int]] = defaultdict(list)
    for row, name in enumerate(file_names):
        rows_of_folder[os.path.dirname(name)].append(row)
    missing = np.ones(len(file_names), dtype=bool)
    for folder, rows in rows_of_folder.items():
        try:
            present = set(os.listdir(image_root / folder))
        except (OSError, ValueError):  # ValueError: a name no file can have
            continue
        missing[rows] = [os.path.basename(file_names[row]) not in present for row in rows]
    return missing
