"""Kaldi's data folders (wav.scp, segments, text, utt2spk, utt2dur) → columns of a manifest."""

import re
from pathlib import Path

from w2v2.errors import UserError

SPACES = " \t\r\n"  # a no-break space and its like may stand in a name


def read_kaldi(folder: Path) -> dict[str, list]:
    """Columns of a manifest: id, audio, and duration, start, end, text and speaker where the folder tells them.

    Utterances are the lines of `segments`, or else those of `wav.scp`; one that a file does not name gets None there.
    Raises UserError for pipes and archives, for files that are empty or do not parse, and for names that come twice.
    """
    scp = folder / "wav.scp"
    recordings = _read_pairs(scp)
    for name, audio in recordings.items():
        if audio.endswith("|") or re.search(r"\.ark:\d+$", audio):
            kind = "is a shell pipe, which is never run" if audio.endswith("|") else f"lies in an archive, {audio}"
            raise UserError(f"{scp}: entry {name!r} {kind}: write the audio to files and list those")
    columns = {"id": list(recordings), "audio": list(recordings.values())}
    files = {"duration": "utt2dur", "text": "text", "speaker": "utt2spk"}
    if (folder / "segments").exists():
        columns = _read_segments(folder / "segments", recordings)
        del files["duration"]
    for name, file in files.items():
        if (folder / file).exists():
            columns[name] = list(map(_read_pairs(folder / file).get, columns["id"]))
    return columns


def _read_segments(path: Path, recordings: dict[str, str]) -> dict[str, list]:
    """Lines of `utterance recording start end`, in seconds; an end of -1 is the recording's own."""
    columns: dict[str, list] = {"id": [], "audio": [], "start": [], "end": []}
    for name, fields in _read_pairs(path).items():
        try:
            recording, start, end = fields.split()[:3]
            row = (name, recordings[recording], start, None if float(end) == -1 else end)
        except (KeyError, ValueError):
            raise UserError(
                f"{path}: {name!r} needs a recording of wav.scp, a start and an end in seconds, not {fields!r}"
            ) from None
        for column, cell in zip(columns.values(), row, strict=True):
            column.append(cell)
    return columns


def _read_pairs(path: Path) -> dict[str, str]:
    """Lines of `name rest` in a file of Kaldi's → {name: rest}."""
    values: dict[str, str] = {}
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text: save it again with that encoding") from None
    for number, line in enumerate(lines, 1):
        name, *rest = re.split(f"[{SPACES}]+", line.strip(SPACES), maxsplit=1)
        if name in values:
            raise UserError(f"{path}: line {number} gives {name!r} a second time: remove one of them")
        if name:
            values[name] = rest[0] if rest else ""
    if not values:
        raise UserError(f"{path} is empty: write a line for each entry, or remove it")
    return values
