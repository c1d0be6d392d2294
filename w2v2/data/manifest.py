"""Any manifest or folder of audio → one table of utterances whose lengths are known.

Columns are understood by name, upper or lower case, whichever toolkit wrote them (`COLUMNS`). What is decided here:

- `duration` (seconds) comes before `num_samples` (at 16 kHz); rows with neither are measured, once.
- `start` and `offset`, `stop` and `end` are seconds. Whole-numbered `start` and `stop` beside SpeechBrain's `wav` are
  samples, and give the length, for VoxCeleb's `duration` is that of the whole file.
- A row without an id gets its path as written (and `:start` in samples, `#2` if it comes twice). An id twice in one
  manifest is an error; manifests that share ids get theirs prefixed with `<manifest's name>/`.
- Text, speaker and label are "" where a row, or one of several manifests, has none.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from w2v2.data.audio import SAMPLING_RATE, fill_lengths
from w2v2.data.audio import probe as probe_header
from w2v2.data.readers import RawTable, read_table
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
ROOT_MARKER = r"^(\$?\{data_root\}|\$data_root)/+"  # at the head of SpeechBrain's paths
MOST_SECONDS = 1e9  # of a start, stop or length: thirty years, so that samples can be counted in 64 bits
NUMBER = r"^(-?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?|[+-]?nan|[+-]?inf)$"


def read_manifests(
    paths: Sequence[str],
    *,
    data_root: str | None = None,
    cache_dir: str | Path | None = None,
    probe: Callable[[str], int] = probe_header,
    further: Sequence[str] = (),
) -> tuple[pa.Table, list[dict]]:
    """Read manifests and folders into one table of utterances. Raises UserError for whatever the user can mend.

    Returns the table and the files that could not be measured, as `{"id", "audio", "reason"}`. Columns: `id` (unique),
    `audio` (absolute path), `start` (seconds), `num_samples` (at 16 kHz), and `text`, `speaker`, `label` and, in lower
    case, the `further` columns, as text, where any manifest has them. `probe` gives a file's length at 16 kHz or raises
    AudioError; its findings are kept in `cache_dir`.
    """
    data_root, names = data_root and os.path.expanduser(data_root), list(map(str, paths))
    if not names:
        raise UserError("no manifest given: name at least one")
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"manifest {sorted(twice)[0]} is given twice: name each once")
    if data_root is not None and not os.path.isdir(data_root):
        raise UserError(f"--data_root {data_root} is not a folder: name the folder that the audio paths start from")
    extras = [*EXTRAS, *dict.fromkeys(name.lower() for name in further if name.lower() not in OURS)]
    wanted = {alias for aliases in COLUMNS.values() for alias in aliases}.union(extras)
    tables = [_interpret(read_table(Path(name).expanduser(), wanted), extras, data_root) for name in names]
    table, skipped = fill_lengths(_join(tables, names, extras), probe, cache_dir)
    if skipped and not len(table):
        first = f"beginning with {skipped[0]['audio']}, which {skipped[0]['reason']}"
        remedy = "check the paths, and --data_root if they are relative"
        raise UserError(f"{', '.join(names)}: no audio file could be measured, {first}: {remedy}")
    return table, skipped


def _interpret(raw: RawTable, extras: Sequence[str], data_root: str | None) -> pa.Table:
    """One manifest in our columns and the `extras`; `num_samples` is null where it has to be measured."""
    columns = {name: raw.table[name] for name in extras if name in raw.table.column_names}
    for name, aliases in COLUMNS.items():
        if present := [alias for alias in aliases if alias in raw.table.column_names]:
            columns[name] = raw.table[present[0]]
    if "audio" not in columns:
        found, remedy = ", ".join(raw.found) or "none", f"name one of them {' or '.join(COLUMNS['audio'])}"
        raise UserError(f"manifest {raw.path} has no audio column: it has {found}; {remedy}")
    texts = {name: _cast_text(raw, name, columns[name]) for name in ("audio", "id", *extras) if name in columns}
    written = texts.pop("audio")
    raw.refuse(pc.equal(pc.utf8_trim_whitespace(written), ""), "audio", written, "fill it in or remove the row")
    if data_root is None:
        marked = pc.match_substring_regex(written, ROOT_MARKER)
        raw.refuse(marked, "audio", written, "pass --data_root with the folder that its beginning stands for")
    written = pc.replace_substring_regex(written, ROOT_MARKER, "")
    start, num_samples = _find_extent(raw, columns)
    ids = _name_rows(raw, texts.pop("id", None), written, start)
    audio = _resolve(raw, written, data_root)
    return pa.table({"id": ids, "audio": audio, "start": start, "num_samples": num_samples} | texts)


def _cast_text(raw: RawTable, name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    try:
        column = pc.fill_null(column.cast(pa.string()), "")
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        kind = f"the column for {name} holds {column.type}"
        raise UserError(f"manifest {raw.path}: {kind}, where text is expected: write it as text") from None
    return column if name == "audio" else pc.utf8_trim_whitespace(column)  # a file's name may begin with a space


def _cast_numbers(raw: RawTable, name: str, column: pa.ChunkedArray, least: float, most: float) -> np.ndarray:
    """float64, NaN where the cell is empty; what is no number from `least` to `most` is an error that names its row."""
    if not (pa.types.is_floating(column.type) or pa.types.is_integer(column.type) or pa.types.is_decimal(column.type)):
        text = _cast_text(raw, name, column)
        column = pc.if_else(pc.equal(text, ""), None, text)
        is_number = pc.match_substring_regex(column, NUMBER, ignore_case=True)
        raw.refuse(pc.invert(is_number), name, column, "write a number, or leave it empty")
    column = column.cast(pa.float64())
    wrong = pc.invert(pc.and_(pc.less_equal(column, most), pc.greater_equal(column, least)))  # NaN is neither
    bounds = f"{'0 or more' if least == 0 else 'more than 0'} and at most {most:g}"
    raw.refuse(wrong, name, column, f"write {bounds}, or leave it empty")
    return column.to_numpy()


def _find_extent(raw: RawTable, columns: dict[str, pa.ChunkedArray]) -> tuple[np.ndarray, pa.Array]:
    """Start in seconds (float64) and length in samples (int64, null where unknown) of every row."""
    rate, most = float(SAMPLING_RATE), MOST_SECONDS * SAMPLING_RATE
    limits = {"start": (0, most), "stop": (0, most)}  # may turn out to be samples
    limits |= {"num_samples": (1, most), "duration": (0.5 / rate, MOST_SECONDS)}
    nothing = pa.chunked_array([pa.nulls(raw.table.num_rows, pa.float64())])
    numbers = [_cast_numbers(raw, name, columns.get(name, nothing), *limits[name]) for name in limits]
    start, stop, num_samples, duration = numbers
    # 1. The length that the manifest states, in seconds.
    start = np.nan_to_num(start)
    length = np.where(np.isnan(duration), num_samples / rate, duration)
    between = stop - start
    # 2. SpeechBrain's whole-numbered `start` and `stop` are samples, unless their difference is the length in seconds.
    whole = all((column == np.floor(column))[~np.isnan(column)].all() for column in (start, stop))
    known = ~np.isnan(between - length)
    in_seconds = known.any() and (np.abs(between - length)[known] < 1.0).all()
    if in_samples := whole and {"wav", "start", "stop"} <= set(raw.table.column_names) and not in_seconds:
        start, stop, between = (column / rate for column in (start, stop, between))
    raw.refuse(pa.array(between < 1 / rate), "stop", pa.array(stop), "in seconds, it has to come after the start")
    # 3. In samples the difference comes first, for the duration is then that of the whole file.
    first, second = (between, length) if in_samples else (length, between)
    return start, pa.array(np.round(np.where(np.isnan(first), second, first) * rate), from_pandas=True).cast(pa.int64())


def _name_rows(
    raw: RawTable, ids: pa.ChunkedArray | None, written: pa.ChunkedArray, start: np.ndarray
) -> pa.ChunkedArray:
    """The ids that the manifest gives; or else paths, with their start in samples, numbered where they come twice."""
    names = ids
    if ids is None:
        at = pa.array(np.round(start * SAMPLING_RATE).astype(np.int64)).cast(pa.string())
        names = pc.if_else(pa.array(start > 0), pc.binary_join_element_wise(written, at, ":"), written)
    raw.refuse(pc.equal(names, ""), "id", names, "give every row one, or remove the column")
    if pc.count_distinct(names).as_py() == len(names):
        return names
    series = names.to_pandas()
    nth = pa.array(series.groupby(series).cumcount() + 1)
    if ids is not None:
        raw.refuse(pc.greater(nth, 1), "id", names, "an earlier row has it too, make it unique or remove the row")
    return pc.if_else(pc.equal(nth, 1), names, pc.binary_join_element_wise(names, nth.cast(pa.string()), "#"))


def _resolve(raw: RawTable, written: pa.ChunkedArray, data_root: str | None) -> pa.ChunkedArray:
    """Absolute paths: relative ones start at `data_root`, or else beside the manifest."""
    is_url = pc.match_substring_regex(written, r"^[A-Za-z][A-Za-z0-9+.-]*://")
    raw.refuse(is_url, "audio", written, "download the files of URLs and name those")
    beside = raw.path if raw.path.is_dir() else raw.path.parent
    base = os.path.join(os.path.abspath(beside if data_root is None else data_root), raw.root, "")
    return pc.if_else(pc.starts_with(written, os.sep), written, pc.binary_join_element_wise(base, written, ""))


def _join(tables: list[pa.Table], names: list[str], extras: Sequence[str]) -> pa.Table:
    """All tables in one; an extra column that one of them lacks is "" there."""
    whole = pa.concat_tables(tables, promote_options="default")
    columns = {name: whole[name] for name in ("id", "audio", "start", "num_samples")}
    columns |= {name: pc.fill_null(whole[name], "") for name in extras if name in whole.column_names}
    if len(tables) > 1 and pc.count_distinct(whole["id"]).as_py() < len(whole):
        stems = [Path(name).absolute().stem for name in names]
        labels = stems if len(set(stems)) == len(stems) else names
        repeated = [pa.repeat(label, len(table)) for label, table in zip(labels, tables, strict=True)]
        columns["id"] = pc.binary_join_element_wise(pa.chunked_array(repeated), whole["id"], "/")
    return pa.table(columns)
