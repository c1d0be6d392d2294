"""Tables of any length: worked through batch by batch, their text mapped from a file, numbers alone in memory.

Text is most of a manifest, some hundred bytes a row. What is read or changed of it goes to a nameless temporary file
(TMPDIR says where), which is mapped: the system keeps its pages as long as there is room, and the process owns none.
A table of one batch stays in memory.
"""

import mmap
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from w2v2.audio.crops import SAMPLING_RATE
from w2v2.audio.inspection import measure_lengths

BATCH_ROWS = 65_536
HASHED_ROWS = 4_096  # as Python's strings they fit into a processor's cache, and their memory is used again
LINE = "line in the file"  # a column of our own, beside those of a manifest


def map_tables(tables: Iterable[pa.Table]) -> list[pa.Table]:
    """The same tables, each mapped from the temporary file; a single one stays in memory."""
    tables = iter(tables)
    first = list(islice(tables, 2))
    if len(first) < 2:
        return first
    num_written = 0
    with tempfile.TemporaryFile() as file:
        for table in chain(first, tables):
            with pa.ipc.new_stream(file, table.schema) as stream:  # one after another: schemas may differ
                stream.write_table(table)
            num_written += 1
        file.flush()
        content = pa.BufferReader(pa.py_buffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)))
    return [pa.ipc.open_stream(content).read_all() for _ in range(num_written)]


def collect_rows(
    rows: Iterable[tuple[int | None, Any]], columns: Callable[[tuple], Iterable[tuple[str, Sequence[str | None]]]]
) -> pa.Table:
    """A table of text, of rows given as (line, cells); `columns` names those of a batch of cells.

    One batch alone exists as Python's objects.
    """
    rows = iter(rows)

    def tables() -> Iterator[pa.Table]:
        while batch := list(islice(rows, BATCH_ROWS)):
            lines, cells = zip(*batch, strict=True)
            named = {name: pa.array(column, pa.string()) for name, column in columns(cells)}
            yield pa.table({LINE: pa.array(lines, pa.int64())} | named)

    return pa.concat_tables(found, promote_options="default") if (found := map_tables(tables())) else pa.table({})


def _cut(columns: tuple[pa.ChunkedArray | pa.Array, ...], num_rows: int = BATCH_ROWS) -> list[pa.RecordBatch]:
    return pa.table(list(columns), list(map(str, range(len(columns))))).to_batches(num_rows)


def by_batch(function: Callable[..., pa.Array], *columns: pa.ChunkedArray | pa.Array) -> pa.ChunkedArray:
    """`function` of the columns, batch by batch; mapped where it gives other text than the first column has."""
    results: list[pa.Array | None] = []

    def changed() -> Iterator[pa.Table]:
        for batch in _cut(columns):
            result, before = function(*batch.columns), batch.column(0)
            is_text = pa.types.is_string(result.type)
            results.append(before if is_text and result.equals(before) else None if is_text else result)
            if results[-1] is None:
                yield pa.table({"text": result})

    mapped = iter(map_tables(changed()))
    return pa.chunked_array([next(mapped)["text"].chunk(0) if result is None else result for result in results])


def find_repeated(text: pa.ChunkedArray, *numbers: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """(rows,) bool: true for all rows that say the same as another one; seldom for others.

    Eight bytes a row stand for what it says, where a table of distinct values would hold all of the text again.
    """
    hashes, at = np.empty(len(text), np.int64), 0
    for batch in _cut((text, *numbers), HASHED_ROWS):
        some = hashes[at : at + len(batch)]
        some[:] = np.fromiter(map(hash, batch.column(0).to_numpy(zero_copy_only=False)), np.int64, len(batch))
        for column in batch.columns[1:]:
            some ^= pc.fill_null(column.cast(pa.float64()), 0.0).to_numpy().view(np.int64)
            some *= 0x1E3779B97F4A7C15  # wraps around
            some ^= some >> 32
        at += len(batch)
    ordered = np.sort(hashes)
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    return np.isin(hashes, twice) if len(twice) else np.zeros(len(hashes), bool)


def find_twice(text: pa.ChunkedArray) -> list[str]:
    """The first text that an earlier row says too, if there is one."""
    maybe = text.filter(pa.array(find_repeated(text))).to_pandas()
    return maybe[maybe.duplicated()].head(1).tolist()


def cut_table(table: pa.Table, kept: np.ndarray | None = None) -> Iterator[pa.Table]:
    """Its batches, without the rows where `kept`, (rows,) bool, is false."""
    for at in range(0, len(table), BATCH_ROWS):
        part = table.slice(at, BATCH_ROWS)
        yield part if kept is None else part.filter(pa.array(kept[at : at + BATCH_ROWS]))


def filter_rows(table: pa.Table, kept: np.ndarray) -> pa.Table:
    """The rows where `kept`, (rows,) bool, is true."""
    return pa.concat_tables(map_tables(cut_table(table, kept)))


def take_rows(table: pa.Table, rows: Iterable[int]) -> list[dict]:
    """A few rows; `Table.take` would copy whole columns of text."""
    return [table.slice(int(row), 1).to_pylist()[0] for row in rows]


def fill_lengths(
    table: pa.Table, measure: Callable[[str], int], cache_dir: str | Path | None
) -> tuple[pa.Table, list[dict]]:
    """Fill the nulls of `num_samples`; rows whose file cannot be measured come back as {id, audio, reason} instead."""
    unknown = pc.is_null(table["num_samples"]).combine_chunks()
    rows = table.filter(unknown).select(["id", "audio", "start"]).to_pylist()
    if not rows:
        return table, []
    found = measure_lengths(list(dict.fromkeys(row["audio"] for row in rows)), measure, cache_dir)
    skipped, lengths = [], []
    for row in rows:
        length, start = found[row["audio"]], round(row["start"] * SAMPLING_RATE)
        if isinstance(length, int) and length <= start:
            length = f"ends before {row['start']:g} s, where the row starts"
        if isinstance(length, str):
            skipped.append({"id": row["id"], "audio": row["audio"], "reason": length})
        lengths.append(None if isinstance(length, str) else length - start)
    filled = pc.replace_with_mask(table["num_samples"].combine_chunks(), unknown, pa.array(lengths, pa.int64()))
    table = table.set_column(table.column_names.index("num_samples"), "num_samples", filled)
    return filter_rows(table, filled.is_valid().to_numpy(zero_copy_only=False)), skipped
