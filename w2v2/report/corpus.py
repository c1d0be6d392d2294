"""What a pretraining had to hear, what of it was planned to be heard, and how it was cropped and masked."""

from collections.abc import Mapping, Sequence
from typing import Any

from w2v2.plan.description import describe
from w2v2.report.charts import LineChart, Series, draw_lines, show
from w2v2.report.grids import draw_bars
from w2v2.report.run_files import RunFiles
from w2v2.report.sections import Section, Table, draw_measures, keep, percent

FRAMES_PER_HOUR = 50 * 3600  # latent frames
MOST_SOURCES = 30


def tell_audio(run: RunFiles) -> Section:
    """What there was to hear, and how much of it was cropped and masked."""
    section = Section("Audio, crops and masks")
    rows = []
    for name, part in {"training": run.plan, "validation": run.plan.get("validation", {})}.items():
        if "utterances" in part:
            dropped = ", ".join(
                f"{count:,} {reason.replace('_', ' ')}" for reason, count in (part.get("dropped") or {}).items()
            )
            rows.append((name, show(part.get("hours")), show(part["utterances"]), dropped or "none"))
    heard = [Table("What there was to hear", ["Set", "Hours", "Utterances", "Left out"], rows)] if rows else []
    section.tables += tell_plan(run.plan) or heard
    if not section.tables:
        section.notes.append("There is no plan.json: how much there was to hear is not known.")
    section.charts += keep(draw_lengths(run.plan.get("lengths")))
    if sources := run.plan.get("sources"):
        most = sorted(sources, key=lambda source: -source.get("share", 0))[:MOST_SOURCES]
        items = [(source["name"], source.get("share", 0), f"{percent(source.get('share'))}") for source in most]
        section.charts += keep(draw_bars("Sources", items, "share of what is heard"))
    masked = [record | {"masked_share": _share_masked(record)} for record in run.trained if "masked_frames" in record]
    shares = RunFiles(run.folder, run.name, run.kind, masked)
    section.charts += keep(
        draw_measures(shares, "Masked", {"masked_share": "masked frames"}, subtitle="share of the latent frames"),
        draw_measures(run, "Cropped and filled", {"cropped_fraction": "cropped away", "padded_fraction": "filler in micro-batches"}, subtitle="share of the audio"),
        draw_measures(run, "Effective batch", {"batch_hours": "hours an update"}, subtitle="hours of cropped speech"),
    )  # fmt: skip
    return section


def _share_masked(record: Mapping[str, Any]) -> float | None:
    hours = record.get("batch_hours")
    return record["masked_frames"] / (hours * FRAMES_PER_HOUR) if hours else None


def tell_plan(plan: Mapping[str, Any]) -> list[Table]:
    """The plan as the run printed it, but for its warnings; none of an earlier version, whose plan lacks something."""
    try:
        lines = describe({**plan, "warnings": []}).splitlines()
    except KeyError:
        return []
    return [Table("What was planned", ["Part", "Plan"], [(line[:14].strip(), line[14:]) for line in lines])]


def draw_lengths(lengths: Mapping[str, Sequence[float]] | None) -> LineChart | None:
    """The histogram of plan.json as the outline of its columns."""
    if not lengths:
        return None
    edges, counts = lengths["seconds"], lengths["utterances"]
    steps = [(edge, count) for n, count in enumerate(counts) for edge in (edges[n], edges[n + 1])]
    outline = [(edges[0], 0), *steps, (edges[-1], 0)]
    return draw_lines("Lengths", [Series("utterances", outline)], "seconds", subtitle="utterances of training")
