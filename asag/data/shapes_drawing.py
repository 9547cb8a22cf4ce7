"""Drawing of the generated scenes, with numpy alone: no drawing library's version matters."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np


def _polygon(corners: int) -> Callable[[np.ndarray], np.ndarray]:
    sector = 2 * np.pi / corners

    def radius(angle: np.ndarray) -> np.ndarray:
        return np.cos(sector / 2) / np.cos(np.mod(angle, sector) - sector / 2)

    return radius


def _star(angle: np.ndarray) -> np.ndarray:
    half, inner = np.pi / 5, 0.42
    folded = np.abs(np.mod(angle + half, 2 * half) - half)  # 0 at a tip, `half` in a notch
    # The straight edge from the tip (1, 0) to the notch at (inner, half), in polar form.
    return (
        inner
        * np.sin(half)
        / (np.sin(folded) * (1 - inner * np.cos(half)) + inner * np.sin(half) * np.cos(folded))
    )


# Outer radius of each shape around its center, as a function of the angle; 1 at the farthest point.
OUTLINES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "circle": np.ones_like,
    "square": _polygon(4),
    "triangle": _polygon(3),
    "star": _star,
    "ring": np.ones_like,
}
RING_HOLE = 0.55  # inner radius of a ring
# A side of the square and a tip of the others at the top, give or take MAX_ROTATION (radians), so
# that a small network learns in minutes what a square is.
UPRIGHT = {"square": np.pi / 4}
MAX_ROTATION = 0.35
MAX_STRETCH = 0.15  # largest log ratio of the two axes, halved


@dataclass
class Scene:
    """One generated image.

    Attributes:
        pixels: (H, W, 3) uint8 RGB.
        boxes_xywh: tight boxes of the full shapes within the image, whole pixels.
        labels: class index of each box.
        iscrowd: True for a region to ignore.
    """

    pixels: np.ndarray
    boxes_xywh: list[tuple[int, int, int, int]]
    labels: list[int]
    iscrowd: list[bool]


@dataclass
class _Object:
    """One shape: how far it covers each pixel (`cover`, 0 to 1) of the window (`rows`, `cols`).

    `in_heap` marks a member of a region to ignore, which is annotated as a whole.
    """

    label: int
    rows: slice
    cols: slice
    cover: np.ndarray
    in_heap: bool = False

    def box_xywh(self) -> tuple[int, int, int, int]:
        inside = self.cover > 0.5
        ys, xs = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
        x, y = self.cols.start + int(xs[0]), self.rows.start + int(ys[0])
        return x, y, int(xs[-1] - xs[0]) + 1, int(ys[-1] - ys[0]) + 1


def draw_scene(
    rng: np.random.Generator,
    *,
    height: int,
    width: int,
    class_names: tuple[str, ...],
    objects: tuple[int, int],
    sizes: tuple[float, float],
    min_visible: float,
    heaps: int,
    ignore_region: bool,
) -> Scene:
    """Draw one image; see `shapes.ShapesSpec` for the values."""
    pixels = _background(rng, height, width)
    count = int(rng.integers(objects[0], objects[1] + 1))
    centers = _centers(rng, count, height, width, heaps)
    diameters = np.exp(rng.uniform(*np.log(sizes), size=count)) * min(height, width)

    tiny = _tiny_heap(rng, height, width, class_names) if ignore_region and count else []
    front_to_back = tiny + [
        _shape(rng, class_names, center, diameter, height, width)
        for center, diameter in zip(centers, diameters, strict=True)
    ]
    kept = _visible_enough(front_to_back, min_visible, height, width)
    for thing in reversed(kept):
        _paint(rng, pixels, thing)
    pixels += rng.normal(0.0, rng.uniform(1.0, 5.0), size=(height, width, 1))

    single = [thing for thing in kept if not thing.in_heap]
    boxes, labels = [thing.box_xywh() for thing in single], [thing.label for thing in single]
    heap = [thing for thing in kept if thing.in_heap]
    if heap:
        boxes.append(_hull([thing.box_xywh() for thing in heap]))
        labels.append(heap[0].label)
    return Scene(
        pixels=np.clip(pixels, 0, 255).astype(np.uint8),
        boxes_xywh=boxes,
        labels=labels,
        iscrowd=[False] * len(single) + [True] * bool(heap),
    )


def _smooth_noise(rng: np.random.Generator, cells: int, height: int, width: int) -> np.ndarray:
    """(H, W, 3) noise in [-1, 1], linear between a coarse grid of random colors."""
    grid = rng.uniform(-1.0, 1.0, size=(cells + 1, cells + 1, 3))
    y, x = np.linspace(0, cells, height), np.linspace(0, cells, width)
    y0, x0 = np.minimum(y.astype(int), cells - 1), np.minimum(x.astype(int), cells - 1)
    fy, fx = (y - y0)[:, None, None], (x - x0)[None, :, None]
    rows = grid[y0] * (1 - fy) + grid[y0 + 1] * fy
    return rows[:, x0] * (1 - fx) + rows[:, x0 + 1] * fx


def _background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """(H, W, 3) float: blotches of two scales and a faint grating, around a random color."""
    pixels = rng.uniform(50, 205, size=3) + 35 * _smooth_noise(rng, 3, height, width)
    pixels += rng.uniform(5, 25) * _smooth_noise(rng, int(rng.integers(8, 24)), height, width)
    angle, period = rng.uniform(0, np.pi), rng.uniform(5, 30)
    ys, xs = np.mgrid[:height, :width]
    phase = (xs * np.cos(angle) + ys * np.sin(angle)) * (2 * np.pi / period)
    return pixels + rng.uniform(0, 12) * np.sin(phase)[..., None]


def _centers(
    rng: np.random.Generator, count: int, height: int, width: int, heaps: int
) -> np.ndarray:
    """(count, 2) x, y within the image."""
    extent = np.array([width, height], dtype=np.float64)
    centers = rng.uniform(0.04, 0.96, size=(count, 2)) * extent
    if heaps:
        middles = rng.uniform(0.2, 0.8, size=(int(rng.integers(1, heaps + 1)), 2)) * extent
        chosen = rng.integers(0, len(middles), size=count)
        centers = middles[chosen] + rng.normal(size=(count, 2)) * 0.16 * extent
    return np.clip(centers, 0.03 * extent, 0.97 * extent)


def _shape(
    rng: np.random.Generator,
    class_names: tuple[str, ...],
    center: np.ndarray,
    diameter: float,
    height: int,
    width: int,
) -> _Object:
    label = int(rng.integers(len(class_names)))
    name = class_names[label]
    rotation = UPRIGHT.get(name, np.pi / 2) + rng.uniform(-MAX_ROTATION, MAX_ROTATION)
    stretch = np.exp(rng.uniform(-MAX_STRETCH, MAX_STRETCH))
    tilt = rng.uniform(0, np.pi)
    radius = max(diameter / 2, 3.0)
    reach = int(np.ceil(radius * 1.3)) + 1
    x, y = int(center[0]), int(center[1])
    rows = slice(max(0, y - reach), min(height, y + reach + 1))
    cols = slice(max(0, x - reach), min(width, x + reach + 1))
    dy = np.arange(rows.start, rows.stop)[:, None] - center[1]
    dx = np.arange(cols.start, cols.stop)[None, :] - center[0]
    # Stretch along a tilted axis, then look up the outline in polar coordinates.
    u = (dx * np.cos(tilt) + dy * np.sin(tilt)) / stretch
    v = (dy * np.cos(tilt) - dx * np.sin(tilt)) * stretch
    distance, angle = np.hypot(u, v), np.arctan2(v, u) + tilt + rotation
    cover = np.clip(OUTLINES[name](angle) * radius - distance + 0.5, 0, 1)
    if name == "ring":
        cover = np.minimum(cover, np.clip(distance - RING_HOLE * radius + 0.5, 0, 1))
    return _Object(label, rows, cols, cover)


def _visible_enough(
    front_to_back: list[_Object], min_visible: float, height: int, width: int
) -> list[_Object]:
    """The objects whose uncovered share is large enough, none of the others being drawn."""
    taken = np.zeros((height, width), dtype=bool)
    kept = []
    for thing in front_to_back:
        inside = thing.cover > 0.5
        window = taken[thing.rows, thing.cols]
        visible = np.count_nonzero(inside & ~window)
        if visible >= max(8, min_visible * np.count_nonzero(inside)):
            window |= inside
            kept.append(thing)
    return kept


def _paint(rng: np.random.Generator, pixels: np.ndarray, thing: _Object) -> None:
    """Blend an object in: a color apart from the ground below, some shading, an edge line."""
    window = pixels[thing.rows, thing.cols]
    ground = window.mean(axis=(0, 1))
    colors = rng.uniform(0, 255, size=(8, 3))
    color = colors[np.abs(colors - ground).sum(axis=1) > 120][:1]
    color = color[0] if len(color) else 255 - ground
    ys, xs = np.mgrid[: window.shape[0], : window.shape[1]]
    angle, period = rng.uniform(0, np.pi), rng.uniform(4, 20)
    along = xs * np.cos(angle) + ys * np.sin(angle)
    shade = rng.uniform(0, 30) * np.sin(along * (2 * np.pi / period))
    shade = shade + rng.uniform(-40, 40) * (along / max(along.max(), 1.0) - 0.5)
    rim = (thing.cover > 0) & (thing.cover < 1)
    fill = color + shade[..., None] - rng.uniform(0, 70) * rim[..., None]
    window += thing.cover[..., None] * (fill - window)


def _tiny_heap(
    rng: np.random.Generator, height: int, width: int, class_names: tuple[str, ...]
) -> list[_Object]:
    """A dense group of shapes too small to be annotated one by one."""
    extent = np.array([width, height], dtype=np.float64)
    middle = rng.uniform(0.15, 0.85, size=2) * extent
    centers = middle + rng.uniform(-12, 12, size=(int(rng.integers(12, 25)), 2))
    centers = np.clip(centers, 4, extent - 5)
    tiny = [_shape(rng, class_names, center, 6.0, height, width) for center in centers]
    return [replace(thing, in_heap=True) for thing in tiny]


def _hull(boxes: list[tuple[int, int, int, int]]) -> tuple[int, int, int, int]:
    x1, y1 = min(b[0] for b in boxes), min(b[1] for b in boxes)
    x2, y2 = max(b[0] + b[2] for b in boxes), max(b[1] + b[3] for b in boxes)
    return x1, y1, x2 - x1, y2 - y1
