"""Manifest files and folders of every kind → one table each, its columns as they stand there.

A new kind of manifest is one more reader in this file; `manifest.py` says what the columns mean. Text goes row by row
through Python's own csv and json: no cell is guessed to be a number, a date or a missing value, and every message can
name its line. Nothing found in a file is ever run.
"""

import csv
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from w2v2.audio.crops import AUDIO_SUFFIXES
from w2v2.errors import UserError, one_line
from w2v2.manifests.columns import read_name
from w2v2.manifests.folders import find_audio, read_kaldi
from w2v2.manifests.json_rows import read_rows
from w2v2.manifests.tables import BATCH_ROWS, LINE, collect_rows, map_tables

PACKED_MANIFEST = "manifest.parquet"  # in a folder that pack_audio.py wrote, beside its shards
QUOTED = r'"((?:[^"]|"")*)"'
AUDIO_CELL = re.compile(rf".*({'|'.join(map(re.escape, AUDIO_SUFFIXES))})", re.IGNORECASE)
CSV_ROW = re.compile(rf' *+({QUOTED}|[^",]*+)(, *+({QUOTED}|[^",]*+))*+')  # possessive: in time linear in its length


@dataclass
class RawTable:
    """One manifest as it is written."""

    path: Path
    table: pa.Table  # the wanted columns, in lower case: text, or what a Parquet file holds; null for nothing
    found: list[str]  # all columns, as they are written
    root: str = ""  # fairseq's root, or the folder that was read: relative audio paths continue it
    passed_over: dict[str, int] = field(default_factory=dict)  # files of a folder that are no audio, by suffix
    warnings: list[str] = field(default_factory=list)

    def refuse(self, bad: pa.ChunkedArray, name: str, column: pa.ChunkedArray, remedy: str) -> None:
        """Raise UserError for the first row where `bad` is true, with what `column` holds there."""
        if (index := pc.index(bad, True).as_py()) >= 0:
            raise UserError(f"{self.path}: {self.where(index)}: {name} is {column[index].as_py()!r}: {remedy}")

    def where(self, index: int) -> str:
        """A row, counted from 1, and its line in the file."""
        line = self.table[LINE][index].as_py() if LINE in self.table.column_names else None
        return f"row {index + 1}" + (f" (line {line})" if line else "")


def read_table(path: Path, wanted: Callable[[str], bool]) -> RawTable:
    """One manifest file or folder, with the columns whose lower-case name is `wanted`. Raises UserError, with a remedy."""
    if not path.exists():
        raise UserError(f"manifest {path} does not exist: check the path (relative ones start at {os.getcwd()})")
    if not (read := _read_folder if path.is_dir() else READERS.get(find_suffix(path))):
        kinds = f"{', '.join(READERS)}, .tar, or a folder of audio files"
        raise UserError(f"manifest {path} has the unknown suffix {path.suffix!r}: use {kinds}")
    try:
        raw = read(path, wanted)
    except UnicodeDecodeError:
        raise UserError(f"manifest {path} holds text that is not UTF-8: save it again with that encoding") from None
    except UnicodeEncodeError as error:
        raise UserError(f"manifest {path}: {error.object!a} is not UTF-8 text: rename it") from None
    except (OSError, EOFError, zlib.error, pa.ArrowInvalid) as error:
        raise UserError(f"manifest {path} cannot be read ({one_line(error)})") from None
    if not raw.table.num_rows:
        raise UserError(f"manifest {path} is empty: it has no rows; write one for each utterance")
    names = [name.lower() for name in raw.found]
    if twice := [name for name in names if wanted(name) and names.count(name) > 1]:
        raise UserError(f"manifest {path} has more than one column {twice[0]!r}: rename or remove one")
    raw.table = raw.table.rename_columns([name.lower() for name in raw.table.column_names])
    return raw


def find_suffix(path: Path) -> str:
    """In lower case, `.jsonl.gz` as one; a key of `READERS`."""
    return "".join(path.suffixes[-2:] if path.suffix.lower() == ".gz" else path.suffixes[-1:]).lower()


def _build_table(rows: Iterable[tuple[int | None, dict]], wanted: Callable[[str], bool]) -> pa.Table:
    """The wanted columns as text, and the lines, of rows given as (line, {name: cell})."""

    def columns(rows: tuple[dict, ...]) -> Iterator[tuple[str, list[str | None]]]:
        for name in filter(lambda name: wanted(name.lower()), dict.fromkeys(name for row in rows for name in row)):
            is_time = read_name(name.lower())  # of which NaN is refused
            cells = (row.get(name) for row in rows)
            yield name, [None if x is None or x != x and not is_time else str(x) for x in cells]

    return collect_rows(rows, columns)


# -- files


def _read_delimited(path: Path, wanted: Callable[[str], bool]) -> RawTable:
    """A header and rows, or fairseq's form of a .tsv: a root line, then `path⇥samples`."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        first, second = file.readline().rstrip("\r\n"), file.readline()
        file.seek(0)
        is_tsv = path.suffix.lower() == ".tsv"
        lines: list[str] = []  # of the row that is being read
        # SpeechBrain's older CSV files have spaces after their commas. Sentences in TSV files (Common Voice) begin with
        # lone quotes, which would swallow the rows after them.
        if is_csv := not is_tsv and ("\t" not in first or "," in first):
            reader = csv.reader(_keep_lines(file, lines), skipinitialspace=True, strict=True)
        else:
            reader = csv.reader(_keep_lines(file, lines), delimiter="\t", quoting=csv.QUOTE_NONE, strict=True)

        def rows() -> Iterator[tuple[int, list[str]]]:
            number = 0
            for cells in reader:
                line = reader.line_num - len(lines) + 1
                number += bool(cells)
                if cells and len(cells) != len(found):
                    counts = f"row {number} (line {line}) has {len(cells)} cells where the header has {len(found)}"
                    raise UserError(f"{path}: {counts}: put quotes round a value that holds the delimiter")
                if is_csv and '"' in lines[0]:
                    _check_quotes(path, line, lines, len(found))
                lines.clear()
                if cells:
                    yield line, cells if is_csv else list(map(_unquote, cells))

        def columns(rows: tuple[list[str], ...]) -> Iterator[tuple[str, tuple[str, ...]]]:
            named = dict(zip(found, zip(*rows, strict=True), strict=True))  # of two of a name, `read_table` tells
            return ((name, cells) for name, cells in named.items() if wanted(name.lower()))

        try:
            if is_tsv and "\t" not in first and second.count("\t") == 1:
                next(reader)
                found, root = ["audio", "num_frames"], "" if first.strip() == "." else first.strip()
            else:
                found, root = [name.strip() for name in next(filter(None, reader), [])], ""
            if len(found) == 1 and (other := re.search(r"[;,|\t]", found[0])):
                remedy = f"separate them by {reader.dialect.delimiter!r} in a {path.suffix} file"
                raise UserError(f"{path}: the cells of its header are separated by {other[0]!r}: {remedy}")
            lines.clear()
            return RawTable(path, collect_rows(rows(), columns), found, root)
        except csv.Error as error:
            where = f"{path}: line {reader.line_num - len(lines) + 1}"
            raise UserError(f"{where} does not parse ({error}): mend the quotes in this row") from None


def _keep_lines(file: Iterable[str], lines: list[str]) -> Iterator[str]:
    for line in file:
        lines.append(line)
        yield line


def _check_quotes(path: Path, line: int, lines: list[str], num_columns: int) -> None:
    """Raise UserError for quotes within a cell, which Python's csv lets pass, and for those that close rows below."""
    where = f"{path}: line {line}"
    if not CSV_ROW.fullmatch("".join(lines).rstrip("\r\n")):
        raise UserError(f'{where} has a stray quote: put quotes round the whole cell, and write a quote in it as ""')
    for further in lines[1:]:
        cells = [cell.strip(' "\r\n') for cell in further.split(",")]
        if len(cells) == num_columns and any(map(AUDIO_CELL.fullmatch, cells)):
            raise UserError(
                f"{where}: a quote opens here and closes {len(lines) - 1} rows below: close it, or remove both"
            )


def _unquote(cell: str) -> str:
    """A cell of a TSV that a writer quoted for the quotes within it."""
    return quoted[1].replace('""', '"') if (quoted := re.fullmatch(QUOTED, cell)) else cell


def _read_json(path: Path, wanted: Callable[[str], bool]) -> RawTable:
    found, warnings = {}, []

    def rows() -> Iterator[tuple[int | None, dict]]:
        for line, row in read_rows(path, wanted, warnings):
            found.update(dict.fromkeys(row))
            yield line, row

    table = _build_table(rows(), wanted)
    return RawTable(path, table, list(found), warnings=warnings)


def _read_parquet(path: Path, wanted: Callable[[str], bool], root: str = "") -> RawTable:
    """Its columns as they are; of `{bytes, path}`, as `datasets` writes audio, the paths."""
    with pyarrow.parquet.ParquetFile(path) as file:
        found = file.schema_arrow.names
        names = [name for name in found if wanted(name.lower())]
        kinds = {name: file.schema_arrow.field(name).type for name in names}
        of_audio = [
            name for name, kind in kinds.items() if pa.types.is_struct(kind) and kind.get_field_index("path") >= 0
        ]
        if any(_holds_values(file, f"{name}.bytes") for name in of_audio):
            remedy = "give its folder as --dataset_name, or pretrain with --streaming"
            raise UserError(f"manifest {path} holds the audio itself, in its column {', '.join(of_audio)}: {remedy}")
        leaves = [f"{name}.path" if name in of_audio else name for name in names]
        if not leaves or file.metadata.num_rows <= BATCH_ROWS:
            table = file.read(leaves)
        else:
            table = pa.concat_tables(map_tables(map(pa.table, file.iter_batches(BATCH_ROWS, columns=leaves))))
    for name in of_audio:
        paths = pc.struct_field(table[name], "path")
        table = table.set_column(table.column_names.index(name), name, paths)
    return RawTable(path, table, found, root)


def _holds_values(file: pyarrow.parquet.ParquetFile, leaf: str) -> bool:
    """Whether a part of a column is ever not null, by the file's own statistics."""
    groups = (file.metadata.row_group(group) for group in range(file.num_row_groups))
    parts = (group.column(column) for group in groups for column in range(group.num_columns))
    own = [part for part in parts if part.path_in_schema == leaf]
    return any(part.statistics is None or part.statistics.null_count != part.num_values for part in own)


READERS = {
    ".csv": _read_delimited, ".tsv": _read_delimited, ".parquet": _read_parquet,
    ".json": _read_json, ".jsonl": _read_json, ".ndjson": _read_json, ".json.gz": _read_json, ".jsonl.gz": _read_json,
}  # fmt: skip


# -- folders


def _read_folder(folder: Path, wanted: Callable[[str], bool]) -> RawTable:
    """A Kaldi folder, one that pack_audio.py wrote, or any other: its audio files, all levels down."""
    root, passed_over, warnings = os.path.abspath(folder), {}, []
    if (folder / "wav.scp").exists():
        (rows, warnings), root = read_kaldi(folder), ""
    elif (folder / PACKED_MANIFEST).exists():
        return _read_parquet(folder / PACKED_MANIFEST, wanted, root)
    elif next(folder.glob("shard-*.wav"), None):
        raise UserError(f"folder {folder} is an unfinished packing: run the same pack_audio.py command again")
    else:
        paths, passed_over = find_audio(folder)
        rows = [{"audio": path} for path in paths]
    if not rows:
        tars = f"its tars as '{folder}/*.tar'" if ".tar" in passed_over else "a manifest"
        raise UserError(f"folder {folder} holds no audio files and no wav.scp: check the path, or name {tars}")
    found = list(dict.fromkeys(name for row in rows for name in row))
    return RawTable(folder, _build_table(((None, row) for row in rows), wanted), found, root, passed_over, warnings)
