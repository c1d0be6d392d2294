"""What the model cards of pretraining and fine-tuning share: rows of known facts, and what may be published.

A card may be read by anybody: paths of this machine are shortened to their last part, and nothing named a token
is written.
"""

import os
import re
import string
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from w2v2.errors import printable

_FREE_TEXT = "data_description"
NOT_MEASURED = "not measured"
UNKNOWN_TO_THE_PROGRAM = (
    "Hours and utterances were counted by the program; nothing else about the speech (languages, speakers,\n"
    "recordings, rights) is known to it."
)


def publishable(value: Any) -> Any:
    """Resolved flags without tokens and without paths of this machine but their last part, at any depth."""
    if isinstance(value, Mapping):
        kept = {name: item for name, item in value.items() if not str(name).endswith("token")}
        return {name: item if name == _FREE_TEXT else publishable(item) for name, item in kept.items()}
    if isinstance(value, list | tuple):
        return [publishable(item) for item in value]
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, str) and PureWindowsPath(value).is_absolute():
        return PureWindowsPath(value).name
    if isinstance(value, str) and value.startswith(("/", "~", "..")):
        return PurePath(value).name
    return value


def fill(rows: Sequence[tuple[str, str]], facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The rows (label, format string) whose every fact is known."""
    known = {name: fact for name, fact in facts.items() if fact not in (None, "")}
    fields = [
        {re.split(r"[.\[]", field)[0] for _, field, _, _ in string.Formatter().parse(form) if field} for _, form in rows
    ]
    return [
        (label, form.format(**known))
        for (label, form), needed in zip(rows, fields, strict=True)
        if needed <= known.keys()
    ]


def table(rows: Sequence[tuple[str, str]]) -> str:
    escaped = [(label, printable(value.replace("\n", " ")).replace("|", "\\|")) for label, value in rows]
    return "\n".join(f"| {label} | {value} |" for label, value in escaped)


def data_row(label: str, sources: Any, utterances: int | None, hours: float | None) -> tuple[str, str]:
    """Manifests as they were given, with what was counted in them."""
    sources = [sources] if isinstance(sources, str) else sources or []
    parts = (
        ["`" + "`, `".join(printable(source).replace("`", "'") for source in sources) + "`"] if sources else ["none"]
    )
    parts += [] if utterances is None else [f"{utterances:,} utterances"]
    parts += [] if hours is None else [f"{hours:,.2f} h"]
    return label, ", ".join(parts)


def stated_rows(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the user says of the data (`--data_description`), marked as such."""
    return fill([("Sources, as stated by who trained the model", "{data_description}")], config)


def licence(config: Mapping[str, Any]) -> str:
    stated = config.get("hub_license")
    return f"`{stated}`, as stated by who trained the model." if stated else "No licence was stated."


def device_hours(metrics: Sequence[Mapping[str, Any]]) -> float | None:
    """Hours of all devices in updates: audio heard between records, over the throughput there, times the processes.

    None where a record of training lacks one of the three. What a resumed run had to repeat is not in it.
    """
    total, before = 0.0, 0.0
    for record in metrics:
        if "audio_seconds_per_second" not in record:
            continue
        hours, rate, processes = map(record.get, ("audio_hours", "audio_seconds_per_second", "num_processes"))
        if hours is None or not rate or not processes:
            return None
        total += (hours - before) / rate * processes
        before = hours
    return total or None


def in_hours(hours: float | None) -> str | None:
    return None if hours is None else f"{hours:,.2f}" if hours >= 1 else f"{hours:.2g}"


def hub_id(source: str | None) -> str | None:
    """`source` where it is a repository on the Hub, as far as its name tells; None for folders."""
    if not source or os.path.exists(source) or Path(source).is_absolute() or source.count("/") != 1:
        return None
    try:
        validate_repo_id(source)
    except HFValidationError:
        return None
    return source
