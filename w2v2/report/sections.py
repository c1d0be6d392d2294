"""The parts of a page, and those that every kind of run has: events, skipped audio, flags, environment."""

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from w2v2.evaluate.scores import NAMES
from w2v2.report.charts import Band, LineChart, Series, draw_lines, show
from w2v2.report.run_files import RunFiles

MOST_REASONS, MOST_EVENTS = 12, 200
GOOD, PLAIN, CAREFUL, BAD = "good", "plain", "careful", "bad"
SHOWN = NAMES | {"uar": "UAR", "accuracy": "accuracy", "macro_f1": "macro-F1"}  # measures, as they are written
HOURS = "hours of audio heard"
COLOURS = {"training": 0, "held out": 1} | {
    f"codebook {group + 1}": group for group in range(6)
}  # by a name's beginning
DASHED = ("hard", "guess", ", training")  # ends of the names of lines


@dataclass
class Table:
    """`head` names the columns; the first column names the rows. Cells are texts or numbers."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass
class Utterance:
    """An utterance with errors, aligned (pairs of transcripts.py) or only labelled; `audio` is a data URI."""

    set: str
    id: str
    score: str
    pairs: Sequence[Any] = ()
    audio: str | None = None


@dataclass
class Section:
    """A heading with what is below it; `is_folded` hides that until it is asked for."""

    title: str
    charts: list[Any] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    utterances: list[Utterance] = field(default_factory=list)
    is_folded: bool = False
    anchor: str = ""


@dataclass
class Summary:
    """What stands first of a run: a few figures as (label, value, remark), and one sentence with its colour."""

    kind: str
    name: str
    verdict: str
    mood: str
    figures: list[tuple[str, str, str]]
    remarks: list[str] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)


def percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{value:.{digits}%}".replace("%", "\u00a0%")


def gather(
    records: Sequence[Mapping[str, Any]], key: str, over: str = "audio_hours"
) -> list[tuple[float, float | None]]:
    """(x, value) of the records that have both; what was null in the file is None."""
    return [(record[over], record[key]) for record in records if key in record and record.get(over) is not None]


def draw_measures(
    run: RunFiles,
    title: str,
    keys: Mapping[str, str],
    *,
    subtitle: str = "",
    over: tuple[str, str] = ("audio_hours", HOURS),
    band: Band | None = None,
) -> LineChart | None:
    """A chart of some measures (key → name of its line), over hours heard or what `over` names.

    What is held out has one colour, training another; what only helps to read a chart is dashed.
    """
    series = [
        Series(name, gather(run.metrics, key, over[0]), COLOURS.get(name.partition(",")[0]), name.endswith(DASHED))
        for key, name in keys.items()
    ]
    return draw_lines(title, series, over[1], subtitle=subtitle, band=band)


def keep(*charts: Any) -> list[Any]:
    return [chart for chart in charts if chart is not None]


def tell_events(run: RunFiles) -> Section:
    """Warnings of the plan, and what happened in the run, in order."""
    section = Section("Warnings and events", anchor="events")
    warnings = [
        (warning.get("code", ""), warning.get("message", ""), warning.get("remedy", ""))
        for warning in run.plan.get("warnings", [])
    ]
    warnings += [("fine-tuning", message, "") for message in run.results.get("run", {}).get("warnings", [])]
    if warnings:
        head = ["Code", "Warning", "Remedy"] if any(remedy for *_, remedy in warnings) else ["Code", "Warning"]
        section.tables.append(Table("Warnings", head, [row[: len(head)] for row in warnings]))
    else:
        section.notes.append("There are no warnings.")
    if run.events:
        shown = run.events[-MOST_EVENTS:]
        rows = [
            (event.get("event", ""), _tell_time(event.get("time")), show(event.get("step")), event.get("message", ""))
            for event in shown
        ]
        section.tables.append(Table("Events", ["Event", "Time (UTC)", "Update", "Message"], rows))
        if len(run.events) > len(shown):
            section.notes.append(f"{len(run.events) - len(shown)} earlier events are in events.jsonl.")
    if run.non_finite:
        section.notes.append(
            f"{len(run.non_finite)} updates had no finite loss or gradient and were not taken, the first at update "
            f"{show(run.non_finite[0].get('step'))}; non_finite_updates.jsonl names what was heard in them."
        )
    section.notes += run.notes
    return section


def _tell_time(text: Any) -> str:
    return str(text or "–")[:19].replace("T", " ")


def tell_skipped(run: RunFiles) -> Section:
    """Unreadable files by reason."""
    section = Section("Skipped audio", anchor="skipped")
    for name, lines in run.skipped.items():
        reasons = Counter(str(line.get("reason", "no reason given")) for line in lines)
        first = {str(line.get("reason", "no reason given")): line for line in reversed(lines)}
        rows = [
            (reason, count, str(first[reason].get("audio") or first[reason].get("id") or ""))
            for reason, count in reasons.most_common(MOST_REASONS)
        ]
        section.tables.append(Table(f"{name}: {len(lines):,} files", ["Reason", "Files", "For example"], rows))
        if len(reasons) > len(rows):
            section.notes.append(f"{len(reasons) - len(rows)} more reasons are in {name}.")
    if not run.skipped:
        section.notes.append("No file was skipped.")
    return section


def tell_flags(run: RunFiles, defaults: Mapping[str, Any]) -> Section:
    """The resolved flags: first those that are not the defaults, where these are known."""
    section = Section("Configuration", is_folded=True, anchor="configuration")
    if not run.config:
        section.notes.append("The folder has no file of flags.")
        return section
    changed = {name: value for name, value in run.config.items() if name not in defaults or defaults[name] != value}
    if defaults:
        rows = [(name, tell_value(value), tell_value(defaults.get(name))) for name, value in changed.items()]
        section.tables.append(Table(f"{len(rows)} flags that are not the defaults", ["Flag", "Value", "Default"], rows))
        rest = [(name, tell_value(value)) for name, value in run.config.items() if name not in changed]
        section.tables.append(Table(f"{len(rest)} flags at their defaults", ["Flag", "Value"], rest))
    else:
        rows = [(name, tell_value(value)) for name, value in run.config.items()]
        section.tables.append(Table("Flags that are not the defaults", ["Flag", "Value"], rows))
    return section


def tell_value(value: Any) -> str:
    """A flag's value as one would write it."""
    if isinstance(value, list):
        return " ".join(map(tell_value, value)) or "none"
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def tell_environment(run: RunFiles) -> Section:
    """Of each start and resume: the command, the devices and the versions."""
    section = Section("Environment and command", is_folded=True, anchor="environment")
    starts = [event for event in run.events if event.get("event") in ("start", "resume")]
    for event in starts[-5:]:
        command = event.get("command")
        rows = [("command", shlex.join(map(str, command)))] if command else []
        rows += [
            (key.replace("num_", ""), event[key]) for key in ("device", "num_processes", "precision") if key in event
        ]
        rows += [(name, version) for name, version in (event.get("versions") or {}).items()]
        caption = f"{event['event']} at update {show(event.get('step'))}, {_tell_time(event.get('time'))} UTC"
        section.tables.append(Table(caption, ["What", "Value"], rows))
    if not starts:
        section.notes.append("The folder has no events.jsonl: command and versions are not known.")
    elif len(starts) > 5:
        section.notes.append(f"{len(starts) - 5} earlier starts are in events.jsonl.")
    return section
