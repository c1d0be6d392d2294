"""Pictures of scores: confusion matrices, and curves of a score."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

_MOST_NAMES = 40  # classes whose names and counts can still be read


def _figure(size: tuple[float, float]):
    from matplotlib.figure import Figure  # slow to import; and no global backend is touched

    return Figure(figsize=size, layout="constrained")


def _save(figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def draw_confusion(path: Path, counts: Sequence[Sequence[int]], labels: Sequence[str]) -> Path:
    """Rows are true labels, coloured by the share of each that was predicted; cells show counts where there is room."""
    counts = np.asarray(counts)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = 3.5 + 0.35 * min(len(labels), _MOST_NAMES)
    figure = _figure((side + 0.8, side))
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, label="share of the true label", shrink=0.8)
    axes.set(xlabel="predicted", ylabel="true")
    if len(labels) <= _MOST_NAMES:
        axes.set_xticks(range(len(labels)), labels, rotation=90)
        axes.set_yticks(range(len(labels)), labels)
        for row, column in zip(*np.nonzero(counts), strict=True):
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, counts[row, column], ha="center", va="center", color=color, fontsize=8)
    return _save(figure, path)


def draw_scores(
    path: Path,
    curves: Mapping[str, Sequence[tuple[float, float]]],
    labels: tuple[str, str],
    levels: Mapping[str, float],
) -> Path:
    """A line through the points (x, y) of each curve, and dashed levels to compare them with; `labels` are the axes'."""
    figure = _figure((7, 4))
    axes = figure.subplots()
    for name, points in curves.items():
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name)
    for name, level in levels.items():
        axes.axhline(level, color="tab:orange" if "random" in name else "grey", linestyle="--", label=name)
    is_whole = all(isinstance(x, int) for points in curves.values() for x, _ in points)  # layers have no halves
    axes.locator_params(axis="x", integer=is_whole)
    axes.set(xlabel=labels[0], ylabel=labels[1])
    axes.grid(alpha=0.3)
    axes.legend()
    return _save(figure, path)
