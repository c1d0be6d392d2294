"""Any manifest or folder of audio → one `datasets.Dataset` with known lengths.

Columns are understood by name, upper or lower case, whichever toolkit wrote them (`COLUMNS`). What is decided here:

- `duration` (seconds) comes before `num_samples` (at 16 kHz): seconds mean the same at every rate. Rows with neither are measured
  from the files' headers, once.
- `start` and NeMo's `offset` are seconds. Where whole-numbered `start` *and* `stop` stand beside SpeechBrain's `wav`, they are samples
  and also give the length, for VoxCeleb's `duration` there is that of the whole file. Elsewhere `stop` or `end` (seconds) serves
  rows without a duration.
- A row without an id gets its path as the manifest writes it (and `:start` in samples where there is one, `#2` if it comes twice).
  An id given twice in one manifest is an error; manifests that share ids get theirs prefixed with `<manifest's name>/`.
- Text, speaker and label are "" where a row, or one of several manifests, has none.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from w2v2.data.durations import measure_lengths
from w2v2.data.folders import read_folder, read_packed
from w2v2.data.packed import find_index
from w2v2.data.table_file import hold
from w2v2.data.tables import RawTable, read_table
from w2v2.errors import UserError

COLUMNS = {
    "audio": ("audio", "wav", "audio_filepath", "audio_path", "audio_file", "file_name", "filename", "file", "path"),
    "id": ("id", "utt_id", "utterance_id", "key"),
    "duration": ("duration", "duration_seconds", "length"),
    "num_samples": ("num_samples", "num_frames", "frames"),
    "start": ("start", "offset"),
    "stop": ("stop", "end"),
    "text": ("text", "wrd", "words", "transcript", "transcription", "sentence"),
    "speaker": ("speaker", "spk_id", "speaker_id", "client_id"),
    "label": ("label", "emo", "emotion"),
}
EXTRAS = ("text", "speaker", "label")
OURS = ("id", "audio", "start", "num_samples", *EXTRAS)
ROOT_MARKERS = ("${data_root}", "$data_root", "{data_root}")
MOST_SECONDS = 1e9  # of a start, stop or length: thirty years, so that samples can be counted in 64 bits
NUMBER = r"^(-?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?|[+-]?nan|[+-]?inf)$"


def load_manifest(
    paths: str | Sequence[str], *, cache_dir: str | Path | None = None, **options
) -> tuple[datasets.Dataset, list[dict]]:
    """`read_manifests` as a data set: memory-mapped from a file in `cache_dir`, or in memory where that is None."""
    table, skipped = read_manifests(paths, cache_dir=cache_dir, **options)
    return hold(table, cache_dir), skipped


def read_manifests(
    paths: str | Sequence[str],
    *,
    data_root: str | None = None,
    cache_dir: str | Path | None = None,
    num_workers: int = 0,
    probe: Callable[[str], int],
    sampling_rate: int = 16_000,
    further: Sequence[str] = (),
) -> tuple[pa.Table, list[dict]]:
    """Read manifests, Kaldi folders, packed folders or folders of audio files into one table of utterances.

    Returns the table and the files that could not be measured, as `{"id", "audio", "reason"}`. Columns: `id` (unique), `audio`
    (absolute path; whether it exists is not looked up), `start` (seconds), `num_samples` (at `sampling_rate`), and `text`,
    `speaker`, `label` where any manifest has them; so too, as text and in lower case, the `further` columns that are asked for.
    `probe` gives a file's length at `sampling_rate` and raises an exception with a `reason`; its findings are kept in `cache_dir`.
    `num_workers` threads measure (0: chosen from the number of cores).
    Raises UserError for whatever the user can mend: see `tables.read_table`; also columns, durations, ids, markers without a root.
    """
    data_root = None if data_root is None else os.path.expanduser(data_root)
    names = [os.fspath(path) for path in ([paths] if isinstance(paths, (str, os.PathLike)) else paths)]
    if not names:
        raise UserError("no manifest given: name at least one")
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"manifest {sorted(twice)[0]} is given twice: name each once")
    if data_root is not None and not os.path.isdir(data_root):
        raise UserError(f"--data_root {data_root} is not a folder: name the folder that the audio paths start from")
    extras = [*EXTRAS, *dict.fromkeys(name.lower() for name in further if name.lower() not in OURS)]
    tables = [_table(Path(name).expanduser(), extras, data_root, sampling_rate) for name in names]
    table = _concatenated(tables, names, extras)
    table, skipped = _measured(table, cache_dir, num_workers, probe, sampling_rate)
    if skipped and not len(table):
        raise UserError(
            f"{', '.join(names)}: no audio file could be measured, beginning with {skipped[0]['audio']}, which"
            f" {skipped[0]['reason']}: check the paths, and --data_root if they are relative"
        )
    return table, skipped


def _table(path: Path, extras: Sequence[str], data_root: str | None, sampling_rate: int) -> pa.Table:
    """One manifest in our columns and the `extras`; `num_samples` is null where it has to be measured."""
    wanted = {name for aliases in COLUMNS.values() for name in aliases}.union(extras)
    if index := find_index(path):
        table = read_packed(index)
        if table is not None:
            return table
        raw = _read(index, wanted)
        raw.prefix = os.path.abspath(index.parent)  # its addresses are the folder's own, whatever --data_root says
    else:
        raw = _read(path, wanted)
    return _utterances(raw, extras, data_root, sampling_rate)


def _read(path: Path, wanted: set[str]) -> RawTable:
    if not path.is_dir():
        return read_table(path, wanted)
    columns, prefix = read_folder(path)
    table = pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})
    return RawTable(path, table, path, list(columns), prefix)


def _utterances(raw: RawTable, extras: Sequence[str], data_root: str | None, sampling_rate: int) -> pa.Table:
    """What the columns of a manifest mean, and that every cell can be used."""
    columns = {}
    for name, aliases in COLUMNS.items():
        if present := [alias for alias in aliases if alias in raw.table.column_names]:
            columns[name] = raw.table[present[0]]
    further = {name: raw.table[name] for name in extras if name not in OURS and name in raw.table.column_names}
    if "audio" not in columns:
        raise UserError(
            f"manifest {raw.path} has no audio column: it has {', '.join(raw.found) or 'none'};"
            f" name one of them {' or '.join(COLUMNS['audio'])}"
        )
    written = _strings(raw, "audio", columns["audio"])
    if (empty := pc.index(pc.equal(pc.utf8_trim_whitespace(written), ""), True).as_py()) >= 0:
        raise UserError(f"{raw.row(empty)} has no audio path: fill it in or remove the row")
    start, num_samples = _extent(raw, columns, sampling_rate)
    table = {"id": _ids(raw, columns.get("id"), written, start, sampling_rate)}
    table |= {"audio": _resolved(raw, written, data_root), "start": start, "num_samples": num_samples}
    table |= {name: _strings(raw, name, columns[name]) for name in EXTRAS if name in columns}
    return pa.table(table | {name: _strings(raw, name, column) for name, column in further.items()})


def _strings(raw: RawTable, name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    try:
        column = column.cast(pa.string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise UserError(
            f"manifest {raw.path}: the column for {name} holds {column.type}, where text is expected: write it as text"
        ) from None
    column = pc.fill_null(column, "")
    return column if name == "audio" else pc.utf8_trim_whitespace(column)  # a file's name may begin with a space


def _numbers(raw: RawTable, name: str, column: pa.ChunkedArray, above: float, most: float) -> pa.ChunkedArray:
    """float64, null where the cell is empty; what is no number from `above` to `most` is an error that names its row."""
    if not (pa.types.is_floating(column.type) or pa.types.is_integer(column.type) or pa.types.is_decimal(column.type)):
        text = _strings(raw, name, column)
        text = pc.if_else(pc.equal(text, ""), None, text)
        bad = pc.invert(pc.match_substring_regex(text, NUMBER, ignore_case=True))
        if (index := pc.index(bad, True).as_py()) >= 0:
            raise UserError(
                f"{raw.row(index)}: {name} {text[index].as_py()!r} is not a number: mend it or leave it empty"
            )
        column = text
    column = column.cast(pa.float64())
    fine = pc.and_(pc.less_equal(column, most), pc.greater_equal(column, above))  # both false for NaN
    if (index := pc.index(fine, False).as_py()) >= 0:
        least = f"at most {most:g}" if column[index].as_py() > most else "0 or more" if above == 0 else "more than 0"
        raise UserError(
            f"{raw.row(index)}: {name} is {column[index].as_py():g}, which must be {least}: mend it or leave it empty"
        )
    return column


def _extent(raw: RawTable, columns: dict, sampling_rate: int) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    """Start in seconds (float64) and length in samples (int64, null where unknown) of every row."""
    sample = 1 / sampling_rate
    nothing = pa.chunked_array([pa.nulls(raw.table.num_rows, pa.float64())])

    def numbers(name, above, most=MOST_SECONDS):
        return _numbers(raw, name, columns[name], above, most) if name in columns else nothing

    most_samples = MOST_SECONDS * sampling_rate
    start, stop = (numbers(name, 0.0, most_samples) for name in ("start", "stop"))  # samples, perhaps
    start = pc.fill_null(start, 0.0)
    length = pc.divide(numbers("num_samples", 1.0, most_samples), float(sampling_rate))
    length = pc.coalesce(numbers("duration", sample / 2), length)
    between = pc.subtract(stop, start)
    in_samples = {"wav", "start", "stop"} <= set(raw.table.column_names) and _whole(start) and _whole(stop)
    if in_samples and not pc.all(pc.less(pc.abs(pc.subtract(between, length)), 1.0)).as_py():
        start, stop, between = (pc.divide(column, float(sampling_rate)) for column in (start, stop, between))
    else:
        in_samples = False
    if (index := pc.index(pc.less(between, sample / 2), True).as_py()) >= 0:
        raise UserError(f"{raw.row(index)} stops at {stop[index].as_py():g} s, not after its start: mend or remove it")
    length = pc.coalesce(between, length) if in_samples else pc.coalesce(length, between)
    return start, pc.round(pc.multiply(length, float(sampling_rate))).cast(pa.int64())


def _whole(column: pa.ChunkedArray) -> bool:
    return pc.all(pc.equal(column, pc.floor(column))).as_py() is not False


def _ids(raw: RawTable, ids, written: pa.ChunkedArray, start: pa.ChunkedArray, sampling_rate: int) -> pa.ChunkedArray:
    if ids is not None:
        ids = _strings(raw, "id", ids)
        if (index := pc.index(pc.equal(ids, ""), True).as_py()) >= 0:
            raise UserError(f"{raw.row(index)} has no id: give every row one, or remove the column")
        if pc.count_distinct(ids).as_py() < len(ids):
            seen: dict[str, int] = {}
            for index, name in enumerate(ids.to_pylist()):
                if (first := seen.setdefault(name, index)) != index:
                    raise UserError(
                        f"{raw.row(index)} has the id {name!r} of row {first + 1}: make it unique or remove it"
                    )
        return ids
    names = written
    for marker in ROOT_MARKERS:
        names = pc.if_else(pc.starts_with(names, marker + "/"), pc.utf8_slice_codeunits(names, len(marker) + 1), names)
    at = pc.round(pc.multiply(start, float(sampling_rate))).cast(pa.int64()).cast(pa.string())
    names = pc.if_else(pc.greater(start, 0.0), pc.binary_join_element_wise(names, at, ":"), names)
    if pc.count_distinct(names).as_py() == len(names):
        return names
    count: dict[str, int] = {}
    numbered = []
    for name in names.to_pylist():
        count[name] = count.get(name, 0) + 1
        numbered.append(name if count[name] == 1 else f"{name}#{count[name]}")
    return pa.chunked_array([pa.array(numbered, pa.string())])


def _resolved(raw: RawTable, written: pa.ChunkedArray, data_root: str | None) -> pa.ChunkedArray:
    """Absolute paths: the marker replaced, the rest under `data_root` or else beside the manifest."""
    for marker in ROOT_MARKERS:
        if (index := pc.index(pc.match_substring(written, marker), True).as_py()) >= 0:
            if data_root is None:
                raise UserError(f"{raw.row(index)} holds {marker}: pass --data_root with the folder that it stands for")
            written = pc.replace_substring(written, marker, os.path.abspath(data_root))
    if (index := pc.index(pc.match_substring_regex(written, r"^[A-Za-z][A-Za-z0-9+.-]*://"), True).as_py()) >= 0:
        raise UserError(f"{raw.row(index)} names the URL {written[index]}: download the files and name those")
    base = os.path.join(os.path.abspath(raw.base if data_root is None else data_root), raw.prefix, "")
    absolute = pc.starts_with(written, os.sep)
    if pc.all(absolute).as_py():
        return written
    return pc.if_else(absolute, written, pc.binary_join_element_wise(base, written, ""))


def _concatenated(tables: list[pa.Table], names: list[str], extras: Sequence[str]) -> pa.Table:
    extras = [name for name in extras if any(name in table.column_names for table in tables)]
    for index, table in enumerate(tables):
        for name in extras:
            if name not in table.column_names:
                table = table.append_column(name, pa.array([""] * len(table), pa.string()))
        tables[index] = table.select(["id", "audio", "start", "num_samples", *extras])
    whole = pa.concat_tables(tables)
    if len(tables) == 1 or pc.count_distinct(whole["id"]).as_py() == len(whole):
        return whole
    stems = [Path(name).absolute().stem for name in names]
    labels = stems if len(set(stems)) == len(stems) else names
    for index, (table, label) in enumerate(zip(tables, labels, strict=True)):
        tables[index] = table.set_column(0, "id", pc.binary_join_element_wise(label, table["id"], "/"))
    return pa.concat_tables(tables)


def _measured(table: pa.Table, cache_dir, num_workers: int, probe, sampling_rate: int) -> tuple[pa.Table, list[dict]]:
    """Fill null lengths from the files' headers; rows whose file cannot be measured come back in the second list instead."""
    unknown = pc.is_null(table["num_samples"])
    if not pc.any(unknown).as_py():
        return table, []
    rows = table.filter(unknown).select(["id", "audio", "start"]).to_pylist()
    found = measure_lengths(list(dict.fromkeys(row["audio"] for row in rows)), probe, cache_dir, num_workers)
    skipped, lengths = [], []
    for row in rows:
        length = found[row["audio"]]
        if isinstance(length, int):
            length -= round(row["start"] * sampling_rate)
            length = length if length > 0 else f"ends before {row['start']:g} s, where the row starts"
        if isinstance(length, str):
            skipped.append({"id": row["id"], "audio": row["audio"], "reason": length})
        lengths.append(length if isinstance(length, int) else None)
    filled = pc.replace_with_mask(
        table["num_samples"].combine_chunks(), unknown.combine_chunks(), pa.array(lengths, pa.int64())
    )
    table = table.set_column(table.column_names.index("num_samples"), "num_samples", filled)
    return table.filter(pc.is_valid(table["num_samples"])), skipped
