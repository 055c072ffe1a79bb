"""Draw charts as SVG text. The CSS of the page sets their colours."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

WIDTH, HEIGHT = 440, 180
LEFT, RIGHT, TOP, BOTTOM = 58, 10, 10, 24
"""Margins around the lines or bars of a chart, in which the labels are."""

POINTS_MAX = 400
"""Maximum number of points to draw of a line. If a line has more, neighbours are averaged."""

BAR_WIDTH_MAX = 36

TICKS = 4
"""Approximate number of grid lines, which are at round numbers."""


@dataclass(frozen=True, slots=True)
class Point:
    """Value in a chart, with the text of its tooltip."""

    x: float
    y: float
    label: str
    style: str = ""
    """CSS class; empty for the default class of the chart."""


Spell = Callable[[float], str]
"""Function that formats a value for a label."""


def _whole(value: float) -> str:
    return f"{value:,.0f}"


def line(points: Sequence[Point], *, spell: Spell) -> str:
    """Draw a line through the points in their order, with a gap where `x` decreases."""
    shown = thinned(_finite(points))
    if not shown:
        return ""
    frame = _frame(shown, zero=False)
    pieces = [[frame.spelled(shown[0])]]
    for before, point in pairwise(shown):
        if point.x < before.x:
            pieces.append([])
        pieces[-1].append(frame.spelled(point))
    lines = [f'<polyline class="line" points="{" ".join(piece)}"/>' for piece in pieces]
    # Invisible circles show the tooltips. They are wide enough for a finger.
    touched = [_dot(frame, point, 7, "touch") for point in shown]
    return frame.around([*lines, *touched], spell, _whole)


def bars(points: Sequence[Point], *, spell: Spell, spell_x: Spell = _whole) -> str:
    """Draw one bar per point, from zero, side by side. The `x` of points is only for the labels."""
    shown = _finite(points)
    if not shown:
        return ""
    frame = _frame(shown, zero=True)
    width = min((WIDTH - LEFT - RIGHT) / len(shown), BAR_WIDTH_MAX)
    drawn = []
    for index, point in enumerate(shown):
        top, bottom = frame.y(point.y), frame.y(0.0)
        left, gap = LEFT + index * width, min(2.0, width / 4)
        drawn.append(
            f'<rect class="bar {point.style}" x="{left + gap / 2:.1f}" y="{top:.1f}" '
            f'width="{max(width - gap, 0.5):.1f}" height="{max(bottom - top, 0.5):.1f}" rx="1.5">'
            f"<title>{escape(point.label)}</title></rect>"
        )
    stop = LEFT + width * len(shown)
    labels = [_label(LEFT, "start", spell_x(shown[0].x))]
    if stop - LEFT > WIDTH / 3:
        labels.append(_label(stop, "end", spell_x(shown[-1].x)))
    return _svg([*frame.rows(spell), *drawn, *labels])


def dots(points: Sequence[Point], *, behind: Sequence[Point], spell: Spell, spell_x: Spell) -> str:
    """Draw one dot per point, over a line through the points of `behind`."""
    shown, under = _finite(points), thinned(_finite(behind))
    if not shown and not under:
        return ""
    frame = _frame([*shown, *under], zero=False)
    path = " ".join(map(frame.spelled, under))
    drawn = [f'<polyline class="line quiet" points="{path}"/>'] if under else []
    drawn += [_dot(frame, point, 4.5, point.style or "good") for point in shown]
    return frame.around(drawn, spell, spell_x)


def thinned(points: Sequence[Point]) -> list[Point]:
    """Return at most `POINTS_MAX` points, each with the middle `x` and mean `y` of neighbours."""
    size = max(math.ceil(len(points) / POINTS_MAX), 1)
    means = []
    for start in range(0, len(points), size):
        group = points[start : start + size]
        middle = group[len(group) // 2]
        mean = sum(point.y for point in group) / len(group)
        means.append(Point(middle.x, mean, middle.label, middle.style))
    return means


@dataclass(frozen=True, slots=True)
class _Frame:
    """Range of the values in a chart, for converting them to coordinates."""

    low: tuple[float, float]
    """Minimum of x and of y."""

    high: tuple[float, float]
    """Maximum of x and of y."""

    step: float
    """Distance along y between two grid lines. The first is at `low`, the last at `high`."""

    def x(self, value: float) -> float:
        share = (value - self.low[0]) / (self.high[0] - self.low[0])
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        share = (value - self.low[1]) / (self.high[1] - self.low[1])
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    def spelled(self, point: Point) -> str:
        return f"{self.x(point.x):.1f},{self.y(point.y):.1f}"

    def rows(self, spell: Spell) -> list[str]:
        """Return the grid lines and their labels, as SVG elements."""
        drawn = []
        for tick in range(round((self.high[1] - self.low[1]) / self.step) + 1):
            value = self.low[1] + self.step * tick
            y = self.y(value)
            drawn.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
            drawn.append(
                f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">'
                f"{escape(spell(value))}</text>"
            )
        return drawn

    def around(self, drawn: Sequence[str], spell: Spell, spell_x: Spell) -> str:
        """Return the chart as SVG: the grid, the elements `drawn`, labels at both ends of x."""
        ends = ((self.low[0], "start"), (self.high[0], "end"))
        labels = [_label(self.x(value), anchor, spell_x(value)) for value, anchor in ends]
        return _svg([*self.rows(spell), *drawn, *labels])


def _label(x: float, anchor: str, text: str) -> str:
    attributes = f'x="{x:.1f}" y="{HEIGHT - 6}" text-anchor="{anchor}"'
    return f'<text class="tick" {attributes}>{escape(text)}</text>'


def _round_step(extent: float) -> float:
    """Return a round distance between grid lines that divides `extent` into about `TICKS` parts.

    >>> _round_step(60.0), _round_step(0.45), _round_step(1300.0)
    (20.0, 0.1, 500.0)
    """
    power = 10.0 ** math.floor(math.log10(extent / TICKS))
    steps = [float(f"{factor * power:.9g}") for factor in (1, 2, 5, 10)]
    return min(steps, key=lambda step: abs(extent / step - TICKS))


def _frame(points: Sequence[Point], *, zero: bool) -> _Frame:
    left, right = _range([point.x for point in points])
    low, high = _range([*(point.y for point in points), *([0.0] if zero else [])])
    step = _round_step(high - low)
    low, high = math.floor(low / step) * step, math.ceil(high / step - 1e-9) * step
    return _Frame((left, low), (right, high), step)


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Return minimum and maximum. If they are almost equal, return a larger maximum."""
    low, high = min(values), max(values)
    room = max(abs(low), abs(high)) * 1e-6 or 1.0
    return (low, high) if high - low >= room else (low, low + room)


def _dot(frame: _Frame, point: Point, radius: float, style: str) -> str:
    return (
        f'<circle class="{style}" cx="{frame.x(point.x):.1f}" cy="{frame.y(point.y):.1f}" '
        f'r="{radius}"><title>{escape(point.label)}</title></circle>'
    )


def _finite(points: Sequence[Point]) -> list[Point]:
    return [point for point in points if math.isfinite(point.x) and math.isfinite(point.y)]


def _svg(drawn: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(drawn)}</svg>'
