"""Kaldi data folders, packed folders and plain folders of audio files → columns of a manifest. Nothing found in them is ever run."""

import contextlib
import json
import os
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from w2v2.data.packed import SETTINGS, sha256_of
from w2v2.errors import UserError

KALDI_SPACES = " \t\r\n"  # a no-break space and its like may stand in a name
AUDIO_SUFFIXES = frozenset(".wav .flac .ogg .oga .opus .mp3 .aif .aiff .aifc .au .snd .sph .nist .w64 .caf".split())


def read_folder(folder: Path) -> tuple[dict[str, list], str]:
    """Columns of a folder's utterances, and what stands before its relative audio paths ("" in Kaldi's case).

    A folder with a `wav.scp` is Kaldi's. Any other is searched for audio files by suffix, all levels down; links are followed,
    hidden files left out, and the order is that of the relative paths.
    """
    if (folder / "wav.scp").exists():
        return _kaldi_columns(folder), ""
    paths, seen = [], set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(parent)) in seen:  # a link to where we have been
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        paths += [os.path.relpath(os.path.join(parent, name), folder) for name in names if _is_audio(name)]
    if not paths:
        suffixes = " ".join(sorted(AUDIO_SUFFIXES))
        raise UserError(f"folder {folder} holds no audio files ({suffixes}) and no wav.scp: check the path")
    for path in paths:
        if any("\ud800" <= letter <= "\udfff" for letter in path):
            raise UserError(f"folder {folder}: the file name {path!a} is not UTF-8 text: rename it")
    return {"audio": sorted(paths)}, os.path.abspath(folder)


def read_packed(index: Path) -> pa.Table | None:
    """A packed folder's index as `load_manifest` gives it: `id`, `audio`, `start`, `num_samples` and what else is there.

    None where it is no longer what pack_audio.py wrote: its cells then want checking like those of any manifest, which costs time
    and memory. Raises UserError where the packing was not finished.
    """
    if not index.exists():
        raise UserError(f"{index.parent} was not packed to its end: run the same pack_audio.py command again")
    written = None
    with contextlib.suppress(OSError, ValueError, AttributeError):
        written = json.loads((index.parent / SETTINGS).read_text(encoding="utf-8")).get("index_sha256")
    if written != sha256_of(index):
        return None
    table = pyarrow.parquet.read_table(index)
    columns = {name: table[name] for name in table.column_names}
    columns["audio"] = pc.binary_join_element_wise(os.path.join(os.path.abspath(index.parent), ""), table["audio"], "")
    start = pa.chunked_array([pa.repeat(0.0, len(table))])
    return pa.table({"id": columns.pop("id"), "audio": columns.pop("audio"), "start": start, **columns})


def _is_audio(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in AUDIO_SUFFIXES


def _kaldi_columns(folder: Path) -> dict[str, list]:
    """wav.scp with segments, text, utt2spk and utt2dur where they are there; an utterance not in `text` gets None."""
    scp = folder / "wav.scp"
    recordings = _pairs(scp)
    for name, audio in recordings.items():
        if audio.endswith("|"):
            raise UserError(
                f"{scp}: entry {name!r} is a shell pipe, which is never run: write the audio to files and list those"
            )
        if re.search(r"\.ark:\d+$", audio):
            raise UserError(
                f"{scp}: entry {name!r} lies in an archive, {audio}: write the audio to files and list those"
            )
    if (folder / "segments").exists():
        columns = _segments(folder / "segments", recordings)
    else:
        columns = {"id": list(recordings), "audio": list(recordings.values())}
        if (folder / "utt2dur").exists():
            columns["duration"] = list(map(_pairs(folder / "utt2dur").get, columns["id"]))
    for file, column in (("text", "text"), ("utt2spk", "speaker")):
        if (folder / file).exists():
            columns[column] = list(map(_pairs(folder / file).get, columns["id"]))
    return columns


def _segments(path: Path, recordings: dict[str, str]) -> dict[str, list]:
    """Lines of `utterance recording start end`, in seconds; an end of -1 is the recording's own."""
    columns: dict[str, list] = {"id": [], "audio": [], "start": [], "end": []}
    for name, fields in _pairs(path).items():
        try:
            recording, start, end = fields.split()[:3]
            end = None if float(end) == -1 else end
        except ValueError:
            raise UserError(
                f"{path}: {name!r} needs a recording, a start and an end in seconds, not {fields!r}"
            ) from None
        if recording not in recordings:
            raise UserError(f"{path}: {name!r} names the recording {recording!r}, which wav.scp lacks: add it there")
        for column, value in zip(columns, (name, recordings[recording], start, end), strict=True):
            columns[column].append(value)
    return columns


def _pairs(path: Path) -> dict[str, str]:
    """Lines of `name rest` → {name: rest}."""
    values: dict[str, str] = {}
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not (line := line.strip(KALDI_SPACES)):
                    continue
                name, *rest = re.split(f"[{KALDI_SPACES}]+", line, maxsplit=1)
                if name in values:
                    raise UserError(f"{path}: line {number} gives {name!r} a second time: remove one of them")
                values[name] = rest[0] if rest else ""
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text: save it again with that encoding") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if not values:
        raise UserError(f"{path} is empty: write a line for each entry, or remove it")
    return values
