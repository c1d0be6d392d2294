"""The parts of a page, and those that every kind of run has: events, skipped audio, flags, environment."""

import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from w2v2.evaluate import scores
from w2v2.report.charts import Band, Chart, Point, Series, draw_lines, show
from w2v2.report.run_files import RunFiles

MOST_REASONS, MOST_EVENTS = 12, 200
SHOWN = scores.SHOWN | {f"lm_{key}": f"{name} with LM" for key, name in scores.NAMES.items()}
HOURS, UPDATES = ("audio_hours", "hours of audio heard"), ("step", "updates")  # x axes: key of a record, label
WHERE = {"": "training", "eval_": "validation"}  # beginning of a key → where it was measured


class Measure(NamedTuple):
    """A chart of values from metrics.jsonl: `lines` are keys, and what a line is called beside where it was measured."""

    title: str
    subtitle: str
    lines: Mapping[str, str]


RATE = Measure("Learning rate", "of the update", {"learning_rate": ""})
NORM = Measure("Gradient norm", "before clipping", {"grad_norm": ""})


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
    """A heading with what is below it; `is_folded` hides that until it is asked for. Charts that are None are dropped."""

    title: str
    charts: Iterable[Chart | None] = ()
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    utterances: list[Utterance] = field(default_factory=list)
    is_folded: bool = False

    def __post_init__(self):
        self.charts = [chart for chart in self.charts if chart]


@dataclass
class Summary:
    """What stands first of a run: a few figures as (label, value, remark), and one sentence with its colour.

    The colours (`mood`) are good, plain, careful and bad.
    """

    kind: str
    name: str
    verdict: str
    mood: str
    figures: list[tuple[str, str, str]]
    remarks: list[str] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)


def percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}".replace("%", "\u00a0%")


def gather(records: Sequence[Mapping[str, Any]], key: str, over: str) -> list[Point]:
    """(x, value) of the records that have both; what was null in the file is None."""
    return [(record[over], record[key]) for record in records if key in record and record.get(over) is not None]


def draw_measure(
    records: Sequence[Mapping[str, Any]], measure: Measure, over: tuple[str, str] = HOURS, band: Band | None = None
) -> Chart | None:
    """A chart of a measure in training and validation, which have a colour each; every second line is dashed."""
    series = []
    for number, (key, name) in enumerate(measure.lines.items()):
        for colour, (prefix, where) in enumerate(WHERE.items()):
            points, said = gather(records, prefix + key, over[0]), f"{where}, {name}" if name else where
            series += [Series(said, points, colour + number // 2 * 2, number % 2 == 1)] if points else []
    return draw_lines(measure.title, series, over[1], subtitle=measure.subtitle, band=band)


def tell_folder(run: RunFiles, defaults: Mapping[str, Any]) -> list[Section]:
    """The sections that any run has: what befell it, what it skipped, with which flags and where it ran."""
    own = [tell_skipped(run), tell_flags(run, defaults)] if not run.probe else []
    return [tell_events(run), *own, tell_environment(run)]


def tell_events(run: RunFiles) -> Section:
    """Warnings before the run, and what happened in it, in order."""
    section = Section("Warnings and events")
    warnings = [[found.get(key, "") for key in ("code", "message", "remedy")] for found in run.plan.get("warnings", [])]
    warnings += [["fine-tuning", message, ""] for message in run.results.get("run", {}).get("warnings", [])]
    if warnings:
        most = 3 if any(remedy for *_, remedy in warnings) else 2
        head = ["Name", "What was found", "What to do"][:most]
        section.tables.append(Table("Warnings", head, [row[:most] for row in warnings]))
    else:
        section.notes.append("There are no warnings.")
    if run.events:
        rows = [
            (event.get("event", ""), tell_time(event), show(event.get("step")), event.get("message", ""))
            for event in run.events[-MOST_EVENTS:]
        ]
        section.tables.append(Table("Events", ["Event", "Time (UTC)", "Update", "Message"], rows))
        section.notes += _count_more(len(run.events) - len(rows), "earlier events", "events.jsonl")
    if run.non_finite:
        section.notes.append(
            f"{len(run.non_finite)} updates had no finite loss or gradient and were not taken, the first at update "
            f"{show(run.non_finite[0].get('step'))}; non_finite_updates.jsonl names what was heard in them."
        )
    section.notes += run.notes
    return section


def tell_time(event: Mapping[str, Any]) -> str:
    return str(event.get("time") or "–")[:19].replace("T", " ")


def _count_more(number: int, what: str, file: str) -> list[str]:
    return [f"{number} {what} are in {file}."] if number > 0 else []


def tell_skipped(run: RunFiles) -> Section:
    """Unreadable files by reason."""
    section = Section("Skipped audio")
    for name, lines in run.skipped.items():
        reasons = Counter(str(line.get("reason", "no reason given")) for line in lines)
        first = {str(line.get("reason", "no reason given")): line for line in reversed(lines)}
        rows = [
            (reason, count, str(first[reason].get("audio") or first[reason].get("id") or ""))
            for reason, count in reasons.most_common(MOST_REASONS)
        ]
        section.tables.append(Table(f"{name}: {len(lines):,} files", ["Reason", "Files", "For example"], rows))
        section.notes += _count_more(len(reasons) - len(rows), "more reasons", name)
    if not run.skipped:
        section.notes.append("No file was skipped.")
    return section


def tell_flags(run: RunFiles, defaults: Mapping[str, Any]) -> Section:
    """The resolved flags: first those that are not the defaults, where these are known."""
    if not run.config:
        return Section("Configuration", notes=["The folder has no file of flags."], is_folded=True)
    told = {name: tell_value(value) for name, value in run.config.items()}
    changed = {name for name, value in run.config.items() if name not in defaults or defaults[name] != value}
    tables = [Table("Flags that are not the defaults", ["Flag", "Value"], list(told.items()))]
    if defaults:
        rows = [(name, told[name], tell_value(defaults.get(name))) for name in told if name in changed]
        rest = [(name, told[name]) for name in told if name not in changed]
        tables = [
            Table(f"{len(rows)} flags that are not the defaults", ["Flag", "Value", "Default"], rows),
            Table(f"{len(rest)} flags at their defaults", ["Flag", "Value"], rest),
        ]
    return Section("Configuration", tables=tables, is_folded=True)


def tell_value(value: Any) -> str:
    """A flag's value as one would write it."""
    if isinstance(value, list):
        return " ".join(map(tell_value, value)) or "none"
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def tell_environment(run: RunFiles) -> Section:
    """Of the last start or resume: the command, the devices and the versions."""
    starts = [event for event in run.events if event.get("event") in ("start", "resume")]
    if not starts:
        notes = ["The folder has no events.jsonl: command and versions are not known."]
        return Section("Environment and command", notes=notes, is_folded=True)
    last = starts[-1]
    facts = {"command": shlex.join(map(str, last.get("command") or [])), "device": last.get("device")}
    facts |= {
        "processes": last.get("num_processes"),
        "precision": last.get("precision"),
        **(last.get("versions") or {}),
    }
    rows = [(name, value) for name, value in facts.items() if value]
    table = Table(f"{last['event']} at update {show(last.get('step'))}, {tell_time(last)} UTC", ["What", "Value"], rows)
    notes = _count_more(len(starts) - 1, "earlier starts", "events.jsonl")
    return Section("Environment and command", tables=[table], notes=notes, is_folded=True)
