"""Manifest files and folders of every kind → one table each, its columns as they stand there.

A new kind of manifest is one more reader in this file; `manifest.py` says what the columns mean. Text goes row by row
through Python's own csv and json: no cell is guessed to be a number, a date or a missing value, and every message can
name its line. Nothing found in a file is ever run.
"""

import csv
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from w2v2.errors import UserError, one_line

AUDIO_SUFFIXES = frozenset(".wav .flac .ogg .oga .opus .mp3 .aif .aiff .aifc .au .snd .sph .nist .w64 .caf".split())
PACKED_MANIFEST = "manifest.parquet"  # in a folder that pack_audio.py wrote, beside its shards
LINE = "line in the file"  # a column of our own, beside those of the file
BATCH_ROWS = 65_536  # so many rows exist as Python's objects at a time
TSV_QUOTED = re.compile(r'"((?:[^"]|"")*)"')


@dataclass
class RawTable:
    """One manifest as it is written."""

    path: Path
    table: pa.Table  # the wanted columns, in lower case: text, or what a Parquet file holds; null for nothing
    found: list[str]  # all columns, as they are written
    root: str = ""  # fairseq's root, or the folder that was read: relative audio paths continue it

    def refuse(self, bad: pa.ChunkedArray, name: str, column: pa.ChunkedArray, remedy: str) -> None:
        """Raise UserError for the first row where `bad` is true, with what `column` holds there."""
        if (index := pc.index(bad, True).as_py()) >= 0:
            line = self.table[LINE][index].as_py() if LINE in self.table.column_names else None
            where = f"{self.path}: row {index + 1}" + (f" (line {line})" if line else "")
            raise UserError(f"{where}: {name} is {column[index].as_py()!r}: {remedy}")


def read_table(path: Path, wanted: Iterable[str]) -> RawTable:
    """One manifest file or folder, with the columns whose lower-case name is `wanted`. Raises UserError, with a remedy."""
    if not path.exists():
        raise UserError(f"manifest {path} does not exist: check the path (relative ones start at {os.getcwd()})")
    if not (read := _read_folder if path.is_dir() else READERS.get(path.suffix.lower())):
        kinds = f"{', '.join(READERS)}, or a folder of audio files"
        raise UserError(f"manifest {path} has the unknown suffix {path.suffix!r}: use {kinds}")
    try:
        raw = read(path, wanted := frozenset(wanted))
    except UnicodeDecodeError:
        raise UserError(f"manifest {path} holds text that is not UTF-8: save it again with that encoding") from None
    except UnicodeEncodeError as error:
        raise UserError(f"manifest {path}: {error.object!a} is not UTF-8 text: rename it") from None
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"manifest {path} cannot be read ({one_line(error)})") from None
    if not raw.table.num_rows:
        raise UserError(f"manifest {path} is empty: it has no rows; write one for each utterance")
    names = [name.lower() for name in raw.found]
    if twice := [name for name in names if name in wanted and names.count(name) > 1]:
        raise UserError(f"manifest {path} has more than one column {twice[0]!r}: rename or remove one")
    raw.table = raw.table.rename_columns([name.lower() for name in raw.table.column_names])
    return raw


def _build_table(rows: Iterable[tuple[int | None, dict]], wanted: frozenset[str]) -> pa.Table:
    """The wanted columns as text, and the lines, of rows given as (line, {name: cell})."""
    rows, tables = iter(rows), []
    while batch := list(islice(rows, BATCH_ROWS)):
        columns = {LINE: pa.array([line for line, _ in batch], pa.int64())}
        for name in dict.fromkeys(name for _, row in batch for name in row if name.lower() in wanted):
            cells = (row.get(name) for _, row in batch)
            columns[name] = pa.array([cell if cell is None else str(cell) for cell in cells], pa.string())
        tables.append(pa.table(columns))
    return pa.concat_tables(tables, promote_options="default") if tables else pa.table({})


# -- files


def _read_delimited(path: Path, wanted: frozenset[str]) -> RawTable:
    """A header and rows, or fairseq's form of a .tsv: a root line, then `path⇥samples`."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        first, second = file.readline().rstrip("\r\n"), file.readline()
        file.seek(0)
        is_tsv = path.suffix.lower() == ".tsv"
        # SpeechBrain's older CSV files have spaces after their commas. Sentences in TSV files (Common Voice) begin with
        # lone quotes, which would swallow the rows after them.
        if is_csv := not is_tsv and ("\t" not in first or "," in first):
            reader = csv.reader(file, skipinitialspace=True, strict=True)
        else:
            reader = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE, strict=True)

        def rows() -> Iterator[tuple[int, dict]]:
            for number, cells in enumerate(filter(None, reader), 1):
                if len(cells) != len(found):
                    counts = f"row {number} (line {reader.line_num}) has {len(cells)} cells where the header has {len(found)}"
                    raise UserError(f"{path}: {counts}: put quotes round a value that holds the delimiter")
                yield reader.line_num, dict(zip(found, cells if is_csv else map(_unquote, cells), strict=True))

        try:
            if is_tsv and "\t" not in first and second.count("\t") == 1:
                next(reader)
                found, root = ["audio", "num_samples"], "" if first.strip() == "." else first.strip()
            else:
                found, root = [name.strip() for name in next(filter(None, reader), [])], ""
            return RawTable(path, _build_table(rows(), wanted), found, root)
        except csv.Error as error:
            where = f"{path}: line {reader.line_num}"
            raise UserError(f"{where} does not parse ({error}): mend the quotes there or in a line before") from None


def _unquote(cell: str) -> str:
    """A cell of a TSV that a writer quoted for the quotes within it."""
    return quoted[1].replace('""', '"') if (quoted := TSV_QUOTED.fullmatch(cell)) else cell


def _read_json(path: Path, wanted: frozenset[str]) -> RawTable:
    """A list of rows, SpeechBrain's object of id → row, or a row a line, whichever the suffix (NeMo says .json too)."""
    found: dict[str, None] = {}

    def rows() -> Iterator[tuple[int | None, dict]]:
        for line, row in entries:
            if not isinstance(row, dict):
                where = f"manifest {path}: " + (f"line {line}" if line else "an entry")
                raise UserError(f"{where} is not a JSON object {{…}}: write one for each utterance")
            found.update(dict.fromkeys(row))
            for name, cell in list(row.items()):
                if isinstance(cell, dict) and name.lower() in wanted:
                    # SpeechBrain's {"file", "start", "stop"} and datasets' {"path", "bytes"}
                    row |= {key: cell[key] for key in ("start", "stop") if key in cell}
                    row[name] = cell.get("file") or cell.get("path")
            yield line, row

    with open(path, encoding="utf-8-sig") as file:
        stripped = filter(None, map(str.strip, file))
        first, second = next(stripped, ""), next(stripped, "")
        file.seek(0)
        if second and first.startswith("{") and first.endswith("}"):
            entries = ((number, _parse(line, path, number)) for number, line in enumerate(file, 1) if line.strip())
        else:
            content = _parse(file.read(), path) if first else []
            if isinstance(content, dict):
                by_id = content and all(isinstance(row, dict) for row in content.values())
                content = [{"id": name, **row} for name, row in content.items()] if by_id else [content]
            if not isinstance(content, list):
                raise UserError(
                    f"manifest {path}: use a list of objects, an object of id → object, or an object a line"
                )
            entries = ((None, row) for row in content)
        table = _build_table(rows(), wanted)
    return RawTable(path, table, list(found))


def _parse(text: str, path: Path, line: int | None = None) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # the latter for brackets in brackets
        reason = getattr(error, "msg", "nested too deep, or a number too long")
        where = f"manifest {path}: line {line or getattr(error, 'lineno', 1)}"
        raise UserError(f"{where} is not valid JSON ({reason}): mend or remove it") from None


def _read_parquet(path: Path, wanted: frozenset[str], root: str = "") -> RawTable:
    with pyarrow.parquet.ParquetFile(path) as file:
        found = file.schema_arrow.names
        return RawTable(path, file.read([name for name in found if name.lower() in wanted]), found, root)


READERS = {
    ".csv": _read_delimited, ".tsv": _read_delimited, ".parquet": _read_parquet,
    ".json": _read_json, ".jsonl": _read_json, ".ndjson": _read_json,
}  # fmt: skip


# -- folders


def _read_folder(folder: Path, wanted: frozenset[str]) -> RawTable:
    """A Kaldi folder, one that pack_audio.py wrote, or any other: its audio files, all levels down."""
    root = os.path.abspath(folder)
    if (folder / "wav.scp").exists():
        rows, root = _read_kaldi(folder), ""
    elif (folder / PACKED_MANIFEST).exists():
        return _read_parquet(folder / PACKED_MANIFEST, wanted, root)
    elif next(folder.glob("shard-*.wav"), None):
        raise UserError(f"folder {folder} was not packed to its end: run the same pack_audio.py command again")
    elif not (rows := [{"audio": path} for path in find_audio(folder)]):
        raise UserError(f"folder {folder} holds no audio files and no wav.scp: check the path, or name a manifest")
    return RawTable(folder, _build_table(((None, row) for row in rows), wanted), list(rows[0]), root)


def find_audio(folder: Path) -> list[str]:
    """Relative paths of a folder's audio files, sorted. Links are followed, hidden files left out."""
    paths, seen = [], set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(parent)) in seen:  # a link to where we have been
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        audio = (name for name in names if name[0] != "." and os.path.splitext(name)[1].lower() in AUDIO_SUFFIXES)
        paths += [os.path.relpath(os.path.join(parent, name), folder) for name in audio]
    return sorted(paths)


def _read_kaldi(folder: Path) -> list[dict]:
    """A row for each line of `segments`, or else of `wav.scp`; `text`, `utt2spk` and `utt2dur` tell more of them."""
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
            recording, start, end, *_ = *fields.split(), "", "", ""
            if recording not in recordings or not end:
                needs = f"{name!r} needs a recording of wav.scp, a start and an end in seconds"
                raise UserError(f"{segments}: {needs}, not {fields!r}")
            end = None if end in ("-1", "-1.0") else end  # that of the recording
            rows.append({"id": name, "audio": recordings[recording], "start": start, "end": end})
    for file, column in further.items():
        values = _read_pairs(folder / file) if (folder / file).exists() else {}
        for row in rows if values else ():
            row[column] = values.get(row["id"])
    return rows


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
