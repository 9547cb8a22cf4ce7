"""One split of a data set as columns: the form into which every format is read.

Letters: I images, A annotations, K classes.

Arrays instead of dicts keep the largest public sets small in memory, and allow checks and filters
without a Python loop over the boxes.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from asag.files import atomic_writer


@dataclass(frozen=True)
class CocoTable:
    """The columns of one split that box detection uses.

    Attributes:
        source: the file or folder that was read.
        image_root: folder the file names are relative to.
        class_names: K names, in the order of rising category id.
        category_ids: K ids: whole numbers rising, then text.
        image_ids: I ids (integers or text), unique.
        file_names: I names as the user wrote them, relative to `image_root`.
        image_files: I paths of the images; "" where no file fits the name.
        image_hw: (I, 2) int64, pixels; 0 where the source does not say.
        box_image: (A,) int64, row of the image; -1 if that image is not listed.
        box_class: (A,) int64, index into `class_names`.
        boxes_xywh: (A, 4) float64, absolute pixels, as written (may be degenerate or NaN).
        areas: (A,) float64, square pixels; width * height where the source does not say.
        iscrowd: (A,) bool, regions to ignore.
        difficult: (A,) bool, Pascal VOC's mark: trained on, ignored by evaluations.
        annotation_ids: (A,) int64, unique and positive; renumbered from 1 if the source's were not.
        repairs: differences from the source for which evaluations need a copy in COCO form; empty
            if `source` is a COCO file that can be evaluated as it is.
        notes: further sentences for the report.
        evaluator_type: "coco" or "pascal_voc", for Detectron2's metadata.
        classes_declared: False if the classes are those that the annotations happen to use.
        missing_hint: about the first image without a file: the nearest name there is.
    """

    source: Path
    image_root: Path
    class_names: tuple[str, ...]
    category_ids: tuple[int | str, ...]
    image_ids: list[int | str]
    file_names: list[str]
    image_files: list[str]
    image_hw: np.ndarray
    box_image: np.ndarray
    box_class: np.ndarray
    boxes_xywh: np.ndarray
    areas: np.ndarray
    iscrowd: np.ndarray
    difficult: np.ndarray
    annotation_ids: np.ndarray
    repairs: tuple[str, ...]
    notes: tuple[str, ...] = ()
    evaluator_type: str = "coco"
    classes_declared: bool = True
    missing_hint: str = ""

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
            image_files=[self.image_files[i] for i in rows],
            image_hw=self.image_hw[keep_images],
            box_image=box_image[keep],
            box_class=self.box_class[keep],
            boxes_xywh=self.boxes_xywh[keep],
            areas=self.areas[keep],
            iscrowd=self.iscrowd[keep],
            difficult=self.difficult[keep],
            annotation_ids=self.annotation_ids[keep],
            repairs=self.repairs + reasons,
        )

    def write(self, path: Path) -> None:
        """Write the table as a COCO file, at once (a reader never sees half of it).

        File names and ids are the user's own.
        """
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
        for row in np.flatnonzero(self.difficult):
            annotations[row]["difficult"] = 1
        categories = [
            {"id": i, "name": name}
            for i, name in zip(self.category_ids, self.class_names, strict=True)
        ]
        info = {
            "description": f"copy of {self.source.name} for evaluations",
            "repairs": self.repairs,
            "evaluator_type": self.evaluator_type,
        }
        content = {"info": info, "images": images, "annotations": annotations}
        with atomic_writer(path) as file:
            file.write(json.dumps(content | {"categories": categories}))
