"""Any manifest or folder of audio → one table of utterances whose lengths are known.

Columns are understood by name, upper or lower case, whichever toolkit wrote them (`columns`). What is decided here:

- A row without an id gets its path as written (and `:start` in samples, `#2` if it comes twice). An id twice in one
  manifest is an error; manifests that share ids get theirs prefixed with `<manifest's name>/`.
- Rows that say the same audio twice are an error.
- `channel` is a number or a letter (A, B, or L, R); null for all mixed. Numbers count from 0; or from 1 where the
  manifests of a call have 1 and others, but no 0. Where that is open (1 alone), it is an error.
- Text, speaker and label are "" where a row, or one of several manifests, has none.
"""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from w2v2.audio.crops import SAMPLING_RATE, measure_length
from w2v2.audio.inspection import NUM_INSPECTED, measure_lengths
from w2v2.errors import UserError, tell
from w2v2.manifests.archives import gather_tars, read_tars
from w2v2.manifests.columns import COLUMNS, EXTRAS, LETTERS, OURS, may_be_segment
from w2v2.manifests.dataset_loading import DatasetSource, Manifest
from w2v2.manifests.folders import say_passed_over
from w2v2.manifests.hub_datasets import read_dataset
from w2v2.manifests.readers import RawTable, read_table
from w2v2.manifests.segments import Measure, cast_text, find_extents, merge_aliases
from w2v2.manifests.tables import BATCH_ROWS, by_batch, fill_lengths, filter_rows, find_repeated, find_twice, take_rows

ROOT_MARKER = r"^(\$?\{data_root\}|\$data_root)/+"  # at the head of SpeechBrain's paths
CHANNELS = {"L": 0, "R": 1, "LEFT": 0, "RIGHT": 1} | {letter: number for number, letter in enumerate(LETTERS)}


def read_manifests(
    paths: Sequence[Manifest],
    *,
    data_root: str | None = None,
    cache_dir: str | Path | None = None,
    measure: Callable[[str], int] = measure_length,
    further: Sequence[str] = (),
    fill: bool = True,
) -> tuple[pa.Table, list[dict], dict[str, Any]]:
    """Read manifests, folders, tars and data sets into one table of utterances. Raises UserError.

    Returns the table; the files that could not be measured, as `{"id", "audio", "reason"}`; and what was met on the
    way: `warnings` (lines), `passed_over` (files of folders that are no audio, by suffix) and `samples` (a few rows of
    each manifest, evenly spread). Columns: `id` (unique), `audio` (absolute path), `start` (seconds), `num_samples` (at
    16 kHz), and where any manifest has them `channel` (an integer or null), `text`, `speaker`, `label` and, in lower
    case, the `further` columns as text. `measure` gives a file's length at 16 kHz or raises AudioError; its findings are
    kept in `cache_dir`. Without `fill`, lengths that no manifest tells are null.
    """
    data_root, sources = data_root and os.path.expanduser(data_root), {str(path): path for path in paths}
    names = list(map(str, paths))
    if not names:
        raise UserError("no manifest given: name at least one")
    if twice := {name for name, count in Counter(names).items() if count > 1}:
        raise UserError(f"manifest {sorted(twice)[0]} is given twice: name each once")
    if data_root is not None and not os.path.isdir(data_root):
        raise UserError(f"--data_root {data_root} is not a folder: name the folder that the audio paths start from")
    extras = [*EXTRAS, *dict.fromkeys(name.lower() for name in further if name.lower() not in OURS)]
    known = {alias for aliases in COLUMNS.values() for alias in aliases}.union(extras)
    measure_all = partial(measure_lengths, measure=measure, cache_dir=cache_dir)
    tables, warnings, passed_over, samples = {}, [], Counter(), {}

    def is_wanted(name: str) -> bool:
        return name in known or may_be_segment(name)

    for name, tars in gather_tars(names).items():
        if isinstance(source := sources.get(name), DatasetSource):
            raw = read_dataset(source, known, cache_dir)
        elif tars:
            raw = read_tars(name, tars, is_wanted, cache_dir)
        else:
            raw = read_table(Path(name).expanduser(), is_wanted)
        table, lines = interpret(raw, extras, data_root, measure_all)
        lines = raw.warnings + lines
        say_passed_over(raw.path, raw.passed_over)
        for line in lines:
            tell(line)
        tables[name] = table
        warnings += lines
        passed_over.update(raw.passed_over)
    lines = count_channels(tables)
    for name, table in tables.items():
        some = np.unique(np.linspace(0, len(table) - 1, min(len(table), NUM_INSPECTED)).astype(int))
        samples[name] = take_rows(table, some)
    table = _join(tables, extras)
    lines += count_shared(table) if len(tables) > 1 else []
    for line in lines:
        tell(line)
    table, skipped = fill_lengths(table, measure, cache_dir) if fill else (table, [])
    if skipped and not len(table):
        first = f"beginning with {skipped[0]['audio']}, which {skipped[0]['reason']}"
        remedy = "check the paths, and --data_root if they are relative"
        raise UserError(f"{', '.join(names)}: no audio file could be measured, {first}: {remedy}")
    return table, skipped, {"warnings": warnings + lines, "passed_over": dict(passed_over), "samples": samples}


def interpret(
    raw: RawTable, extras: Sequence[str], data_root: str | None, measure: Measure
) -> tuple[pa.Table, list[str]]:
    """One manifest in our columns and the `extras` (`num_samples` is null where it has to be measured), and warnings."""
    present = raw.table.column_names
    columns = {name: name for name in extras if name in present}
    given = {name: found for name, aliases in COLUMNS.items() if (found := [a for a in aliases if a in present])}
    columns |= {name: found[0] for name, found in given.items()}
    if "audio" not in columns:
        found, remedy = ", ".join(raw.found) or "none", f"name one of them {' or '.join(COLUMNS['audio'])}"
        raise UserError(f"manifest {raw.path} has no audio column: it has {found}; {remedy}")
    warnings = [line for found in given.values() for line in merge_aliases(raw, found)]
    # 1. Text, and the paths of the audio.
    named = [name for name in ("id", *extras) if name in columns]
    texts = {name: by_batch(pc.utf8_trim_whitespace, cast_text(raw, columns[name])) for name in named}
    written = cast_text(raw, columns["audio"])  # a file's name may begin with a space
    is_empty = by_batch(lambda paths: pc.equal(pc.utf8_trim_whitespace(paths), ""), written)
    raw.refuse(is_empty, "audio", written, "fill it in or remove the row")
    marked = pc.match_substring_regex(written, ROOT_MARKER)
    if data_root is None:
        raw.refuse(marked, "audio", written, "pass --data_root with the folder that its beginning stands for")
    elif pc.any(marked).as_py():  # replacing takes seven times as long as matching
        written = by_batch(lambda paths: pc.replace_substring_regex(paths, ROOT_MARKER, ""), written)
    audio = _resolve(raw, written, data_root)
    # 2. Which part of it.
    start, length, lines = find_extents(raw, audio, set(columns.values()), measure)
    parts = (length[at : at + BATCH_ROWS] for at in range(0, len(length), BATCH_ROWS))
    counts = [pa.array(np.round(part * SAMPLING_RATE), from_pandas=True).cast(pa.int64()) for part in parts]
    rows = {"audio": audio, "start": pa.array(start), "num_samples": pa.chunked_array(counts)}
    del start, length, counts
    if "channel" in columns:
        rows["channel"] = _read_channels(raw, columns["channel"])
    _refuse_equal(raw, pa.table(rows))
    names = _name_rows(raw, texts.pop("id", None), written, rows["start"])
    return pa.table({"id": names} | rows | texts), warnings + lines


def _read_channels(raw: RawTable, name: str) -> pa.ChunkedArray:
    """Numbers as they are written, letters as -1 (A), -2 (B), …; int32, null where nothing is said."""
    text = by_batch(lambda cells: pc.utf8_upper(pc.utf8_trim_whitespace(cells)), cast_text(raw, name))
    written = text.unique()  # a few
    cells = written.to_pandas().str.replace(r"^(?:CHANNEL|CHAN|CH)?[ _-]*([0-9]+)(?:\.0*)?$", r"\1", regex=True)
    letters = {letter: -1 - number for letter, number in CHANNELS.items()}
    numbers = cells.map(lambda cell: letters.get(cell, int(cell) if cell.isdecimal() and len(cell) < 4 else None))
    wrong = written.filter(pa.array(numbers.isna() & (cells != "")))
    remedy = "write a number from 0 or a letter, leave it empty, or rename the column"
    raw.refuse(pc.is_in(text, wrong), name, text, remedy)
    return pa.array(numbers.astype("Int32")).take(pc.index_in(text, written))


def count_channels(tables: dict[str, pa.Table]) -> list[str]:
    """Count the channels of all tables from 0, in place; a line where their numbers are taken to count from 1."""
    given = {name: table["channel"] for name, table in tables.items() if "channel" in table.column_names}
    numbers = sorted({n for column in given.values() for n in column.unique().to_pylist() if n is not None and n >= 0})
    first = int(bool(numbers) and numbers[0] > 0)
    where, spelled = ", ".join(given), " or ".join(map(str, numbers[:4]))
    if first and (numbers[0] > 1 or len(numbers) == 1):
        remedy = "write 0 or 1, or A or B; leave it empty where files are mono"
        raise UserError(f"{where}: channel is {spelled} wherever it is a number, counted from 0 or from 1: {remedy}")
    for name, written in given.items():
        letters = pc.subtract(pa.scalar(-1, pa.int32()), written)
        from_zero = pc.subtract(written, pa.scalar(first, pa.int32()))
        counted = pc.if_else(pc.less(written, 0), letters, from_zero)
        tables[name] = tables[name].set_column(tables[name].column_names.index("channel"), "channel", counted)
    return [f"{where}: channel is read as counted from 1, because it is {spelled}, never 0"] if first else []


def count_shared(table: pa.Table) -> list[str]:
    """A line where several manifests or sources say the same audio: within one of them that is an error."""
    rows = table.select([name for name in OURS[1:5] if name in table.column_names])
    again = filter_rows(rows, find_repeated(*rows.columns)).to_pandas().duplicated()
    if not again.any():
        return []
    return [f"{again.sum():,} rows name audio that another manifest or source names too: it is heard once for each"]


def _refuse_equal(raw: RawTable, rows: pa.Table) -> None:
    """Raise UserError where rows say the same audio: columns with another name for the start are the usual cause."""
    maybe = find_repeated(*rows.columns)
    again = filter_rows(rows, maybe).to_pandas().duplicated()
    if again.any():
        row = int(np.flatnonzero(maybe)[again.argmax()])
        raise UserError(
            f"{raw.path}: {again.sum():,} rows repeat the audio, start and length of an earlier row, the first: {raw.where(row)}, "
            f"{rows['audio'][row]}: remove them, or name the columns of their segments start and stop"
        )


def _name_rows(
    raw: RawTable, ids: pa.ChunkedArray | None, written: pa.ChunkedArray, start: pa.Array
) -> pa.ChunkedArray:
    """The ids that the manifest gives; or else paths, with their start in samples, numbered where they come twice."""

    def add_start(paths: pa.Array, start: pa.Array) -> pa.Array:
        at = pa.array(np.round(start.to_numpy() * SAMPLING_RATE).astype(np.int64)).cast(pa.string())
        return pc.if_else(pc.greater(start, 0), pc.binary_join_element_wise(paths, at, ":"), paths)

    names = by_batch(add_start, written, start) if ids is None else ids
    raw.refuse(pc.equal(names, ""), "id", names, "give every row one, or remove the column")
    if not (maybe := find_repeated(names)).any():
        return names
    nth, series = np.ones(len(names), np.int64), names.filter(pa.array(maybe)).to_pandas()
    nth[maybe] = series.groupby(series).cumcount() + 1
    if ids is not None:
        raw.refuse(pa.array(nth > 1), "id", names, "an earlier row has it too, make it unique or remove the row")

    def add_number(names: pa.Array, nth: pa.Array) -> pa.Array:
        return pc.if_else(pc.equal(nth, 1), names, pc.binary_join_element_wise(names, nth.cast(pa.string()), "#"))

    return by_batch(add_number, names, pa.array(nth))


def _resolve(raw: RawTable, written: pa.ChunkedArray, data_root: str | None) -> pa.ChunkedArray:
    """Absolute paths: relative ones start at `data_root`, or else beside the manifest."""
    is_url = pc.match_substring_regex(written, r"^[A-Za-z][A-Za-z0-9+.-]*://")
    raw.refuse(is_url, "audio", written, "download the files of URLs and name those")
    beside = raw.path if raw.path.is_dir() else raw.path.parent
    base = os.path.join(os.path.abspath(beside if data_root is None else data_root), raw.root, "")

    @lru_cache
    def simplify(folder: str) -> str:
        """Without `.`, `..` and `//`, unless a link lies before the `..`: a file then has one name in all manifests."""
        plain = os.path.normpath(folder)
        return plain if os.path.realpath(plain) == os.path.realpath(folder) else folder

    def complete(paths: pa.Array) -> pa.Array:
        paths = pc.if_else(pc.starts_with(paths, os.sep), paths, pc.binary_join_element_wise(base, paths, ""))
        if not pc.any(is_roundabout := pc.match_substring_regex(paths, r"/\.{0,2}/")).as_py():
            return paths
        parts = map(os.path.split, paths.filter(is_roundabout).to_pylist())
        plain = pa.array([os.path.join(simplify(folder), name) for folder, name in parts], paths.type)
        return pc.replace_with_mask(paths, is_roundabout, plain)

    return by_batch(complete, written)


def _join(tables: dict[str, pa.Table], extras: Sequence[str]) -> pa.Table:
    """All tables in one; an extra column that one of them lacks is "" there."""
    whole = pa.concat_tables(tables.values(), promote_options="default")
    columns = {name: whole[name] for name in OURS[:5] if name in whole.column_names}
    given = [name for name in extras if name in whole.column_names]
    columns |= {name: by_batch(lambda texts: pc.fill_null(texts, ""), whole[name]) for name in given}
    if len(tables) > 1 and find_twice(whole["id"]):
        stems = [Path(name).absolute().stem for name in tables]
        labels = stems if len(set(stems)) == len(stems) else tables
        chunks = []
        for label, table in zip(labels, tables.values(), strict=True):
            named = by_batch(lambda ids, label=label: pc.binary_join_element_wise(label, ids, "/"), table["id"])
            chunks += named.chunks
        columns["id"] = pa.chunked_array(chunks)
        if twice := find_twice(columns["id"]):  # one folder lies in another of the same name
            both = f"{', '.join(tables)}: two utterances would have the id {twice[0]}"
            raise UserError(f"{both}: give the outer folder alone, or a sources file, where each has a name")
    return pa.table(columns)
