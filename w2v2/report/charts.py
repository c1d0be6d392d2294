"""Charts as positions and paths, which templates/charts.html writes as SVG.

Colours are CSS classes, so that both schemes have their own. Values that are not finite leave gaps. Every chart has a
title and a description for those who cannot see it, and texts for the mouse.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

WIDTH, HEIGHT = 400, 236
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 38  # margins around the axes
NUM_COLOURS = 6
MOST_POINTS = 240  # of a line, after thinning
MOST_HOVERS = 40  # texts for the mouse along an axis
Point = tuple[float, float | None]


class Series(NamedTuple):
    """A line: its name, its points by rising x, its colour (default: its place among the lines), whether it is dashed."""

    name: str
    points: Sequence[Point]
    colour: int | None = None
    is_dashed: bool = False


class Band(NamedTuple):
    """What others measured: (x, lowest, highest) by rising x."""

    name: str
    edges: Sequence[tuple[float, float, float]]


@dataclass
class Line:
    name: str
    path: str
    colour: int
    is_dashed: bool
    dots: list[tuple[float, float]]


@dataclass
class LineChart:
    """Positions are in the picture's own units, y downwards; ticks are (position, label)."""

    title: str
    subtitle: str
    x_label: str
    description: str
    lines: list[Line]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    hovers: list[tuple[float, float, str]]  # left edge, width, text
    band: tuple[str, str] | None = None  # name, path
    kind: str = field(default="line", init=False)


def show(value: Any) -> str:
    """A number with four digits at most, or as many as a whole number has; a dash for what is not known."""
    if value is None or isinstance(value, str | bool):
        return "–" if value is None else str(value)
    if not math.isfinite(value):
        return "not finite"
    if isinstance(value, int) or abs(value) >= 1_000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if abs(value) >= 1 or value == 0 else f"{value:.3g}"


def find_ticks(low: float, high: float, most: int = 5, is_around: bool = False) -> list[float]:
    """Round numbers in [low, high] (`is_around`: and the next beyond), steps of 1, 2 or 5 times a power of ten apart.

    There are at most `most` steps inside.
    """
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6)
    if is_around:
        first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
    digits = 1 - math.floor(math.log10(step))
    return [round(n * step, digits) for n in range(first, last + 1)]


def thin(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most so many points: of each stretch the first, the lowest, the highest and a gap, where it has one."""
    if len(points) <= most:
        return list(points)
    kept = {0, len(points) - 1}
    for rows in np.array_split(np.arange(len(points)), max(1, most // 4)):
        finite = [int(row) for row in rows if _is_finite(points[row][1])]
        gaps = [int(row) for row in rows if not _is_finite(points[row][1])][:1]
        extremes = [choose(finite, key=lambda row: points[row][1]) for choose in (min, max) if finite]
        kept.update([int(rows[0]), *extremes, *gaps])
    return [points[row] for row in sorted(kept)]


def draw_lines(
    title: str, series: Sequence[Series], x_label: str, *, subtitle: str = "", band: Band | None = None
) -> LineChart | None:
    """A chart of these lines over one x axis; None where no point is finite."""
    found = [one for one in series if any(_is_finite(y) for _, y in one.points)]
    if not found:
        return None
    band = band and _cut_band(band, max(x for one in found for x, _ in one.points))
    edges = [(x, y) for x, low, high in (band.edges if band else []) for y in (low, high)]
    points = [(x, y) for one in found for x, y in one.points if _is_finite(y)] + edges
    x_range, y_range = (_find_range([point[axis] for point in points]) for axis in (0, 1))
    x_range = (0.0, x_range[1]) if 0 < x_range[0] < x_range[1] / 10 else x_range
    y_ticks = find_ticks(*y_range, most=4, is_around=True)
    x_scale, y_scale = _Scale(*x_range, LEFT, WIDTH - RIGHT), _Scale(y_ticks[0], y_ticks[-1], HEIGHT - BOTTOM, TOP)
    lines = []
    for number, one in enumerate(found):
        path, dots = _draw_path(thin(one.points), x_scale, y_scale)
        colour = number if one.colour is None else one.colour
        lines.append(Line(one.name, path, colour % NUM_COLOURS, one.is_dashed or colour >= NUM_COLOURS, dots))
    return LineChart(
        title,
        subtitle,
        x_label,
        _describe(found, x_label),
        lines,
        [(x_scale(x), show(x)) for x in find_ticks(*x_range)],
        [(y_scale(y), f"{y:,.6g}") for y in y_ticks],
        _find_hovers(found, x_scale, x_label),
        band and (band.name, _draw_band(band, x_scale, y_scale)),
    )


class _Scale(NamedTuple):
    """Values from `low` to `high` at the positions from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 1)


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _find_range(values: Sequence[float]) -> tuple[float, float]:
    """The lowest and the highest value, some distance apart even where all are one."""
    low, high = min(values), max(values)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        margin = abs(low) / 10 or 1.0
        return low - margin, high + margin
    return low, high


def _draw_path(points: Sequence[Point], x_scale: _Scale, y_scale: _Scale) -> tuple[str, list[tuple[float, float]]]:
    """The path of a line with its gaps, and dots: all where they are few, else points that no line joins."""
    parts, alone, pieces = [], [], [[]]
    for x, y in points:
        if _is_finite(y):
            pieces[-1].append((x_scale(x), y_scale(y)))
        else:
            pieces.append([])
    for piece in filter(None, pieces):
        alone += piece if len(piece) == 1 or len(points) <= 12 else []
        parts.append("M" + "L".join(f"{x:g} {y:g}" for x, y in piece))
    return "".join(parts), alone


def _cut_band(band: Band, end: float) -> Band | None:
    """The part of a band up to `end`, where it is cut between its points; None where it begins later."""
    x, low, high = np.array(band.edges, dtype=float).reshape(-1, 3).T
    if not len(x) or x[0] >= end:
        return None
    kept = [edge for edge in band.edges if edge[0] < end]
    last = min(end, x[-1])
    return Band(band.name, [*kept, (last, float(np.interp(last, x, low)), float(np.interp(last, x, high)))])


def _draw_band(band: Band, x_scale: _Scale, y_scale: _Scale) -> str:
    there = [f"{x_scale(x):g} {y_scale(high):g}" for x, _, high in band.edges]
    back = [f"{x_scale(x):g} {y_scale(low):g}" for x, low, _ in reversed(band.edges)]
    return "M" + "L".join(there + back) + "Z"


def _find_hovers(series: Sequence[Series], x_scale: _Scale, x_label: str) -> list[tuple[float, float, str]]:
    """Strips across the axes, each with the last values of all lines in it."""
    count = min(MOST_HOVERS, max(len(one.points) for one in series))
    width = (x_scale.end - x_scale.start) / count
    texts: dict[int, dict[str, tuple[float, str]]] = {}
    for one in series:
        for x, y in one.points:
            strip = min(int((x_scale(x) - x_scale.start) / width), count - 1)
            texts.setdefault(strip, {})[one.name] = (x, show(y) if _is_finite(y) else "not finite")
    strips = []
    for strip, found in sorted(texts.items()):
        x = max(x for x, _ in found.values())
        values = [f"{name}: {text}" for name, (_, text) in found.items()]
        strips.append(
            (round(x_scale.start + strip * width, 1), round(width, 1), "\n".join([f"{show(x)} {x_label}", *values]))
        )
    return strips


def _describe(series: Sequence[Series], x_label: str) -> str:
    """The chart in words: each line's first, last and extreme values."""
    parts = []
    for one in series:
        finite = [(x, y) for x, y in one.points if _is_finite(y)]
        low, high = min(y for _, y in finite), max(y for _, y in finite)
        (first, start), (last, end) = finite[0], finite[-1]
        gaps = f", {len(one.points) - len(finite)} not finite" if len(finite) < len(one.points) else ""
        parts.append(
            f"{one.name}: {show(start)} at {show(first)}, {show(end)} at {show(last)}; "
            f"lowest {show(low)}, highest {show(high)}{gaps}"
        )
    return f"Lines over {x_label}. " + ". ".join(parts) + "."
