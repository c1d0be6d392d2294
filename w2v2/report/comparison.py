"""Several runs on one page: how their flags differ, their curves over one another, their final figures."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from w2v2.report.charts import LineChart, Series, draw_lines
from w2v2.report.finetuning import list_scores
from w2v2.report.pretraining import list_figures
from w2v2.report.run_files import CLASSIFICATION, PRETRAINING, PROBE, RECOGNITION, RunFiles
from w2v2.report.sections import HOURS, SHOWN, Section, Summary, Table, gather, keep, percent, tell_value

# Names of a run's own, which every comparison would list.
OWN_FLAGS = {"output_dir", "hub_model_id", "run_name", "logging_dir", "resume_from_checkpoint"}
PRETRAINING_CURVES = {
    "contrastive_loss": ("Contrastive loss", "nats a masked frame"),
    "accuracy": ("Accuracy", "share of masked frames"),
    "codebook_perplexity": ("Codebook perplexity", "entries in use, over all groups"),
    "learning_rate": ("Learning rate", "of the update"),
    "grad_norm": ("Gradient norm", "before clipping"),
    "audio_seconds_per_second": ("Throughput", "times real time"),
}
FINETUNING_CURVES = {key: (name, "as a fraction") for key, name in SHOWN.items()}
FINETUNING_CURVES |= {"loss": ("Loss", "of an update"), "learning_rate": ("Learning rate", "of the update")}


def compare_runs(runs: Sequence[RunFiles], summaries: Sequence[Summary]) -> list[Section]:
    """Sections that stand before the runs' own; runs of one kind are compared with one another."""
    order = sorted(range(len(runs)), key=lambda n: summaries[n].kind)
    sections = []
    for kind, group in groupby(order, key=lambda n: summaries[n].kind):
        rows = list(group)
        if len(rows) == 1:
            continue  # its own report says all
        ours, theirs = [runs[n] for n in rows], [summaries[n] for n in rows]
        title = f"{kind}: " if len({summary.kind for summary in summaries}) > 1 else ""
        sections += [tell_finals(ours, theirs, title), tell_curves(ours, title), tell_differences(ours, title)]
    return sections


def tell_finals(runs: Sequence[RunFiles], summaries: Sequence[Summary], title: str) -> Section:
    """The headline figures of all runs in one table, all held out or all of training; of fine-tunings every score."""
    figures, caption = [{label: value for label, value, _ in summary.figures} for summary in summaries], ""
    if runs[0].kind == PRETRAINING:
        is_held_out = all(run.validated for run in runs)
        figures = [{label: value for label, value, _ in list_figures(run, is_held_out)} for run in runs]
        for run, found in zip(runs, figures, strict=True):
            record = (run.validated if is_held_out else run.trained)[-1:] or [{}]
            found["Constant guess"] = percent(record[0].get("eval_" * is_held_out + "constant_guess_accuracy"))
        caption = ", on held-out speech" if is_held_out else ", on training speech"
    if runs[0].kind in (RECOGNITION, CLASSIFICATION):
        figures = [list_scores(run) for run in runs]
    names = list(dict.fromkeys(name for found in figures for name in found))
    rows = [
        (summary.name, *(found.get(name, "–") for name in names))
        for summary, found in zip(summaries, figures, strict=True)
    ]
    return Section(
        f"{title}final figures".capitalize(), tables=[Table(f"At the end of each run{caption}", ["Run", *names], rows)]
    )


def tell_curves(runs: Sequence[RunFiles], title: str) -> Section:
    """Each measure with a line for each run: of the validations where all have them, else of training."""
    section = Section(f"{title}curves".capitalize())
    if runs[0].kind == PROBE:
        section.charts = keep(_draw_probes(runs))
        return section
    is_pretraining = runs[0].kind == PRETRAINING
    curves, over = (
        (PRETRAINING_CURVES, ("audio_hours", HOURS)) if is_pretraining else (FINETUNING_CURVES, ("step", "updates"))
    )
    for key, (name, unit) in curves.items():
        section.charts += keep(_draw_measure(runs, key, (name, unit), over))
    if not section.charts:
        section.notes.append("None of these runs has logged a curve.")
    return section


def _draw_measure(
    runs: Sequence[RunFiles], key: str, names: tuple[str, str], over: tuple[str, str]
) -> LineChart | None:
    name, unit = names
    held_out = [gather(run.metrics, f"eval_{key}", over[0]) for run in runs]
    trained = [gather(run.metrics, key, over[0]) for run in runs]
    where = (
        "held out"
        if all(points or not other for points, other in zip(held_out, trained, strict=True)) and any(held_out)
        else ""
    )
    series = [Series(run.name, points) for run, points in zip(runs, held_out if where else trained, strict=True)]
    return draw_lines(name, series, over[1], subtitle=f"{unit}, {where or 'training'}" if any(held_out) else unit)


def _draw_probes(runs: Sequence[RunFiles]) -> LineChart | None:
    """The layers of every run's models, where all were measured alike."""
    if len({run.probe["measure"] for run in runs}) > 1:
        return None
    measure = runs[0].probe["measure"]
    series = [
        Series(f"{run.name}: {model['name']}", [(layer["layer"], layer[measure]) for layer in model["layers"]])
        for run in runs
        for model in run.probe["models"]
    ]
    return draw_lines(f"{SHOWN.get(measure, measure)} by layer", series, "layer", subtitle="test, as a fraction")


def tell_differences(runs: Sequence[RunFiles], title: str) -> Section:
    """The flags in which the runs differ; a flag that a file does not name is at its default."""
    section = Section(f"{title}differences of configuration".capitalize())
    configs: list[Mapping[str, Any]] = [run.config or run.probe.get("run", {}) for run in runs]
    flags = list(dict.fromkeys(name for config in configs for name in config if name not in OWN_FLAGS))
    rows = []
    for flag in flags:
        values = [tell_value(config[flag]) if flag in config else "default" for config in configs]
        if len(set(values)) > 1:
            rows.append((flag, *values))
    if rows:
        section.tables.append(Table("Flags that differ", ["Flag", *(run.name for run in runs)], rows))
    else:
        section.notes.append("Their flags are the same, but for names of their own.")
    return section
