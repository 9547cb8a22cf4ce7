"""Comparison of an ONNX file with the detector that it was exported from.

The detections of whole images are compared: those of the file, run by onnxruntime, and those of the
detector in PyTorch with its own preprocessing and postprocessing.

B images, D detections of an image.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from ..modeling.meta_arch import SparseDetector
from .detector import OUTPUTS
from .onnx_file import INPUT, ExportError, require_packages

FORBIDDEN = 1e6  # cost of a pair outside of the tolerance
DYNAMIC_BATCHES = (1, 3)  # batch sizes of a file without a fixed one


@dataclass(frozen=True)
class Tolerance:
    """Allowed difference of two runtimes, which sum in different orders.

    Attributes:
        box: pixels, of each coordinate.
        score: of scores from 0 to 1.
    """

    box: float = 0.1
    score: float = 1e-3

    def __post_init__(self) -> None:
        if not (self.box > 0 and self.score > 0):
            raise ValueError(f"tolerances must be positive, got {self.box} px and {self.score}")


@dataclass(frozen=True)
class ImageDetections:
    """Detections of one image: boxes_xyxy (D, 4) in pixels, scores (D,) descending, labels (D,)."""

    boxes_xyxy: np.ndarray
    scores: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Agreement:
    """Result of the comparison of some images.

    Attributes:
        pictures, detections: numbers of compared images and detections.
        box: largest difference of a coordinate of two paired detections, pixels.
        score: largest difference of their scores.
        problems: a sentence for each image whose detections do not agree.
    """

    pictures: int
    detections: int
    box: float
    score: float
    problems: tuple[str, ...] = ()


def check_onnx(
    path: Path,
    model: SparseDetector,
    pictures: Mapping[str, np.ndarray],
    tolerance: Tolerance | None = None,
) -> Agreement:
    """Runs the file and the detector on images and compares their detections.

    Args:
        path: ONNX file.
        model: the detector that it was exported from, in evaluation mode.
        pictures: name -> (H, W, 3) uint8 RGB, all of the file's size.
        tolerance: None takes the default.

    Raises:
        ExportError: onnxruntime cannot run the file.
        ValueError: there are no images.
    """
    if not pictures:
        raise ValueError("no images to compare on; pass at least one")
    tolerance = tolerance or Tolerance()
    expected = [detect(model, x) for x in pictures.values()]
    found, slots = run_onnx(path, list(pictures.values()))
    problems, boxes, scores = [], [0.0], [0.0]
    for name, ours, theirs in zip(pictures, expected, found, strict=True):
        box, score, problem = compare(ours, theirs, tolerance, slots)
        boxes.append(box)
        scores.append(score)
        if problem:
            problems.append(f"{name}: {problem}")
    return Agreement(
        pictures=len(pictures),
        detections=sum(len(x.scores) for x in expected),
        box=max(boxes),
        score=max(scores),
        problems=tuple(problems),
    )


@torch.no_grad()
def detect(model: SparseDetector, picture: np.ndarray) -> ImageDetections:
    """Returns the detections of the detector in an (H, W, 3) RGB image."""
    image = torch.tensor(picture).permute(2, 0, 1)
    (output,) = model([{"image": image.flip(0) if model.input_format == "BGR" else image}])
    found = output["instances"].to("cpu")
    fields = (found.pred_boxes.tensor, found.scores, found.pred_classes)
    return ImageDetections(*(x.numpy() for x in fields))


def run_onnx(path: Path, pictures: list[np.ndarray]) -> tuple[list[ImageDetections], int]:
    """Returns the detections of the file in each image, and its number of slots.

    Raises:
        ExportError: onnxruntime cannot run the file.
    """
    require_packages()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors; warnings are about constants to be folded
    found, slots = [], 0
    try:
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        batch = session.get_inputs()[0].shape[0]
        for images, count in _batches(pictures, batch if isinstance(batch, int) else None):
            outputs = session.run(list(OUTPUTS), {INPUT: images})
            slots = outputs[1].shape[1]
            for boxes, scores, labels, valid in list(zip(*outputs, strict=True))[:count]:
                found.append(ImageDetections(boxes[valid], scores[valid], labels[valid]))
    except Exception as error:  # the exceptions of onnxruntime have no common base
        raise ExportError(f"onnxruntime cannot run {path}: {error}") from error
    return found, slots


def _batches(pictures: list[np.ndarray], batch: int | None) -> Iterator[tuple[np.ndarray, int]]:
    """Yields (B, 3, H, W) float32 and the number of images in it; the last image is repeated to
    fill a fixed batch."""
    images = np.stack(pictures).transpose(0, 3, 1, 2).astype(np.float32)
    start = turn = 0
    while start < len(images):
        size = batch or DYNAMIC_BATCHES[turn % len(DYNAMIC_BATCHES)]
        part = images[start : start + size]
        missing = batch - len(part) if batch else 0
        yield np.concatenate((part, np.repeat(part[-1:], missing, axis=0))), len(part)
        start, turn = start + size, turn + 1


def compare(
    ours: ImageDetections, theirs: ImageDetections, tolerance: Tolerance, slots: int
) -> tuple[float, float, str | None]:
    """Pairs the detections of two runtimes and computes their differences.

    Both lists are sorted by score, but rounding errors swap nearly equal scores. Detections are
    therefore paired one to one such that as many pairs as possible agree in label, score and box; a
    detection without partner is a disagreement. Detections that a rounding error may remove from a
    list are excepted: those with the score of the last one in a list without free slots, and those
    at the image border that are thinner than the tolerance.

    Args:
        ours, theirs: detections of one image.
        tolerance: for a pair to agree.
        slots: maximum number of detections of an image.

    Returns:
        Largest difference of the boxes in pixels and of the scores among pairs of equal label, and
        a description of the disagreement or None.
    """
    if not np.isfinite(theirs.boxes_xyxy).all() or not np.isfinite(theirs.scores).all():
        return np.inf, np.inf, "boxes or scores are not finite"
    apart = np.abs(ours.boxes_xyxy[:, None] - theirs.boxes_xyxy).max(axis=-1, initial=0)  # (D, D')
    scores = np.abs(ours.scores[:, None] - theirs.scores)
    same = ours.labels[:, None] == theirs.labels
    cost = np.maximum(apart / tolerance.box, scores / tolerance.score)
    agrees = same & (cost <= 1)
    cost = np.minimum(cost, FORBIDDEN / 1e3) + FORBIDDEN * (2.0 - agrees - same)
    left, right = linear_sum_assignment(cost)
    good = agrees[left, right]
    alone = _inexcusable(ours, np.delete(np.arange(len(ours.scores)), left[good]), tolerance, slots)
    extra = _inexcusable(
        theirs, np.delete(np.arange(len(theirs.scores)), right[good]), tolerance, slots
    )
    counted = good if not (alone or extra) else same[left, right]
    box, score = (float(x[left, right][counted].max(initial=0)) for x in (apart, scores))
    if not alone and not extra:
        return box, score, None
    text = f"{len(ours.scores)} detections by PyTorch, {len(theirs.scores)} by onnxruntime; "
    if alone:
        text += f"{len(alone)} of PyTorch's have no equal, such as {_name(ours, alone[0])}"
    else:
        text += f"{len(extra)} of onnxruntime's have no equal, such as {_name(theirs, extra[0])}"
    return box, score, text


def _inexcusable(
    found: ImageDetections, without_partner: np.ndarray, tolerance: Tolerance, slots: int
) -> list[int]:
    size = found.boxes_xyxy[:, 2:] - found.boxes_xyxy[:, :2]
    excused = (size <= 2 * tolerance.box).any(axis=-1)
    if len(found.scores) >= slots:
        excused |= found.scores <= found.scores.min(initial=np.inf) + tolerance.score
    return [int(i) for i in without_partner if not excused[i]]


def _name(found: ImageDetections, i: int) -> str:
    box = ", ".join(f"{x:.2f}" for x in found.boxes_xyxy[i])
    return f"label {found.labels[i]}, score {found.scores[i]:.4f}, box {box}"
