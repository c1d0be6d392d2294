"""Manifest files of every kind → one Arrow table a file, its columns as they stand there.

What the columns mean is `manifest.py`'s business. Big CSV, TSV, JSONL and Parquet files go through Arrow's own readers; what those
refuse is read again row by row in Python, which is more forgiving and can name the line that is at fault.
"""

import csv
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from w2v2.errors import UserError

NUMERIC = frozenset("duration duration_seconds length num_samples frames num_frames start offset stop end".split())
MOST_BYTES = 1 << 14  # of a line that Arrow may parse as JSON
JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")


@dataclass
class RawTable:
    """One manifest: `table` holds the wanted columns, names in lower case; `found` all names as they are written."""

    path: Path
    table: pa.Table
    base: Path  # where relative audio paths start if no --data_root is given
    found: list[str]
    prefix: str = ""  # fairseq's root or the scanned folder: stands before every relative audio path
    line_of: Callable[[int], int] | None = None  # row index → line number, where rows are lines

    def row(self, index: int) -> str:
        """How a message names a row: counted from 1 without the header, and its line in the file where there is one."""
        line = "" if self.line_of is None else f" (line {self.line_of(index)})"
        return f"{self.path}: row {index + 1}{line}"


def read_table(path: Path, wanted: Iterable[str]) -> RawTable:
    """Read one manifest file, keeping the columns whose lower-case name is `wanted`.

    Raises UserError, in one line with the file and its remedy, for whatever does not exist, is empty or does not parse.
    """
    wanted = frozenset(wanted)
    if not path.exists():
        raise UserError(f"manifest {path} does not exist: check the path (relative ones start at {os.getcwd()})")
    suffix = path.suffix.lower()
    if suffix not in (".csv", ".tsv", ".parquet", *JSON_SUFFIXES):
        raise UserError(
            f"manifest {path} has the unknown suffix {suffix!r}: use .csv, .tsv, .json, .jsonl or .parquet,"
            " a Kaldi folder or a folder of audio files"
        )
    try:
        if not _first_line(path, binary=suffix == ".parquet"):
            raise UserError(f"manifest {path} is empty: write a header and a row for each utterance")
        if suffix == ".parquet":
            raw = _read_parquet(path, wanted)
        elif suffix in JSON_SUFFIXES:
            raw = _read_json(path, wanted)
        else:
            raw = _read_fairseq(path) or _read_delimited(path, wanted)
    except UnicodeError:
        raise UserError(f"manifest {path} is not UTF-8 text: save it again with that encoding") from None
    except OSError as error:
        raise UserError(f"manifest {path} cannot be read: {error.strerror or error}") from None
    if not raw.table.num_rows and raw.table.num_columns:
        raise UserError(f"manifest {path} has no rows: write a row for each utterance")
    return raw


def _first_line(path: Path, binary: bool = False) -> str:
    """The first line that is not blank, without its line break; "" where there is none."""
    if binary:
        return "binary" if path.stat().st_size else ""
    with open(path, encoding="utf-8-sig") as file:
        return next((line.rstrip("\r\n") for line in file if line.strip()), "")


def _read_parquet(path: Path, wanted: frozenset[str]) -> RawTable:
    try:
        found = pyarrow.parquet.read_schema(path).names
        table = pyarrow.parquet.read_table(path, columns=[name for name in found if name.lower() in wanted])
    except pa.ArrowInvalid as error:
        raise UserError(f"manifest {path} is not a Parquet file: {_one_line(error)}") from None
    return RawTable(path, _lower(table, path), path.parent, found)


def _read_delimited(path: Path, wanted: frozenset[str]) -> RawTable:
    header = _first_line(path)
    delimiter = "\t" if path.suffix.lower() == ".tsv" or ("\t" in header and "," not in header) else ","
    names = next(csv.reader([header], delimiter=delimiter))
    found = [name.strip() for name in names]
    raw = RawTable(path, pa.table({}), path.parent, found, line_of=partial(_line_of, path, delimiter, 1))
    keep = [name for name in found if name.lower() in wanted]
    if not _lower_names(keep, path):
        return raw
    spaced = any(name.startswith(" ") for name in names)  # SpeechBrain's older "ID, duration, wav"
    try:
        if spaced:
            raise pa.ArrowInvalid("Arrow cannot skip the space before a quote")
        table = _arrow_csv(path, delimiter, keep)
    except (pa.ArrowInvalid, pa.ArrowKeyError):
        table = _columns(_named_rows(path, delimiter, found), keep)
    raw.table = _lower(table, path)
    return raw


def _arrow_csv(path: Path, delimiter: str, keep: list[str], names: list[str] | None = None) -> pa.Table:
    """The columns to `keep`, as text; `names` where the first line is no header."""
    comma = delimiter == ","
    table = pyarrow.csv.read_csv(
        path,
        read_options=pyarrow.csv.ReadOptions(column_names=names, skip_rows=1 if names else 0),
        # Sentences in TSV files (Common Voice) begin with lone quotes that would swallow the rows after them.
        parse_options=pyarrow.csv.ParseOptions(
            delimiter=delimiter, quote_char='"' if comma else False, newlines_in_values=comma
        ),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types={name: pa.string() for name in keep}, include_columns=keep, strings_can_be_null=False
        ),
    )
    tidy = pc.utf8_ltrim_whitespace if comma else _unquoted  # a space after a comma belongs to no cell
    return pa.table({name: tidy(table[name]) for name in keep})


def _unquoted(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Cells that a CSV writer quoted for the quotes within them, in a TSV that is read without quoting."""
    quoted = pc.match_substring_regex(column, r'^"([^"]|"")*"$')
    if not pc.any(quoted).as_py():
        return column
    inner = pc.replace_substring(pc.utf8_slice_codeunits(column, 1, -1), '""', '"')
    return pc.if_else(quoted, inner, column)


def _text_rows(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Line number and cells of every row that is not blank, read by Python, header included."""
    quoting = csv.QUOTE_MINIMAL if delimiter == "," else csv.QUOTE_NONE
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, quoting=quoting, skipinitialspace=True)
        try:
            yield from ((reader.line_num, cells) for cells in reader if cells)
        except csv.Error as error:
            raise UserError(f"{path}: line {reader.line_num} does not parse: {error}") from None


def _line_of(path: Path, delimiter: str, header_lines: int, index: int) -> int:
    return next(islice(_text_rows(path, delimiter), index + header_lines, None))[0]


def _named_rows(path: Path, delimiter: str, found: list[str]) -> Iterator[dict]:
    for number, (line, cells) in enumerate(_text_rows(path, delimiter)):
        if len(cells) != len(found):
            raise UserError(
                f"{path}: row {number} (line {line}) has {len(cells)} cells where the header has {len(found)}:"
                " put quotes round a value that holds the delimiter"
            )
        if number:
            yield dict(zip(found, cells, strict=True))


def _read_fairseq(path: Path) -> RawTable | None:
    """fairseq's manifest (a root line, then `path⇥samples`), or None where the file is not one."""
    with open(path, encoding="utf-8-sig") as file:
        root, second = file.readline().strip(), file.readline()
    if "\t" in root or second.count("\t") != 1:
        return None
    names = ["audio", "num_samples"]
    try:
        table = _arrow_csv(path, "\t", names, names)
    except pa.ArrowInvalid as error:
        raise UserError(f"{path}: every line after the first must be path, tab, samples: {_one_line(error)}") from None
    prefix = "" if root in ("", ".") else root
    return RawTable(path, table, path.parent, names, prefix, partial(_line_of, path, "\t", 1 if root else 0))


def _read_json(path: Path, wanted: frozenset[str]) -> RawTable:
    """A JSON list of rows, SpeechBrain's object of id → row, or a row a line, whichever the suffix (NeMo says .json too)."""
    with open(path, encoding="utf-8-sig") as file:
        lines = (line for line in file if line.strip())
        first, second = next(lines).strip(), next(lines, "").strip()
    by_line = first.startswith("{") and first.endswith("}")
    if by_line and not second:
        by_line = not _is_object_of_rows(_parsed(path, first, 1))
    if by_line:
        line_of = partial(_json_line_of, path)
        row = next(_json_lines(path))
        try:
            table = _arrow_jsonl(path, row, wanted)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError):
            return _raw_from_rows(path, _json_lines(path), wanted, line_of)
        return RawTable(path, _lower(table, path), path.parent, list(row), line_of=line_of)
    content = _parsed(path, path.read_text(encoding="utf-8-sig"), None)
    if _is_object_of_rows(content):
        content = [{"id": name, **row} for name, row in content.items()]
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise UserError(f"manifest {path}: use a list of objects, an object of id → object, or an object a line")
    return _raw_from_rows(path, content, wanted)


def _is_object_of_rows(content: object) -> bool:
    return isinstance(content, dict) and bool(content) and all(isinstance(row, dict) for row in content.values())


def _parsed(path: Path, text: str, line: int | None):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {line or error.lineno}, column {error.colno}"
        raise UserError(f"manifest {path}: {where} is not valid JSON ({error.msg}): mend or remove it") from None
    except (RecursionError, ValueError):  # brackets in brackets; a number of thousands of digits
        where = f"line {line} is" if line else "it is"
        raise UserError(
            f"manifest {path}: {where} JSON that no manifest needs, too deep or too long: remove it"
        ) from None


def _json_lines(path: Path) -> Iterator[dict]:
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            row = _parsed(path, line, number)
            if not isinstance(row, dict):
                raise UserError(f"manifest {path}: line {number} is not a JSON object {{…}}: write one object a line")
            yield row


def _json_line_of(path: Path, index: int) -> int:
    with open(path, encoding="utf-8-sig") as file:
        return next(islice((number for number, line in enumerate(file, 1) if line.strip()), index, None))


def _arrow_jsonl(path: Path, first: dict, wanted: frozenset[str]) -> pa.Table:
    """Fast path: the wanted names of the first row declared, so that Arrow takes no id for a timestamp. Raises where a type differs."""
    with open(path, "rb") as file:
        if max(map(len, file)) > MOST_BYTES:
            raise pa.ArrowInvalid("a line so long may hold so many brackets in brackets that Arrow's stack overflows")
    names = [name for name in first if name.lower() in wanted]
    schema = pa.schema([(name, pa.float64() if name.lower() in NUMERIC else pa.string()) for name in names])
    table = pyarrow.json.read_json(path, parse_options=pyarrow.json.ParseOptions(explicit_schema=schema))
    table = table.select([name for name in table.column_names if name.lower() in wanted])
    for column in table.schema:
        if column.type not in (pa.string(), pa.float64(), pa.int64(), pa.null()):
            raise pa.ArrowTypeError(f"{column.name} came later, as {column.type}")
    return table


def _raw_from_rows(path: Path, rows: Iterable[dict], wanted: frozenset[str], line_of=None) -> RawTable:
    found: dict[str, None] = {}
    kept = []
    for row in rows:
        found.update(dict.fromkeys(row))
        row = {name.lower(): value for name, value in row.items() if name.lower() in wanted}
        for name, value in list(row.items()):
            if isinstance(value, dict):  # SpeechBrain's {"file", "start", "stop"}, datasets' {"path", "bytes"}
                row |= {key: value[key] for key in ("start", "stop") if key in value}
                row[name] = value.get("file") or value.get("path")
        kept.append(row)
    names = dict.fromkeys(name for row in kept for name in row)
    return RawTable(path, _columns(kept, names), path.parent, list(found), line_of=line_of)


def _columns(rows: Iterable[dict], names: Iterable[str]) -> pa.Table:
    columns: dict[str, list] = {name: [] for name in names}
    for row in rows:
        for name, values in columns.items():
            value = row.get(name)
            values.append(value if value is None or isinstance(value, str) else str(value))
    return pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})


def _lower(table: pa.Table, path: Path) -> pa.Table:
    return table.rename_columns(_lower_names(table.column_names, path))


def _lower_names(names: list[str], path: Path) -> list[str]:
    names = [name.lower() for name in names]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"manifest {path} has more than one column {sorted(twice)[0]!r}: rename or remove one")
    return names


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
