"""Drawing of boxes and labels into an image, alone or beside the ground truth.

H, W image size, n drawn objects. Drawing uses Pillow: Detectron2's Visualizer goes through
matplotlib figures, which takes ten times as long and lets labels overlap.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from detectron2.structures import Instances
from PIL import Image, ImageDraw, ImageFont

# Small images are enlarged until the short side has this many pixels, unless the long side would
# exceed its limit.
MIN_SHORT_SIDE = 480
MAX_ENLARGED_LONG_SIDE = 1600

# With more objects, labels shrink, and the name is left out if there is only one class.
CROWD = 20

CAPTION_BACKGROUND = (32, 36, 44)
CAPTION_TEXT = (255, 255, 255)
GAP_PIXELS = 8

RGB = tuple[int, int, int]
Rectangle = tuple[float, float, float, float]


def draw_detections(
    image_rgb: np.ndarray,
    instances: Instances,
    class_names: Sequence[str],
    score_threshold: float = 0.3,
) -> np.ndarray:
    """Draws every object with its box, class name and score.

    A class has the same color in all images. Labels stay inside the image and do not overlap: in a
    crowd they are smaller, objects with the highest scores are labeled first, and the others only
    have boxes.

    Args:
        image_rgb: (H, W, 3) uint8.
        instances: detections (`pred_boxes`, `pred_classes`, `scores`) or ground truth (`gt_boxes`,
            `gt_classes`), on any device. Boxes are absolute xyxy pixels of `instances.image_size`
            and are scaled to the image if that differs.
        class_names: names by index; further indices are drawn as "class 7".
        score_threshold: objects with lower scores are left out; ground truth is always drawn.

    Returns:
        (H', W', 3) uint8 RGB; small images are enlarged to a short side of 480 pixels.

    Raises:
        ValueError: the image is not (H, W, 3) uint8, or the instances have no boxes.
    """
    canvas = _enlarged(image_rgb)
    _draw(canvas, _read_objects(instances, score_threshold, canvas.size), class_names)
    return np.array(canvas)


def draw_comparison(
    image_rgb: np.ndarray,
    predictions: Instances,
    ground_truth: Instances,
    class_names: Sequence[str],
    score_threshold: float = 0.3,
) -> np.ndarray:
    """Draws predictions (left) beside the ground truth (right), with captions and counts.

    Arguments and errors are those of `draw_detections`.

    Returns:
        (H', W', 3) uint8 RGB.
    """
    blank = _enlarged(image_rgb)
    predicted = _read_objects(predictions, score_threshold, blank.size)
    gt = _read_objects(ground_truth, 0.0, blank.size)
    captions = (
        f"predictions: {len(predicted)} (score ≥ {score_threshold:.2f})",
        f"ground truth: {len(gt)}",
    )
    width, height = blank.size
    font = _caption_font(captions, width, _font_size(blank.size))
    bar = round(1.8 * font.size)
    sheet = Image.new("RGB", (2 * width + GAP_PIXELS, height + bar), CAPTION_BACKGROUND)
    pen = ImageDraw.Draw(sheet)
    for column, (caption, objects) in enumerate(zip(captions, (predicted, gt), strict=True)):
        panel, left = blank.copy(), column * (width + GAP_PIXELS)
        _draw(panel, objects, class_names)
        sheet.paste(panel, (left, bar))
        pen.text((left + width / 2, bar / 2), caption, CAPTION_TEXT, font, anchor="mm")
    return np.array(sheet)


@functools.lru_cache(maxsize=4096)
def class_color(index: int) -> RGB:
    """Returns the color of a class, 0 to 255 for each channel.

    Hues follow the golden angle in OKLCH (Ottosson, "A perceptual color space for image
    processing", 2020), so that neighboring indices differ clearly at equal chroma; lightness
    alternates so that similar hues of distant indices differ too.
    """
    lightness, chroma = ((0.74, 0.17), (0.64, 0.19), (0.84, 0.15))[index % 3]
    hue = np.deg2rad(25.0 + 137.508 * index)
    lab = np.array([lightness, chroma * np.cos(hue), chroma * np.sin(hue)])
    to_lms = np.array(
        [
            [1.0, 0.3963377774, 0.2158037573],
            [1.0, -0.1055613458, -0.0638541728],
            [1.0, -0.0894841775, -1.2914855480],
        ]
    )
    to_linear_rgb = np.array(
        [
            [4.0767416621, -3.3077115913, 0.2309699292],
            [-1.2684380046, 2.6097574011, -0.3413193965],
            [-0.0041960863, -0.7034186147, 1.7076147010],
        ]
    )
    linear = np.clip(to_linear_rgb @ (to_lms @ lab) ** 3, 0, 1)
    gamma = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    red, green, blue = (round(255 * float(x)) for x in gamma)
    return red, green, blue


@dataclass(frozen=True)
class _Objects:
    """Objects in the order of importance: highest score first, smallest box without scores.

    Attributes:
        boxes_xyxy: (n, 4) float64, pixels of the canvas, clipped to it.
        classes: (n,) int64.
        scores: (n,) float64, None for ground truth.
    """

    boxes_xyxy: np.ndarray
    classes: np.ndarray
    scores: np.ndarray | None

    def __len__(self) -> int:
        return len(self.classes)

    @property
    def crowded(self) -> bool:
        return len(self) > CROWD

    def labels(self, class_names: Sequence[str]) -> list[str]:
        """Returns name and score of each object; empty if they are redundant."""
        if self.crowded and len(class_names) == 1:
            names = [""] * len(self)
        else:
            names = [
                class_names[k] if 0 <= k < len(class_names) else f"class {k}"
                for k in self.classes.tolist()
            ]
        if self.scores is None:
            return names
        pairs = zip(names, self.scores, strict=True)
        return [f"{name} {score:.2f}".lstrip() for name, score in pairs]


def _read_objects(instances: Instances, threshold: float, canvas_wh: tuple[int, int]) -> _Objects:
    """Reads the objects of `Instances` above the threshold, in pixels of the canvas."""
    kinds = [kind for kind in ("pred", "gt") if instances.has(f"{kind}_boxes")]
    if not kinds:
        fields = ", ".join(instances.get_fields()) or "none"
        raise ValueError(f"instances need pred_boxes or gt_boxes to be drawn; fields: {fields}")
    boxes = instances.get(f"{kinds[0]}_boxes").tensor.detach().cpu().numpy().astype(np.float64)
    classes = instances.get(f"{kinds[0]}_classes").cpu().numpy()
    width, height = canvas_wh
    given_height, given_width = instances.image_size
    boxes = boxes * np.tile([width / given_width, height / given_height], 2)
    keep = np.isfinite(boxes).all(axis=1)
    scores = None
    if instances.has("scores"):
        scores = instances.scores.detach().float().cpu().numpy().astype(np.float64)
        keep &= scores >= threshold
    boxes[:, 0::2] = boxes[:, 0::2].clip(0, width - 1)
    boxes[:, 1::2] = boxes[:, 1::2].clip(0, height - 1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    order = np.argsort(areas if scores is None else -scores, kind="stable")
    order = order[keep[order]]
    return _Objects(boxes[order], classes[order], None if scores is None else scores[order])


def _enlarged(image_rgb: np.ndarray) -> Image.Image:
    """Copies the image, enlarged if it is too small for labels."""
    if image_rgb.ndim != 3 or image_rgb.shape[2] != 3 or image_rgb.dtype != np.uint8:
        raise ValueError(
            "the image must be an (H, W, 3) uint8 array in RGB order, "
            f"got {image_rgb.shape} {image_rgb.dtype}"
        )
    height, width = image_rgb.shape[:2]
    long_side, short_side = max(height, width), min(height, width)
    factor = min(MIN_SHORT_SIDE / short_side, MAX_ENLARGED_LONG_SIDE / long_side)
    image = Image.fromarray(np.ascontiguousarray(image_rgb))
    if factor <= 1:
        return image
    return image.resize((round(width * factor), round(height * factor)), Image.BICUBIC)


def _draw(canvas: Image.Image, objects: _Objects, class_names: Sequence[str]) -> None:
    """Draws boxes from large to small, so that none is hidden, then labels by importance."""
    pen = ImageDraw.Draw(canvas)
    line = max(2, round(min(canvas.size) / 240))
    sides = objects.boxes_xyxy[:, 2:] - objects.boxes_xyxy[:, :2]
    for i in np.argsort(-sides.prod(axis=1), kind="stable"):
        # A thick frame would hide the content of a small box.
        width = max(1, min(line, int(sides[i].min() // 8)))
        pen.rectangle(
            tuple(objects.boxes_xyxy[i]), outline=class_color(int(objects.classes[i])), width=width
        )
    size = _font_size(canvas.size)
    font = _font(max(10, round(0.75 * size)) if objects.crowded else size)
    taken = np.empty((0, 4))
    for i, text in enumerate(objects.labels(class_names)):
        tag_wh = font.getlength(text) + 0.6 * font.size, 1.3 * font.size
        tag = _place(objects.boxes_xyxy[i], tag_wh, canvas.size, taken) if text else None
        if tag is None:
            continue
        taken = np.vstack((taken, tag))
        color = class_color(int(objects.classes[i]))
        pen.rectangle(tag, fill=color)
        center = (tag[0] + tag[2]) / 2, (tag[1] + tag[3]) / 2
        pen.text(center, text, _text_color(color), font, anchor="mm")


def _place(
    box_xyxy: np.ndarray, tag_wh: tuple[float, float], canvas_wh: tuple[int, int], taken: np.ndarray
) -> Rectangle | None:
    """Finds a free position for a label at its box and inside the image; None if there is none.

    Positions outside of the box come first, where the label does not hide the object.

    Args:
        taken: (n, 4) existing labels.
    """
    (x0, y0, x1, y1), (tag_width, tag_height) = box_xyxy, tag_wh
    space_width, space_height = canvas_wh[0] - 1 - tag_width, canvas_wh[1] - 1 - tag_height
    if space_width < 0 or space_height < 0:
        return None
    corners = np.array(
        [
            (x0, y0 - tag_height),
            (x0, y1),
            (x1 - tag_width, y0 - tag_height),
            (x1 - tag_width, y1),
            (x0, y0),
            (x1 - tag_width, y1 - tag_height),
        ]
    )
    # Shifted inside at the left and right margins; at the top and bottom another position is used.
    corners[:, 0] = corners[:, 0].clip(0, space_width)
    corners = corners[(corners[:, 1] >= 0) & (corners[:, 1] <= space_height)]
    if len(corners) == 0:
        corners = np.array([(np.clip(x0, 0, space_width), np.clip(y0, 0, space_height))])
    spots = np.concatenate((corners, corners + tag_wh), axis=1)
    overlaps = (
        (spots[:, None, :2] < taken[None, :, 2:]) & (taken[None, :, :2] < spots[:, None, 2:])
    ).all(axis=-1)  # (candidates, n)
    free = np.flatnonzero(~overlaps.any(axis=1))
    if len(free) == 0:
        return None
    left, top, right, bottom = spots[free[0]].tolist()
    return left, top, right, bottom


def _text_color(background: RGB) -> RGB:
    """Returns black or white, whichever has the higher contrast."""
    luma = np.dot(background, (0.299, 0.587, 0.114))
    return (0, 0, 0) if luma > 140 else (255, 255, 255)


def _font_size(canvas_wh: tuple[int, int]) -> int:
    short_side = min(canvas_wh)
    return round(min(12 + short_side / 160, 64))


@functools.lru_cache(maxsize=64)
def _font(size: int) -> ImageFont.FreeTypeFont:
    """Loads DejaVu Sans (Latin, Greek, Cyrillic), which is part of matplotlib."""
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    # The basic layout is several times as fast and only lacks ligatures.
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


def _caption_font(captions: Sequence[str], width: int, size: int) -> ImageFont.FreeTypeFont:
    """Returns the largest font, up to 1.2 times that of labels, in which every caption fits."""
    size = round(1.2 * size)
    longest = max(_font(size).getlength(caption) for caption in captions)
    return _font(max(6, min(size, int(size * (width - GAP_PIXELS) / longest))))
