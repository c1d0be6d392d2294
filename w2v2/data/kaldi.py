"""Kaldi's data folders (wav.scp, segments, text, utt2spk, utt2dur) → rows of a manifest."""

import re
from pathlib import Path

from w2v2.errors import UserError

SPACES = " \t\r\n"  # a no-break space and its like may stand in a name


def read_kaldi(folder: Path) -> list[dict]:
    """Utterances are the lines of `segments`, or else those of `wav.scp`; the other files tell more of them.

    Raises UserError for pipes and archives, for files that are empty or do not parse, and for names that come twice.
    """
    recordings = _read_pairs(folder / "wav.scp")
    for name, audio in recordings.items():
        if audio.endswith("|") or re.search(r"\.ark:\d+$", audio):
            remedy = "write the audio to files and list those"
            raise UserError(f"{folder}/wav.scp: entry {name!r} is a shell pipe or lies in an archive: {remedy}")
    rows = [{"id": name, "audio": audio} for name, audio in recordings.items()]
    further = {"text": "text", "utt2spk": "speaker", "utt2dur": "duration"}
    if (segments := folder / "segments").exists():
        rows = []
        del further["utt2dur"]
        for name, fields in _read_pairs(segments).items():
            recording, start, end = (fields.split() + [""] * 3)[:3]
            if recording not in recordings or not end:
                remedy = "needs a recording of wav.scp, a start and an end in seconds"
                raise UserError(f"{segments}: {name!r} {remedy}, not {fields!r}")
            end = None if end in ("-1", "-1.0") else end  # that of the recording
            rows.append({"id": name, "audio": recordings[recording], "start": start, "end": end})
    for file, column in further.items():
        if (folder / file).exists():
            values = _read_pairs(folder / file)
            for row in rows:
                row[column] = values.get(row["id"])
    return rows


def _read_pairs(path: Path) -> dict[str, str]:
    """Lines of `name rest` in a file of Kaldi's → {name: rest}."""
    values: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        name, *rest = re.split(f"[{SPACES}]+", line.strip(SPACES), maxsplit=1)
        if name in values:
            raise UserError(f"{path}: line {number} gives {name!r} a second time: remove one of them")
        if name:
            values[name] = rest[0] if rest else ""
    if not values:
        raise UserError(f"{path} is empty: write a line for each entry, or remove it")
    return values
