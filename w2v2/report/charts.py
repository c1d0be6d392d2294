"""Charts as inline SVG, whose colours are CSS classes, so that both schemes have their own.

Values that are not finite leave gaps. Every chart has a title and a description for those who cannot see it, and texts
for the mouse. Positions are in the picture's own units, y downwards.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from xml.etree.ElementTree import Element, SubElement, tostring

import numpy as np

from w2v2.errors import hide_secrets

WIDTH, HEIGHT = 400, 236
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 38  # margins around the axes
NUM_COLOURS = 6
MOST_POINTS = 240  # of a line, after thinning
MOST_HOVERS = 40  # texts for the mouse along an axis
Point = tuple[float, float | None]
Scale = Callable[[float], float]  # value → position


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


class Chart:
    """A picture, what its caption says, and its legend: (CSS classes, name) of lines and areas."""

    def __init__(self, title: str, subtitle: str, description: str, width: float = WIDTH, height: float = HEIGHT):
        self.title, self.subtitle, self.legend = title, subtitle, []
        names = {"role": "img", "aria-label": hide_secrets(f"{title}. {description}")}
        self._root = Element("svg", names | {"viewBox": f"0 0 {width:g} {height:g}"})
        self.add("title", title)
        self.add("desc", description)

    def add(self, name: str, text: object = "", parent: Element | None = None, **attributes: Any) -> Element:
        """An element within `parent` (None: the picture). `class_` and `text_anchor` stand for names with a hyphen."""
        values = {
            k.strip("_").replace("_", "-"): f"{v:.6g}" if isinstance(v, float) else str(v)
            for k, v in attributes.items()
        }
        element = SubElement(self._root if parent is None else parent, name, values)
        element.text = hide_secrets(str(text))
        return element

    def label(self, x: float, y: float, text: object, anchor: str = "middle", parent: Element | None = None) -> None:
        self.add("text", text, parent, class_="tick", x=x, y=y, text_anchor=anchor)

    def group(self, hover: str, **attributes: Any) -> Element:
        """A group that shows a text under the mouse."""
        element = self.add("g", **attributes)
        self.add("title", hover, element)
        return element

    def draw_x_axis(self, ticks: Sequence[tuple[float, str]], name: str) -> None:
        for x, text in ticks:
            self.label(x, HEIGHT - BOTTOM + 15, text)
        self.label(WIDTH - RIGHT, HEIGHT - 6, name, "end")

    def draw_hover(self, x: float, width: float, lines: Sequence[str]) -> None:
        """A strip from the bottom to the top of the axes that shows lines of text under the mouse."""
        size = dict(y=TOP, width=width, height=HEIGHT - TOP - BOTTOM)
        self.add("rect", "", self.group("\n".join(lines)), class_="hover", x=x, **size)

    @property
    def svg(self) -> str:
        return tostring(self._root, encoding="unicode")


def show(value: Any) -> str:
    """A number with four digits at most, or as many as a whole number has; a dash for what is not known."""
    if value is None or isinstance(value, str | bool):
        return "–" if value is None else str(value)
    if not math.isfinite(value):
        return "not finite"
    if isinstance(value, int) or abs(value) >= 1_000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if abs(value) >= 1 or value == 0 else f"{value:.3g}"


def shorten(name: str, most: int = 16) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def find_ticks(low: float, high: float, most: int = 5, is_around: bool = False) -> list[float]:
    """Round numbers in [low, high] (`is_around`: and the next beyond), steps of 1, 2 or 5 times a power of ten apart."""
    from matplotlib.ticker import MaxNLocator  # slow to import

    ticks = MaxNLocator(most, steps=[1, 2, 5, 10]).tick_values(low, high)
    step = ticks[1] - ticks[0]
    digits = 1 - math.floor(math.log10(step))
    return [round(float(x), digits) for x in ticks if is_around or low - 1e-6 * step <= x <= high + 1e-6 * step]


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
) -> Chart | None:
    """A chart of these lines over one x axis; None where no point is finite. The band ends where the lines end."""
    found = [one for one in series if any(_is_finite(y) for _, y in one.points)]
    if not found:
        return None
    from matplotlib.transforms import nonsingular  # slow to import; some distance apart even where all are one

    edges = _cut_band(band, max(x for one in found for x, _ in one.points)) if band else []
    points = [(x, y) for one in found for x, y in one.points if _is_finite(y)]
    points += [(x, y) for x, low, high in edges for y in (low, high)]
    (x_low, x_high), y_range = (
        nonsingular(min(values), max(values), expander=0.1, tiny=1e-9) for values in zip(*points, strict=True)
    )
    x_low = 0.0 if 0 < x_low < x_high / 10 else x_low
    y_ticks = find_ticks(*y_range, most=4, is_around=True)
    x_scale = make_scale(x_low, x_high, LEFT, WIDTH - RIGHT)
    y_scale = make_scale(y_ticks[0], y_ticks[-1], HEIGHT - BOTTOM, TOP)

    chart = Chart(title, subtitle, _describe(found, x_label))
    for y in y_ticks:
        chart.add("path", class_="rule", d=f"M{LEFT} {y_scale(y):g}H{WIDTH - RIGHT}")
        chart.label(LEFT - 6, y_scale(y) + 3.5, f"{y:,.6g}", "end")
    chart.add("path", class_="base", d=f"M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}")
    if edges:
        there, back = ([(x, edge[n]) for x, *edge in edges] for n in (1, 0))
        chart.add("path", class_="band", d=_join([(x_scale(x), y_scale(y)) for x, y in there + back[::-1]]) + "Z")
    for number, one in enumerate(found):
        colour = number if one.colour is None else one.colour
        classes = f"line c{colour % NUM_COLOURS}" + " dashed" * (one.is_dashed or colour >= NUM_COLOURS)
        _draw_line(chart, [(x_scale(x), y_scale(y) if _is_finite(y) else None) for x, y in thin(one.points)], classes)
        chart.legend.append((classes, one.name))
    chart.legend += [("band", band.name)] if edges else []
    if len(chart.legend) == 1:
        chart.legend = []  # the title says it
    chart.draw_x_axis([(x_scale(x), show(x)) for x in find_ticks(x_low, x_high)], x_label)
    _draw_hovers(chart, found, x_scale, x_label)
    return chart


def make_scale(low: float, high: float, start: float, end: float) -> Scale:
    """Maps values from `low` to `high` to the positions from `start` to `end`."""
    return lambda value: round(start + (value - low) / (high - low) * (end - start), 1)


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _join(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:g} {y:g}" for x, y in points)


def _draw_line(chart: Chart, points: Sequence[tuple[float, float | None]], classes: str) -> None:
    """A line with its gaps, and dots: all where they are few, else points that no line joins."""
    pieces = [[]]
    for x, y in points:
        pieces[-1].append((x, y)) if y is not None else pieces.append([])
    pieces = [piece for piece in pieces if piece]
    chart.add("path", class_=classes, d="".join(map(_join, pieces)))
    for x, y in (point for piece in pieces for point in piece if len(piece) == 1 or len(points) <= 12):
        chart.add("circle", class_=classes.replace("line", "dot"), cx=x, cy=y, r=2.6)


def _cut_band(band: Band, end: float) -> list[tuple[float, float, float]]:
    """The edges of a band up to `end`, where it is cut between its points; none where it begins later."""
    x, low, high = np.array(band.edges, dtype=float).reshape(-1, 3).T
    if not len(x) or x[0] >= end:
        return []
    last = min(end, x[-1])
    cut = (last, float(np.interp(last, x, low)), float(np.interp(last, x, high)))
    return [*(edge for edge in band.edges if edge[0] < end), cut]


def _draw_hovers(chart: Chart, series: Sequence[Series], x_scale: Scale, x_label: str) -> None:
    """Strips across the axes, each with the last values of all lines in it."""
    count = min(MOST_HOVERS, max(len(one.points) for one in series))
    width = (WIDTH - RIGHT - LEFT) / count
    texts: dict[int, dict[str, tuple[float, str]]] = {}
    for one in series:
        for x, y in one.points:
            texts.setdefault(min(int((x_scale(x) - LEFT) / width), count - 1), {})[one.name] = (x, show(y))
    for strip, found in sorted(texts.items()):
        last = f"{show(max(x for x, _ in found.values()))} {x_label}"
        chart.draw_hover(LEFT + strip * width, width, [last, *(f"{name}: {text}" for name, (_, text) in found.items())])


def _describe(series: Sequence[Series], x_label: str) -> str:
    """The chart in words: each line's first, last and extreme values."""
    parts = []
    for one in series:
        finite = [(x, y) for x, y in one.points if _is_finite(y)]
        (first, start), (last, end), values = finite[0], finite[-1], [y for _, y in finite]
        gaps = f", {len(one.points) - len(finite)} not finite" if len(finite) < len(one.points) else ""
        ends = f"{one.name}: {show(start)} at {show(first)}, {show(end)} at {show(last)}"
        parts.append(f"{ends}; lowest {show(min(values))}, highest {show(max(values))}{gaps}")
    return f"Lines over {x_label}. " + ". ".join(parts) + "."
