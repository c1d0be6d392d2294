"""Heat maps of codebooks, confusion matrices and bars."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from w2v2.report.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Chart, shorten, show

MOST_ROWS, MOST_COLUMNS = 64, 60  # of a heat map
MOST_CLASSES, MOST_COUNTED = 40, 12  # of a confusion matrix; with counts in its cells
SIDE, LABELS = 360, 90  # of a confusion matrix: the cells together, the names beside them
BAR_HEIGHT, BAR_LEFT, BAR_RIGHT = 22, 130, 70
# An entry's share of the frames over an even share, at and above which the next colour begins.
USE_LEVELS = (1 / 8, 1 / 2, 2, 8)
USE_NAMES = ("not used", "under ⅛ of an even share", "⅛ to ½", "½ to 2 times", "2 to 8 times", "8 times and more")


def draw_codebook(records: Sequence[Mapping[str, Any]], group: int) -> Chart | None:
    """How often each entry of a group was a frame's code, over the hours heard; the last record's commonest on top.

    `records` are those of codebook_use.jsonl. Neighbouring entries share a row where there are many. None without codes.
    """
    used = [record for record in records if len(record["counts"]) > group and sum(record["counts"][group])]
    if not used:
        return None
    used = [used[row] for row in sorted(set(np.linspace(0, len(used) - 1, MOST_COLUMNS).astype(int)))]
    counts = np.array([record["counts"][group] for record in used], dtype=float)  # (columns, V)
    shares = counts / counts.sum(1, keepdims=True) * counts.shape[1]
    order = np.argsort(-counts[-1], kind="stable")
    rows = np.array_split(order, min(MOST_ROWS, len(order)))
    cells = np.array([shares[:, entries].mean(1) for entries in rows])  # (rows, columns)
    colours = np.where(cells > 0, 1 + np.digitize(cells, USE_LEVELS), 0)
    x = np.linspace(LEFT, WIDTH - RIGHT, len(used) + 1)
    y = np.linspace(TOP, HEIGHT - BOTTOM, len(rows) + 1)
    hours, hovers = [show(record["audio_hours"]) for record in used], []
    for hour, line in zip(hours, counts, strict=True):
        most = f"the commonest in {line.max() / line.sum():.1%} of the frames"
        hovers.append([f"{hour} hours heard", f"{(line > 0).sum()} of {len(line)} entries used, {most}"])
    each = "each row an entry" if len(rows) == len(order) else "rows of entries"
    said = " ".join(": ".join(hover) + "." for hover in (hovers[0], hovers[-1]))
    chart = Chart(f"Codebook {group + 1}", f"{each}, the commonest on top", f"Heat map of code use. {said}")
    for level, name in enumerate(USE_NAMES):
        chart.add("path", class_=f"q{level}", d=_join_cells(colours == level, x, y))
        chart.legend.append((f"q{level} edge", name))
    ticks = sorted({0, len(used) // 2, len(used) - 1})
    chart.draw_x_axis([((x[column] + x[column + 1]) / 2, hours[column]) for column in ticks], "hours of audio heard")
    for n, hover in enumerate(hovers):
        chart.draw_hover(x[n], x[n + 1] - x[n], hover)
    return chart


def _join_cells(mask: np.ndarray, x: np.ndarray, y: np.ndarray) -> str:
    """A path of the cells (rows, columns) in a mask, neighbours in a row as one."""
    parts = []
    for row, line in enumerate(mask):
        edges = np.flatnonzero(np.diff(np.concatenate([[False], line, [False]]).astype(int)))
        for first, end in edges.reshape(-1, 2):
            parts.append(f"M{x[first]:.5g} {y[row]:.5g}H{x[end]:.5g}V{y[row + 1]:.5g}H{x[first]:.5g}z")
    return "".join(parts)


def draw_confusion(title: str, counts: Sequence[Sequence[int]], classes: Sequence[str]) -> Chart | None:
    """True classes in rows, predicted in columns, coloured by the share of the row; None for too many classes."""
    if len(classes) > MOST_CLASSES:
        return None
    axes = "true classes in rows, predicted in columns"
    hit = [f"{name}: {line[row]} of {sum(line)}" for row, (name, line) in enumerate(zip(classes, counts, strict=True))]
    said, side = f"Confusion matrix, {axes}. Recognised of each: {', '.join(hit)}.", SIDE / len(classes)
    chart = Chart(title, axes, said, SIDE + LABELS + 4, SIDE + LABELS + 4)
    chart.add("rect", class_="frame", x=LABELS, y=2, width=SIDE, height=SIDE)
    for row, column in zip(*np.nonzero(counts), strict=True):
        count, total = counts[row][column], sum(counts[row])
        cell = chart.group(f"{classes[row]} → {classes[column]}: {count:,} of {total:,} ({count / total:.0%})")
        level, x, y = 1 + min(int(5 * count / total), 4), LABELS + column * side, 2 + row * side
        chart.add("rect", "", cell, class_=f"q{level}", x=x, y=y, width=side, height=side)
        if len(classes) <= MOST_COUNTED:
            classes_, middle = "count on" if level > 2 else "count", dict(x=x + side / 2, y=y + side / 2 + 4)
            chart.add("text", count, cell, class_=classes_, text_anchor="middle", **middle)
    for number, name in enumerate(classes):
        at = (number + 0.5) * side + 3.5
        chart.label(LABELS - 6, at + 2, shorten(name, 13), "end", chart.group(name))
        column = chart.group(name, transform=f"translate({LABELS + at:g} {SIDE + 8}) rotate(-90)")
        chart.label(0, 0, shorten(name, 13), "end", column)
    return chart


def draw_bars(title: str, items: Sequence[tuple[str, float, str]], subtitle: str = "") -> Chart | None:
    """A bar for each (name, value, text of the value), in this order; None without a value above zero."""
    most = max((value for _, value, _ in items), default=0)
    if most <= 0:
        return None
    said = "; ".join(f"{name}: {text}" for name, _, text in items)
    chart = Chart(title, subtitle, f"Bars. {said}.", height=len(items) * BAR_HEIGHT + 4)
    for number, (name, value, text) in enumerate(items):
        y, row = number * BAR_HEIGHT, chart.group(f"{name}: {text}")
        width = max(round(value / most * (WIDTH - BAR_LEFT - BAR_RIGHT), 1), 0.5 if value else 0)
        chart.label(BAR_LEFT - 6, y + 15, shorten(name), "end", row)
        chart.add("rect", "", row, class_="bar", x=BAR_LEFT, y=y + 4, width=width, height=BAR_HEIGHT - 8)
        chart.label(BAR_LEFT + width + 6, y + 15, text, "start", row)
    return chart
