"""Heat maps of codebooks, confusion matrices and bars, as positions that templates/charts.html writes as SVG."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from w2v2.report.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, show

MOST_ROWS, MOST_COLUMNS = 64, 60  # of a heat map
MOST_CLASSES, MOST_COUNTED = 40, 12  # of a confusion matrix; with counts in its cells
SIDE, LABELS = 360, 90  # of a confusion matrix: the cells together, the names beside them
NAME_LETTERS = 16  # of a name beside a chart
BAR_HEIGHT, BAR_LEFT, BAR_RIGHT = 22, 130, 70
# An entry's share of the frames over an even share, at and above which the next colour begins.
USE_LEVELS = (1 / 8, 1 / 2, 2, 8)
USE_NAMES = ("not used", "under ⅛ of an even share", "⅛ to ½", "½ to 2 times", "2 to 8 times", "8 times and more")


@dataclass
class HeatMap:
    title: str
    subtitle: str
    x_label: str
    description: str
    levels: list[tuple[int, str, str]]  # colour, its name, path of its cells
    x_ticks: list[tuple[float, str]]
    hovers: list[tuple[float, float, str]]
    kind: str = field(default="heat", init=False)


@dataclass
class ConfusionMatrix:
    title: str
    subtitle: str
    description: str
    side: float  # of a cell
    names: list[tuple[float, str, str]]  # position, short name, whole name
    cells: list[tuple[float, float, int, int, str]]  # x, y, colour, count, text for the mouse
    has_counts: bool
    kind: str = field(default="confusion", init=False)


@dataclass
class Bars:
    title: str
    subtitle: str
    description: str
    height: float
    rows: list[tuple[float, float, str, str, str]]  # y, width, short name, whole name, value
    kind: str = field(default="bars", init=False)


def shorten(name: str, most: int = NAME_LETTERS) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def draw_codebook(records: Sequence[Mapping[str, Any]], group: int) -> HeatMap | None:
    """How often each entry of a group was a frame's code, over the hours heard; the last record's commonest on top.

    `records` are those of codebook_use.jsonl. Neighbouring entries share a row where there are many. None without codes.
    """
    used = [record for record in records if len(record["counts"]) > group and sum(record["counts"][group])]
    used = [used[row] for row in sorted(set(np.linspace(0, len(used) - 1, MOST_COLUMNS).astype(int)))] if used else []
    if not used:
        return None
    counts = np.array([record["counts"][group] for record in used], dtype=float)  # (columns, V)
    shares = counts / counts.sum(1, keepdims=True) * counts.shape[1]
    order = np.argsort(-counts[-1], kind="stable")
    rows = np.array_split(order, min(MOST_ROWS, len(order)))
    cells = np.array([shares[:, entries].mean(1) for entries in rows])  # (rows, columns)
    colours = np.where(cells > 0, 1 + np.digitize(cells, USE_LEVELS), 0)
    x = np.linspace(LEFT, WIDTH - RIGHT, len(used) + 1)
    y = np.linspace(TOP, HEIGHT - BOTTOM, len(rows) + 1)
    hours = [show(record["audio_hours"]) for record in used]
    hovers = [
        (round(x[column], 1), round(x[column + 1] - x[column], 1), _describe_use(hours[column], counts[column]))
        for column in range(len(used))
    ]
    ticks = sorted({0, len(used) // 2, len(used) - 1})
    return HeatMap(
        f"Codebook {group + 1}",
        "each row an entry, the commonest on top"
        if len(rows) == len(order)
        else "rows of entries, the commonest on top",
        "hours of audio heard",
        "Heat map of code use. " + " ".join(hover[2].replace("\n", ": ") + "." for hover in (hovers[0], hovers[-1])),
        [(level, name, _join_cells(colours == level, x, y)) for level, name in enumerate(USE_NAMES)],
        [((x[column] + x[column + 1]) / 2, hours[column]) for column in ticks],
        hovers,
    )


def _describe_use(hours: str, counts: np.ndarray) -> str:
    used, most = int((counts > 0).sum()), counts.max() / counts.sum()
    return f"{hours} hours heard\n{used} of {len(counts)} entries used, the commonest in {most:.1%} of the frames"


def _join_cells(mask: np.ndarray, x: np.ndarray, y: np.ndarray) -> str:
    """A path of the cells (rows, columns) in a mask, neighbours in a row as one."""
    parts = []
    for row, line in enumerate(mask):
        edges = np.flatnonzero(np.diff(np.concatenate([[False], line, [False]]).astype(int)))
        for first, end in edges.reshape(-1, 2):
            parts.append(f"M{x[first]:.5g} {y[row]:.5g}H{x[end]:.5g}V{y[row + 1]:.5g}H{x[first]:.5g}z")
    return "".join(parts)


def draw_confusion(counts: Sequence[Sequence[int]], classes: Sequence[str]) -> ConfusionMatrix | None:
    """True classes in rows, predicted in columns, coloured by the share of the row; None for too many classes."""
    if len(classes) > MOST_CLASSES:
        return None
    side, cells = SIDE / len(classes), []
    for row, line in enumerate(counts):
        for column, count in enumerate(line):
            if count:
                share = count / sum(line)
                text = f"{classes[row]} → {classes[column]}: {count:,} of {sum(line):,} ({share:.0%})"
                cells.append((column * side, row * side, 1 + min(int(share * 5), 4), count, text))
    hit = [f"{name}: {line[row]} of {sum(line)}" for row, (name, line) in enumerate(zip(classes, counts, strict=True))]
    return ConfusionMatrix(
        "Confusions",
        "true classes in rows, predicted in columns",
        "Confusion matrix, true classes in rows, predicted in columns. Recognised of each: " + ", ".join(hit) + ".",
        side,
        [((row + 0.5) * side, shorten(name, 13), name) for row, name in enumerate(classes)],
        cells,
        len(classes) <= MOST_COUNTED,
    )


def draw_bars(title: str, items: Sequence[tuple[str, float, str]], subtitle: str = "") -> Bars | None:
    """A bar for each (name, value, text of the value), in this order; None without a value above zero."""
    most = max((value for _, value, _ in items), default=0)
    if most <= 0:
        return None
    room = WIDTH - BAR_LEFT - BAR_RIGHT
    rows = [
        (number * BAR_HEIGHT, max(round(value / most * room, 1), 0.5 if value else 0), shorten(name), name, text)
        for number, (name, value, text) in enumerate(items)
    ]
    described = "; ".join(f"{name}: {text}" for name, _, text in items)
    return Bars(title, subtitle, f"Bars. {described}.", len(items) * BAR_HEIGHT + 4, rows)
