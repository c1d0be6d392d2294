"""Curves of a run. Those of pretraining go over hours of audio heard, which tell more of a model than updates."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Pictures = Mapping[str, tuple[str, list[tuple[str, list[str]]]]]

# Picture: its title, and its panels as (axis label, measures).
PICTURES: Pictures = {
    "loss": ("Loss", [("contrastive loss", ["contrastive_loss"]), ("diversity loss", ["diversity_loss"])]),
    "accuracy": ("Contrastive accuracy", [("accuracy", ["accuracy"])]),
    "codebook_perplexity": (
        "Codebook perplexity",
        [("perplexity", ["codebook_perplexity", "codebook_perplexity_hard"])],
    ),
    "schedule": ("Schedule", [("learning rate", ["learning_rate"]), ("Gumbel temperature", ["gumbel_temperature"])]),
}

FINETUNING_PICTURES: Pictures = {
    "loss": ("Loss", [("loss", ["loss"])]),
    "error_rate": ("Error rates", [("word error rate", ["wer"]), ("character error rate", ["cer"])]),
    "accuracy": ("Accuracy", [("accuracy", ["accuracy"]), ("unweighted average recall", ["uar"])]),
    "schedule": ("Schedule", [("learning rate", ["learning_rate"])]),
}


def draw_plots(
    output_dir: str | os.PathLike,
    metrics: Sequence[Mapping[str, Any]],
    pictures: Pictures = PICTURES,
    over: tuple[str, str] = ("audio_hours", "hours of audio heard"),
) -> list[Path]:
    """Draw the curves into `output_dir/plots`, over a value of the records (`over`: its name and its axis label).

    Training and validation share a picture; the accuracy of pretraining is shown beside chance; what was never logged
    gets no picture. Returns the pictures' paths.
    """
    from matplotlib.figure import Figure  # slow to import; and no global backend is touched

    folder = Path(output_dir) / "plots"
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, (title, panels) in pictures.items():
        panels = [
            (label, curves) for label, measures in panels if (curves := gather_curves(metrics, measures, over[0]))
        ]
        if not panels:
            continue
        figure = Figure(figsize=(7, 3.2 * len(panels)), layout="constrained")
        for axes, (label, curves) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
            for curve, (hours, values) in curves.items():
                axes.plot(hours, values, label=curve, marker="o" if len(hours) < 30 else None, markersize=3)
            if name == "accuracy" and pictures is PICTURES:
                axes.axhline(chance_accuracy(output_dir), color="grey", linestyle="--", label="chance")
            axes.set(xlabel=over[1], ylabel=label)
            axes.grid(alpha=0.3)
            axes.legend()
        figure.suptitle(title)
        drawn.append(folder / f"{name}.png")
        figure.savefig(drawn[-1], dpi=120)
    return drawn


def model_config(output_dir: str | os.PathLike) -> dict[str, Any]:
    """The folder's `config.json`; empty where there is none."""
    path = Path(output_dir) / "config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def chance_accuracy(output_dir: str | os.PathLike) -> float:
    """1 / (1 + num_negatives), from the folder's `config.json` (else BASE's 100 distractors)."""
    return 1 / (1 + model_config(output_dir).get("num_negatives", 100))


def gather_curves(
    metrics: Sequence[Mapping[str, Any]], measures: Sequence[str], over: str
) -> dict[str, tuple[list, list]]:
    """Label to (values of `over`, values), in training and validation; what was null in the file leaves a gap."""
    curves = {}
    for measure in measures:
        for prefix, where in (("", "training"), ("eval_", "validation")):
            points = [
                (record[over], float("nan") if record[prefix + measure] is None else record[prefix + measure])
                for record in metrics
                if prefix + measure in record and record.get(over) is not None
            ]
            if points:
                kind = " (hard)" if measure.endswith("_hard") else " (soft)" if len(measures) > 1 else ""
                curves[where + kind] = tuple(map(list, zip(*points, strict=True)))
    return curves
