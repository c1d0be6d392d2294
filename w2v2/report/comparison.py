"""Several runs on one page: how their flags differ, their curves over one another, their final figures."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from w2v2.report.charts import Chart, Series, draw_lines
from w2v2.report.finetuning import MEASURES, list_scores
from w2v2.report.pretraining import ACCURACY, LOSS, PERPLEXITY, SPEED, list_figures
from w2v2.report.probing import draw_layers
from w2v2.report.run_files import PRETRAINING, PROBE, RunFiles
from w2v2.report.sections import HOURS, NORM, RATE, UPDATES, Measure, Section, Summary, Table, gather, tell_value

# Names of a run's own, which every comparison would list.
OWN_FLAGS = {"output_dir", "hub_model_id", "run_name", "logging_dir", "resume_from_checkpoint"}
PRETRAINING_MEASURES = [LOSS, ACCURACY, PERPLEXITY, RATE, NORM, SPEED[0]]


def compare_runs(runs: Sequence[RunFiles], summaries: Sequence[Summary]) -> list[Section]:
    """Sections that stand before the runs' own; runs of one kind are compared with one another."""
    order = sorted(range(len(runs)), key=lambda n: summaries[n].kind)
    sections = []
    for kind, group in groupby(order, key=lambda n: summaries[n].kind):
        if len(rows := list(group)) == 1:
            continue  # its own report says all
        ours = [runs[n] for n in rows]
        found = [tell_finals(ours, [summaries[n] for n in rows]), tell_curves(ours), tell_differences(ours)]
        for section in found if len({summary.kind for summary in summaries}) > 1 else []:
            section.title = f"{kind}: {section.title.lower()}"
        sections += found
    return sections


def tell_finals(runs: Sequence[RunFiles], summaries: Sequence[Summary]) -> Section:
    """The headline figures of all runs in one table, all of validation or all of training; of fine-tunings every score."""
    caption = "At the end of each run"
    if runs[0].kind == PRETRAINING:
        is_validation = all(run.validated for run in runs)
        found = [list_figures(run, is_validation) for run in runs]
        caption += f", in {'validation' if is_validation else 'training'}"
    elif runs[0].probe:
        found = [summary.figures for summary in summaries]
    else:
        found = [list_scores(run) for run in runs]
    values = [{label: value for label, value, *_ in figures} for figures in found]
    names = list(dict.fromkeys(name for one in values for name in one))
    rows = [(run.name, *(one.get(name, "–") for name in names)) for run, one in zip(runs, values, strict=True)]
    return Section("Final figures", tables=[Table(caption, ["Run", *names], rows)])


def tell_curves(runs: Sequence[RunFiles]) -> Section:
    """Each measure with a line for each run; of a pretraining's measures the first line alone."""
    if runs[0].kind == PROBE:
        return Section("Curves", [draw_layers(runs)])
    if runs[0].kind == PRETRAINING:
        drawn, over = [(measure, next(iter(measure.lines))) for measure in PRETRAINING_MEASURES], HOURS
    else:
        drawn, over = [(measure, key) for measure in MEASURES for key in measure.lines], UPDATES
    section = Section("Curves", (_draw_runs(runs, measure, key, over) for measure, key in drawn))
    section.notes += [] if section.charts else ["None of these runs has logged a curve."]
    return section


def _draw_runs(runs: Sequence[RunFiles], measure: Measure, key: str, over: tuple[str, str]) -> Chart | None:
    """Of the validations where all runs that have the measure validated, else of training."""
    trained, validated = ([gather(run.metrics, prefix + key, over[0]) for run in runs] for prefix in ("", "eval_"))
    is_validation = any(validated) and all(ours or not theirs for ours, theirs in zip(validated, trained, strict=True))
    where = f"{'validation' if is_validation else 'training'}, " if any(validated) else ""
    points = validated if is_validation else trained
    series = [Series(run.name, found) for run, found in zip(runs, points, strict=True)]
    title = ", ".join(filter(None, (measure.title, measure.lines[key])))
    return draw_lines(title, series, over[1], subtitle=f"{where}{measure.subtitle}")


def tell_differences(runs: Sequence[RunFiles]) -> Section:
    """The flags in which the runs differ; a flag that a file does not name is at its default."""
    section = Section("Differences of configuration")
    configs: list[Mapping[str, Any]] = [run.config or run.probe.get("run", {}) for run in runs]
    rows = []
    for flag in dict.fromkeys(name for config in configs for name in config if name not in OWN_FLAGS):
        values = [tell_value(config[flag]) if flag in config else "default" for config in configs]
        if len(set(values)) > 1:
            rows.append((flag, *values))
    if rows:
        section.tables.append(Table("Flags that differ", ["Flag", *(run.name for run in runs)], rows))
    else:
        section.notes.append("Their flags are the same, but for names of their own.")
    return section
