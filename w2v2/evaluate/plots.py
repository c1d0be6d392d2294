"""Curves of a run as pictures. Those of pretraining go over hours of audio heard, which tell more than updates."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
