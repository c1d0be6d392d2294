"""Lhotse's manifests → rows: cuts, recordings, or supervisions with the recordings beside them.

A cut is a part of a recording, and a recording is its files. What is not in a file as it is to be heard is refused:
mixed cuts, transforms such as speed perturbation, and audio of URLs, commands, memory and Shar.
Source: `lhotse.serialization.deserialize_item` tells the kinds of manifests, `Recording.load_audio` the samples.
"""

import gzip
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from w2v2.errors import UserError
from w2v2.manifests.columns import COLUMNS, LETTERS, says_place

SUPERVISION = {"recording_id", "start", "duration"}
REMEDY = "write the audio to files, by CutSet.save_audios(folder), and give the cuts that it returns"
REMEDIES = {
    "url": "download the file and name that",
    "shar": "give the recording.*.tar files of the Shar instead, or " + REMEDY,
    "command": REMEDY,
    "memory": REMEDY,
}
ROUNDED = 0.05  # seconds by which a supervision may leave its cut


def open_text(path: Path) -> IO[str]:
    return gzip.open(path, "rt", encoding="utf-8-sig") if path.suffix == ".gz" else open(path, encoding="utf-8-sig")


def is_lhotse(entry: dict) -> bool:
    is_cut = entry.get("type") in ("MonoCut", "Cut", "MultiCut", "MixedCut", "PaddingCut")
    return (
        is_cut
        or {"sources", "sampling_rate"} <= entry.keys()
        or SUPERVISION <= entry.keys()
        and not entry.keys() & {*COLUMNS["audio"]}
    )


def read_lhotse(
    path: Path, entries: Iterable[tuple[int | None, dict]], warnings: list[str]
) -> Iterator[tuple[int | None, dict]]:
    """Rows of the entries, and their lines. Raises UserError for an entry that cannot be heard as it says."""
    recordings, num_beyond, example = None, 0, ""
    for number, (line, entry) in enumerate(entries, 1):
        where = f"row {number}" + (f" (line {line})" if line else "")
        try:
            if SUPERVISION <= entry.keys():
                recordings = _read_recordings(path) if recordings is None else recordings
                if (name := entry["recording_id"]) not in recordings:
                    raise UserError(
                        f"is of the recording {name!r}, which is not among the recordings beside it: add it"
                    )
                entry = {**entry, "recording": recordings[name]}
            row, is_beyond = _read_entry(entry)
        except UserError as error:
            raise UserError(f"{path}: {where} {error}") from None
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"{path}: {where} is not as Lhotse writes it ({reason}): write the manifest anew") from None
        num_beyond, example = num_beyond + is_beyond, example or where * is_beyond
        yield line, row
    if num_beyond:
        said = "cuts hold supervisions that go beyond them, so their text says more than is heard"
        warnings.append(f"{path}: {num_beyond:,} {said} (the first: {example})")


def _read_recordings(path: Path) -> dict[str, dict]:
    """The recordings of a manifest of supervisions, by their ids: the file is named as Lhotse names it."""
    beside = path.with_name(path.name.replace("supervisions", "recordings"))
    if beside == path or not beside.exists():
        raise UserError(f"is a supervision without its recording: give cuts, or have {beside.name} beside it")
    with open_text(beside) as file:
        return {recording["id"]: recording for recording in map(json.loads, filter(str.strip, file))}


def _read_entry(entry: dict) -> tuple[dict[str, Any], bool]:
    """Columns of a cut or recording, and whether a supervision goes beyond it."""
    if (kind := entry.get("type")) in ("MixedCut", "PaddingCut"):
        raise UserError(f"is a {kind}, which is made of several pieces: {REMEDY}")
    if "sources" in entry:  # a recording
        entry = {"id": entry["id"], "start": 0, "duration": entry["duration"], "recording": entry}
    if not entry.get("recording"):
        raise UserError("has no recording, only features: give cuts with recordings")
    audio, channel = _find_file(entry["recording"], entry.get("channel"))
    start, duration = float(entry["start"]), float(entry["duration"])
    supervisions = sorted(entry.get("supervisions") or (), key=lambda supervision: supervision["start"])
    ends = [(own["start"], own["start"] + own["duration"]) for own in supervisions]
    is_beyond = any(first < -ROUNDED or last > duration + ROUNDED for first, last in ends)
    row = {"id": entry["id"], "audio": audio, "channel": channel, "duration": duration}
    row |= {"start_seconds": start, "end_seconds": start + duration}
    if any(own.get("text") for own in supervisions):  # tools repeat it among the custom fields of the cut
        entry = entry | {"custom": {name: v for name, v in (entry.get("custom") or {}).items() if name != "text"}}
    return _read_told([entry, *supervisions]) | row, is_beyond


def _find_file(recording: dict, channel: int | Sequence[int] | None) -> tuple[str, str | None]:
    """The file of these channels (None: all), and the letter of a single one among others in it."""
    for transform in recording.get("transforms") or ():
        if transform["name"] != "Resample" or transform["kwargs"]["target_sampling_rate"] < 16_000:
            raise UserError(f"changes its recording by {transform['name']}: {REMEDY}")
    every = [channel for source in recording["sources"] for channel in source["channels"]]
    channels = every if channel is None else [channel] if isinstance(channel, int) else list(channel)
    sources = [source for source in recording["sources"] if {*channels} & {*source["channels"]}]
    if len(sources) != 1 or (len(channels) > 1 and {*channels} != {*sources[0]["channels"]}):
        spelled = ", ".join(map(str, channels))
        raise UserError(f"hears channels {spelled}, which are not one file: cut them apart, by MultiCut.to_mono()")
    [source] = sources
    if source["type"] != "file":
        remedy = REMEDIES.get(source["type"], REMEDY)
        raise UserError(f"has its audio from a source of type {source['type']!r}: {remedy}")
    if len(channels) > 1 or len(source["channels"]) == 1:
        return source["source"], None
    if (place := source["channels"].index(channels[0])) >= len(LETTERS):
        raise UserError(f"hears channel {place + 1} of a file, and at most {len(LETTERS)} are known: {REMEDY}")
    return source["source"], LETTERS[place]


def _read_told(holders: Iterable[dict]) -> dict[str, str]:
    """What a cut and its supervisions tell: texts one after another, and whatever else they agree in."""
    told: dict[str, list] = {}
    for holder in holders:
        for name, value in {**(holder.get("custom") or {}), **holder}.items():
            if isinstance(value, str | int | float) and not says_place(name.lower()):
                told.setdefault(name.lower(), []).append(value)
    texts = " ".join(filter(None, (str(text).strip() for text in told.pop("text", ()))))
    agreed = {name: str(values[0]) for name, values in told.items() if len(set(values)) == 1}
    return agreed | ({"text": texts} if texts else {})
