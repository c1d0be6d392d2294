"""Pictures: curves of a run, confusion matrices, and lines of a score.

Curves of pretraining go over hours of audio heard, which tell more of a model than updates.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Pictures = Mapping[str, tuple[str, list[tuple[str, list[str]]]]]

# Picture: its title, and its panels as (axis label, measures).
PERPLEXITIES = ["codebook_perplexity", "codebook_perplexity_hard"]
ACCURACIES = ["accuracy", "constant_guess_accuracy"]
KINDS = dict(zip(PERPLEXITIES + ACCURACIES, [" (soft)", " (hard)", "", ", constant guess"], strict=True))
PICTURES: Pictures = {
    "loss": ("Loss", [("contrastive loss", ["contrastive_loss"]), ("diversity loss", ["diversity_loss"])]),
    "accuracy": ("Contrastive accuracy", [("accuracy", ACCURACIES)]),
    "codebook_perplexity": ("Codebook perplexity", [("perplexity", PERPLEXITIES)]),
    "schedule": ("Schedule", [("learning rate", ["learning_rate"]), ("Gumbel temperature", ["gumbel_temperature"])]),
}
FINETUNING_PICTURES: Pictures = {
    "loss": ("Loss", [("loss", ["loss"])]),
    "error_rate": ("Error rates", [("word error rate", ["wer"]), ("character error rate", ["cer"])]),
    "accuracy": ("Accuracy", [("accuracy", ["accuracy"]), ("unweighted average recall", ["uar"])]),
    "schedule": ("Schedule", [("learning rate", ["learning_rate"])]),
}
MOST_NAMES = 40  # classes whose names and counts can still be read


def make_figure(width: float, height: float):
    from matplotlib.figure import Figure  # slow to import; and no global backend is touched

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def draw_plots(
    output_dir: str | os.PathLike,
    metrics: Sequence[Mapping[str, Any]],
    pictures: Pictures = PICTURES,
    over: tuple[str, str] = ("audio_hours", "hours of audio heard"),
) -> list[Path]:
    """Draw the curves into `output_dir/plots`, over a value of the records (`over`: its name and its axis label).

    Training and validation share a picture; the accuracy of pretraining is shown beside what always guessing the
    utterance's commonest codes would earn; what was never logged gets no picture. Returns the pictures' paths.
    """
    drawn = []
    for name, (title, panels) in pictures.items():
        curves = {label: gather_curves(metrics, measures, over[0]) for label, measures in panels}
        if not (curves := {label: found for label, found in curves.items() if found}):
            continue
        figure = make_figure(7, 3.2 * len(curves))
        for axes, (label, found) in zip(figure.subplots(len(curves), squeeze=False)[:, 0], curves.items(), strict=True):
            for curve, (hours, values) in found.items():
                style = dict(marker="o" if len(hours) < 30 else None, linestyle="--" if "guess" in curve else "-")
                axes.plot(hours, values, label=curve, markersize=3, **style)
            axes.set(xlabel=over[1], ylabel=label)
            axes.grid(alpha=0.3)
            axes.legend()
        figure.suptitle(title)
        drawn.append(save_figure(figure, Path(output_dir, "plots", f"{name}.png")))
    return drawn


def gather_curves(metrics: Sequence[Mapping[str, Any]], measures: Sequence[str], over: str) -> dict[str, tuple]:
    """Label to (values of `over`, values), in training and validation; what was null in the file leaves a gap."""
    curves = {}
    metrics = [record for record in metrics if record.get(over) is not None]
    for measure in measures:
        for prefix, where in (("", "training"), ("eval_", "validation")):
            key = prefix + measure
            points = [(record[over], record[key]) for record in metrics if key in record]
            if points:
                hours, values = zip(*points, strict=True)
                curves[where + KINDS.get(measure, "")] = (
                    list(hours),
                    [float("nan") if value is None else value for value in values],
                )
    return curves


def model_config(output_dir: str | os.PathLike) -> dict[str, Any]:
    """The folder's `config.json`; empty where there is none."""
    path = Path(output_dir) / "config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def draw_confusion(path: Path, counts: Sequence[Sequence[int]], labels: Sequence[str]) -> Path:
    """Rows are true labels, coloured by the share of each that was predicted; cells show counts where there is room."""
    counts = np.asarray(counts)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = 3.5 + 0.35 * min(len(labels), MOST_NAMES)
    figure = make_figure(side + 0.8, side)
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, label="share of the true label", shrink=0.8)
    axes.set(xlabel="predicted", ylabel="true")
    if len(labels) <= MOST_NAMES:
        axes.set_xticks(range(len(labels)), labels, rotation=90)
        axes.set_yticks(range(len(labels)), labels)
        for row, column in zip(*np.nonzero(counts), strict=True):
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, counts[row, column], ha="center", va="center", color=color, fontsize=8)
    return save_figure(figure, path)


def draw_scores(
    path: Path,
    curves: Mapping[str, Sequence[tuple[float, float]]],
    labels: tuple[str, str],
    levels: Mapping[str, float],
) -> Path:
    """A line through the points (x, y) of each curve, and dashed levels to compare them with; `labels` are the axes'."""
    figure = make_figure(7, 4)
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
    return save_figure(figure, path)
