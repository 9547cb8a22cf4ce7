"""Line charts as inline SVG with the colors of the page, light or dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .html import Html, note, tag

WIDTH, HEIGHT = 380, 230  # of the drawing, in its own units
LEFT, RIGHT, TOP, BOTTOM = 58, 18, 10, 38  # margins for ticks and labels
COLORS = 8  # classes c0 ... c7 of the style sheet; beyond that, lines are dashed
MAX_POINTS = 240  # of a line; longer ones become means of neighboring points

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """A curve.

    Attributes:
        name: for the legend.
        points: (x, y), x ascending.
    """

    name: str
    points: Points


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    x_label: str,
    log_y: bool = False,
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
    level: int = 3,
) -> Html:
    """Returns a figure with heading, legend and drawing.

    Args:
        title: heading of the figure.
        lines: curves; points that are NaN or infinite are left out, and curves without points.
        x_label: of the horizontal axis.
        log_y: logarithmic vertical axis, if all values are positive.
        x_range, y_range: ends of the axes; default: those of the data.
        level: of the heading, 3 for <h3>.
    """
    lines = [Line(x.name, thinned(_finite(x.points))) for x in lines]
    lines = [x for x in lines if x.points]
    if not lines:
        return tag("figure", tag(f"h{level}", title), note("Nothing was logged."))
    values = [y for line in lines for _, y in line.points]
    log_y = log_y and min(values) > 0
    x_axis = _Axis.fit([x for line in lines for x, _ in line.points], x_range, log=False)
    y_axis = _Axis.fit(values, y_range, log=log_y)
    drawn = [*_grid(x_axis, y_axis, x_label)]
    for index, line in enumerate(lines):
        drawn.append(_curve(line, index, x_axis, y_axis))
    picture = tag(
        "svg", *drawn, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img",
        aria_label=describe(title, lines, x_label),
    )  # fmt: skip
    legend = [tag("li", line.name, class_=_style(index)) for index, line in enumerate(lines)]
    keys = tag("ul", *legend, class_="legend") if len(lines) > 1 else ""
    return tag("figure", tag(f"h{level}", title), keys, picture)


def _finite(points: Points) -> Points:
    return [(x, y) for x, y in points if math.isfinite(y)]


def thinned(points: Points, limit: int = MAX_POINTS) -> Points:
    """Reduces a curve to at most `limit` points by averaging neighbors.

    The last point is kept, because it is the result.
    """
    if len(points) <= limit:
        return points
    *body, last = points
    groups = limit - 1
    found = []
    for group in range(groups):
        part = body[group * len(body) // groups : (group + 1) * len(body) // groups]
        found.append((sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)))
    return [*found, last]


def describe(title: str, lines: Sequence[Line], x_label: str) -> str:
    """Describes the chart in words for screen readers."""
    parts = [
        f"{line.name}: from {line.points[0][1]:.3g} to {line.points[-1][1]:.3g}"
        for line in lines[:COLORS]
    ]
    more = f" and {len(lines) - COLORS} more" if len(lines) > COLORS else ""
    return f"{title} over {x_label}. {'; '.join(parts)}{more}"


@dataclass(frozen=True)
class _Axis:
    """A scale between two values.

    Attributes:
        low, high: ends; exponents of ten when `log`.
        log: logarithmic.
    """

    low: float
    high: float
    log: bool

    @classmethod
    def fit(cls, values: Sequence[float], given: tuple[float, float] | None, *, log: bool) -> _Axis:
        low, high = given or (min(values), max(values))
        if log:
            low, high = math.log10(low), math.log10(high)
        if high - low < 1e-12 * max(1.0, abs(high)):  # a single value
            spread = 0.5 * abs(high) or 0.5
            low, high = low - spread, high + spread
        elif given is None:
            margin = 0.04 * (high - low)
            # A margin must not suggest that losses or rates can be negative.
            low = low - margin if log or low < 0 or low > margin else 0.0
            high += margin
        return cls(low, high, log)

    def share(self, value: float) -> float:
        """Returns the relative position of a value, 0 to 1."""
        return ((math.log10(value) if self.log else value) - self.low) / (self.high - self.low)

    def ticks(self, count: int) -> list[float]:
        """Returns round values within the ends."""
        if self.log:
            decades = range(math.floor(self.low), math.ceil(self.high) + 1)
            for factors in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
                found = [f * 10.0**d for d in decades for f in factors]
                found = [x for x in found if self.low <= math.log10(x) <= self.high]
                if len(found) >= 3:
                    return found[:: -(-len(found) // 8)]
            return _Axis(10**self.low, 10**self.high, False).ticks(count)
        step = _round_step((self.high - self.low) / count)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [i * step for i in range(first, last + 1)]


def _round_step(raw: float) -> float:
    """Rounds up to 1, 2, 2.5 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(raw))
    return next(f * power for f in (1, 2, 2.5, 5, 10) if f * power >= raw * (1 - 1e-9))


def _place(x: float, y: float) -> tuple[float, float]:
    """Converts relative positions on the axes to units of the drawing."""
    return LEFT + x * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - y * (HEIGHT - TOP - BOTTOM)


def _grid(x_axis: _Axis, y_axis: _Axis, x_label: str) -> list[Html]:
    found = []
    for value in y_axis.ticks(5):
        left, y = _place(0, y_axis.share(value))
        found.append(tag("path", d=f"M{left} {y:.1f}H{WIDTH - RIGHT}", class_="grid"))
        found.append(tag("text", _tick(value), x=left - 6, y=f"{y + 4:.1f}", class_="y"))
    for value in x_axis.ticks(5):
        x, bottom = _place(x_axis.share(value), 0)
        found.append(tag("path", d=f"M{x:.1f} {bottom}v4", class_="grid"))
        found.append(tag("text", _tick(value), x=f"{x:.1f}", y=bottom + 18, class_="x"))
    found.append(tag("text", x_label, x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 4, class_="x label"))
    return found


def _tick(value: float) -> str:
    if value and abs(value) < 1e-3:
        mantissa, _, exponent = f"{value:.3g}".partition("e")
        return f"{mantissa}e{int(exponent)}" if exponent else mantissa
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _curve(line: Line, index: int, x_axis: _Axis, y_axis: _Axis) -> Html:
    """Draws the curve, with dots if it has few points, since a single point has no line."""
    places = [_place(x_axis.share(x), y_axis.share(y)) for x, y in line.points]
    corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    parts = [tag("polyline", points=corners)]
    if len(places) <= 20:
        parts += [tag("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=2.6) for x, y in places]
    return tag("g", tag("title", line.name), *parts, class_=_style(index))


def _style(index: int) -> str:
    return f"c{index % COLORS}" + (" dashed" if index >= COLORS else "")
