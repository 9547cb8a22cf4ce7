"""Images with predictions beside the ground truth, compressed for the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import transforms as T
from detectron2.structures import Boxes, Instances
from PIL import Image

from ..data.image_io import read_image
from ..data.mapper import training_instances
from ..visualization.detections import draw_detections
from .html import Html, tag
from .image_errors import ImageDetections, ImageErrors

MAX_SIDE = 720  # pixels of a picture in the page
QUALITIES = (82, 70, 58, 45, 30)  # of JPEG, tried until the image is small enough


def compared(
    entry: Mapping[str, Any],
    found: ImageDetections,
    counts: ImageErrors,
    class_names: Sequence[str],
    *,
    threshold: float,
    max_bytes: int,
) -> Html:
    """Draws an image twice, with its detections and with its ground truth.

    Args:
        entry: Detectron2's dataset dict of the image.
        found: its detections.
        counts: its errors.
        class_names: index -> name.
        threshold: detections with lower scores are left out.
        max_bytes: of each of the two JPEG files.

    Raises:
        ImageReadError: the image is missing or damaged.
    """
    image = np.ascontiguousarray(read_image(entry["file_name"], "RGB"))
    hw = image.shape[:2]
    gt = training_instances(entry.get("annotations", []), T.NoOpTransform(), hw)
    name = Path(entry["file_name"]).name
    verdict = f"{counts.found} found, {counts.missed} missed, {counts.false} false"
    shown = int((found.scores >= threshold).sum())
    panels = [
        (
            "predictions",
            shown,
            draw_detections(image, _instances(found, hw), class_names, threshold),
        ),
        ("ground truth", len(gt), draw_detections(image, gt, class_names)),
    ]
    pictures = []
    for title, count, drawn in panels:
        uri, (width, height) = jpeg_uri(drawn, max_bytes)
        alt = f"{name} with {title}: {count} boxes"
        picture = tag("img", src=uri, alt=alt, width=width, height=height, loading="lazy")
        pictures.append(tag("div", picture, tag("p", f"{title}: {count}")))
    caption = tag("figcaption", tag("b", name), f": {verdict}")
    return tag("figure", caption, tag("div", *pictures, class_="pair"), class_="picture")


def jpeg_uri(image_rgb: np.ndarray, max_bytes: int) -> tuple[str, tuple[int, int]]:
    """Encodes an image as a data URI, reducing size and quality until it fits.

    Args:
        image_rgb: (H, W, 3) uint8.
        max_bytes: of the JPEG file; the base64 text is a third longer.

    Returns:
        The URI, and width and height in pixels.
    """
    image = Image.fromarray(image_rgb)
    side = MAX_SIDE
    while True:
        image.thumbnail((side, side), Image.LANCZOS)
        for quality in QUALITIES:
            file = io.BytesIO()
            image.save(file, "JPEG", quality=quality, optimize=True)
            if file.tell() <= max_bytes or (side <= 90 and quality == QUALITIES[-1]):
                text = base64.b64encode(file.getvalue()).decode("ascii")
                return f"data:image/jpeg;base64,{text}", image.size
        side //= 2


def _instances(found: ImageDetections, hw: tuple[int, int]) -> Instances:
    result = Instances(hw)
    result.pred_boxes = Boxes(torch.from_numpy(found.boxes_xyxy).float())
    result.pred_classes = torch.from_numpy(found.labels)
    result.scores = torch.from_numpy(found.scores)
    return result
