"""Pictures of scores: confusion matrices, scores over layers, scores over hours heard."""

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


def draw_layers(path: Path, curves: Mapping[str, Sequence[float]], measure: str, chance: float | None = None) -> Path:
    """A line for each model: its score at every layer, 0 being what the transformer is fed."""
    figure = _figure((7, 4))
    axes = figure.subplots()
    for name, scores in curves.items():
        style = "--" if "random" in name else "-"
        axes.plot(range(len(scores)), scores, marker="o", markersize=4, label=name, linestyle=style)
    _finish(axes, "layer", measure, chance)
    axes.set_xticks(range(max(len(scores) for scores in curves.values())))
    return _save(figure, path)


def draw_hours(
    path: Path, points: Sequence[tuple[float, float]], measure: str, random: float | None, chance: float | None
) -> Path:
    """The best layer's score over the hours of audio that each checkpoint had heard, beside random weights."""
    figure = _figure((7, 4))
    axes = figure.subplots()
    hours, scores = zip(*sorted(points), strict=True)
    axes.plot(hours, scores, marker="o", label="pretrained")
    if random is not None:
        axes.axhline(random, color="tab:orange", linestyle="--", label="random weights")
    _finish(axes, "hours of audio heard", measure, chance)
    return _save(figure, path)


def _finish(axes, x: str, y: str, chance: float | None) -> None:
    if chance is not None:
        axes.axhline(chance, color="grey", linestyle=":", label="chance")
    axes.set(xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    axes.legend()
