"""Folders that are data: the audio files of any folder, and Kaldi's wav.scp with its segments, texts and speakers."""

import os
import re
from collections import Counter
from pathlib import Path

from w2v2.audio.crops import AUDIO_SUFFIXES
from w2v2.errors import UserError, tell
from w2v2.manifests.columns import LETTERS


def find_audio(folder: Path) -> tuple[list[str], dict[str, int]]:
    """Relative paths of a folder's audio files, sorted; and how many others there are, by suffix.

    Links are followed. What is hidden is not heard: a hidden folder counts as one.
    """
    paths, passed_over, seen = [], Counter(), set()

    def fail(error: OSError) -> None:
        raise error

    for parent, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        if (real := os.path.realpath(parent)) in seen:  # a link to where we have been
            folders.clear()
            continue
        seen.add(real)
        passed_over["hidden folder"] += sum(name[0] == "." for name in folders)
        folders[:] = sorted(name for name in folders if name[0] != ".")
        for name in names:
            suffix = "hidden" if name[0] == "." else os.path.splitext(name)[1].lower()
            if suffix in AUDIO_SUFFIXES:
                paths.append(os.path.relpath(os.path.join(parent, name), folder))
            else:
                passed_over[suffix or "no suffix"] += 1
    return sorted(paths), dict(sorted((+passed_over).items(), key=lambda item: (-item[1], item[0])))


def say_passed_over(folder: Path, passed_over: dict[str, int]) -> None:
    """Log what was no audio, unless nothing was."""
    if passed_over:
        counts = ", ".join(f"{count:,} {suffix}" for suffix, count in passed_over.items())
        tell(f"{folder}: skipped files, hidden or with a suffix that is not of audio: {counts}")


def read_kaldi(folder: Path) -> tuple[list[dict], list[str]]:
    """A row for each line of `segments`, or else of `wav.scp`; `text`, `utt2spk` and `utt2dur` tell more of them.

    Also a line for each of these files that tells of others. A fifth field of `segments` is the channel, from 0.
    """
    recordings = _read_pairs(folder / "wav.scp")
    for name, audio in recordings.items():
        if re.search(r"\|$|\.ark:\d+$", audio):
            remedy = "write the audio to files and list those"
            raise UserError(f"{folder}/wav.scp: entry {name!r} is a shell pipe or lies in an archive: {remedy}")
    further = {"text": "text", "utt2spk": "speaker", "utt2dur": "duration"}
    rows = [{"id": name, "audio": audio} for name, audio in recordings.items()]
    if (segments := folder / "segments").exists():
        rows = []
        del further["utt2dur"]
        for name, fields in _read_pairs(segments).items():
            recording, start, end, channel, *_ = *fields.split(), "", "", "", ""
            is_channel = not channel or channel.isdecimal() and int(channel) < len(LETTERS)
            if recording not in recordings or not end or not is_channel:
                needs = (
                    f"{name!r} needs a recording of wav.scp, a start and an end in seconds, and no channel but 0 to 7"
                )
                raise UserError(f"{segments}: {needs}, not {fields!r}")
            end = None if end in ("-1", "-1.0") else end  # that of the recording
            rows.append({"id": name, "audio": recordings[recording], "start": start, "end": end})
            rows[-1] |= {"channel": LETTERS[int(channel)]} if channel else {}
    warnings, ids = [], {row["id"] for row in rows}
    for file, column in further.items():
        values = _read_pairs(folder / file) if (folder / file).exists() else {}
        if others := [name for name in values if name not in ids]:
            warnings.append(f"{folder / file}: {len(others):,} lines are of no utterance here, the first: {others[0]}")
        for row in rows if values else ():
            row[column] = values.get(row["id"])
    return rows, warnings


def _read_pairs(path: Path) -> dict[str, str]:
    """Lines of `name rest` in a file of Kaldi's → {name: rest}."""
    values: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        # A no-break space and its like may stand in a name.
        name, *rest = re.split(r"[ \t\r\n]+", line.strip(" \t\r\n"), maxsplit=1)
        if name in values:
            raise UserError(f"{path}: line {number} gives {name!r} a second time: remove one of them")
        if name:
            values[name] = rest[0] if rest else ""
    if not values:
        raise UserError(f"{path} is empty: write a line for each entry, or remove it")
    return values
