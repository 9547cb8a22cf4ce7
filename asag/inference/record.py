"""Detections of many pictures and frames as one JSON file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from detectron2.structures import Instances

from ..files import atomic_writer


@dataclass
class DetectionRecord:
    """Collects detections and writes them with file and class names.

    The entries of `detections` are those of a COCO result file plus `file_name` and
    `category_name`.

    Attributes:
        class_names: index -> name; category ids are these indices.
        images: one entry a picture or frame: id, file_name, width, height, and what `add` was given
            besides.
        detections: one entry an object: image_id, file_name, category_id, category_name, bbox
            (x, y, width, height in pixels of the picture), score.
    """

    class_names: Sequence[str]
    images: list[dict[str, Any]] = field(default_factory=list)
    detections: list[dict[str, Any]] = field(default_factory=list)

    def add(self, file_name: str, size_hw: tuple[int, int], found: Instances, **extra: Any) -> None:
        """Appends one picture or frame.

        Args:
            file_name: as it shall stand in the file.
            size_hw: height and width in pixels.
            found: detections in the same pixels.
            extra: further entries of the image, such as frame numbers.
        """
        image_id = len(self.images)
        height, width = size_hw
        entry = {"id": image_id, "file_name": file_name, "width": width, "height": height}
        self.images.append(entry | extra)
        boxes_xywh = found.pred_boxes.tensor.clone()
        boxes_xywh[:, 2:] -= boxes_xywh[:, :2]
        fields = (boxes_xywh, found.scores, found.pred_classes)
        for box, score, k in zip(*(x.tolist() for x in fields), strict=True):
            self.detections.append(
                {
                    "image_id": image_id,
                    "file_name": file_name,
                    "category_id": k,
                    "category_name": self.name(k),
                    "bbox": box,
                    "score": score,
                }
            )

    def name(self, index: int) -> str:
        """Name of a class."""
        known = index < len(self.class_names)
        return self.class_names[index] if known else f"class {index}"

    def write(self, path: Path) -> None:
        """Writes images, categories and detections; an older file is replaced at once.

        Raises:
            OSError: the file cannot be written.
        """
        content = {
            "images": self.images,
            "categories": [{"id": k, "name": name} for k, name in enumerate(self.class_names)],
            "detections": self.detections,
        }
        with atomic_writer(path) as file:
            json.dump(content, file, indent=1, allow_nan=False)
