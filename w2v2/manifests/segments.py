"""Where the audio of a row begins and how long it is: columns in seconds, milliseconds or frames → seconds.

- Names are read word by word (`read_name`), as `begin_time`, `frame_offset`, `end_ms` or `num_frames`.
- Frames are counted at `sample_rate` where the manifest has it, else at the file's own rate; `num_samples` at 16 kHz.
- `start`, `stop` and their like without a unit are seconds, unless durations or files show another (`_tell_unit`).
- `stop` - `start` comes before a `duration` that differs from it, for that is then the whole file's.
- A sample of the rows is compared with the files: what does not fit is told, and refused where it is the rule.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from w2v2.audio.crops import MAX_PADDING, MAX_SHIFT, SAMPLING_RATE, measure_rate
from w2v2.audio.inspection import NUM_INSPECTED
from w2v2.errors import UserError
from w2v2.manifests.columns import LOOKS_LIKE_ONE, RATE_NAMES, read_name
from w2v2.manifests.readers import RawTable
from w2v2.manifests.tables import by_batch

Measure = Callable[..., dict[str, int | str]]  # `measure_lengths`, its other arguments given
RATES = dict(measure=measure_rate, file="rates.jsonl")
NUMBER = r"^(-?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?|[+-]?nan|[+-]?inf)$"
# Up to thirty years, so that samples can be counted in 64 bits.
LIMITS = {"start": (0, 1e14), "stop": (0, 1e14), "duration": (0.5 / 16_000, 1e9), "frames": (1, 1e14), "rate": (1, 1e6)}
MILLISECONDS = 1_000  # a second
USUAL_RATES = (MILLISECONDS, 8_000, 11_025, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000, 96_000)
SHORTEST = 0.02  # seconds: what is shorter was counted in another unit
TOLERANCE = (MAX_SHIFT + MAX_PADDING) / SAMPLING_RATE  # seconds: durations are rounded
RULE = 2 / 3  # share of the compared rows from which on a misfit is the rule


class Files(NamedTuple):  # what the files of some rows hold
    rows: np.ndarray
    seconds: np.ndarray  # NaN where a file cannot be read
    rates: np.ndarray


def find_extents(
    raw: RawTable, audio: pa.ChunkedArray, others: set[str], measure: Measure
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Start and length (NaN where unknown) of every row, in seconds; and warnings. `others`: columns of no segment."""
    names, units = _choose_columns(raw, others)
    nothing, notes = np.broadcast_to(np.nan, len(audio)), []
    if not names:
        return np.zeros(len(audio)), nothing, notes
    values = {role: cast_numbers(raw, name, *LIMITS[role]) for role, name in names.items()}
    start, stop, duration, frames = (values.get(role, nothing) for role in ("start", "stop", "duration", "frames"))
    said = ~(np.isnan(start) & np.isnan(stop) & np.isnan(duration) & np.isnan(frames))
    files = _read_some(audio, np.flatnonzero(said), measure, bool({"frames", ""} & set(units.values())))
    # 1. The unit of starts and stops whose names tell none, and the rate of what counts frames.
    per_second, rate = {"s": 1.0, "ms": MILLISECONDS}, None
    duration = duration / per_second[units["duration"]] if "duration" in names else nothing
    if "" in units.values():
        unit, rate, why = _tell_unit(raw, (start, stop, duration), files)
        notes += [f"{raw.path}: {names.get('start', names.get('stop'))} is read as {why}"] if why else []
        units |= {role: unit for role, known in units.items() if not known}
    if "frames" in units.values():
        at_16k = names.get("frames") == "num_samples" and "frames" not in (units.get("start"), units.get("stop"))
        rates = _find_rates(audio, files, measure, SAMPLING_RATE if at_16k else rate)
        rates = np.where(np.isnan(values["rate"]), rates, values["rate"]) if "rate" in names else rates
        per_second["frames"] = rates
        if (odd := np.abs(rates[files.rows] - files.rates) > 0.5).any() and "rate" in names:
            example = f"{raw.where(row := files.rows[odd][0])}: {rates[row]:g}, the file has {files.rates[odd][0]:g}"
            notes.append(
                f"{raw.path}: its column {names['rate']}, which counts frames, differs from the files' sampling rate ({example})"
            )
    # 2. Everything in seconds.
    start = np.nan_to_num(start) / per_second[units["start"]] if "start" in names else np.zeros(len(audio))
    length = np.where(np.isnan(duration), frames / per_second["frames"], duration) if "frames" in names else duration
    # 3. What lies between start and stop; a duration that says the same may be finer.
    if "stop" in names:
        between = stop / per_second[units["stop"]] - start
        column, early = raw.table[names["stop"]], pa.array(between < 1 / SAMPLING_RATE)
        raw.refuse(early, names["stop"], column, "it has to come after the start")
        if (differs := np.abs(between - length) > 0.1).any():
            example = f"{raw.where(row := int(differs.argmax()))}: {between[row]:g} s, not {length[row]:g} s"
            notes.append(
                f"{raw.path}: {differs.sum():,} rows have a duration other than stop − start, which is used ({example})"
            )
        own = ~np.isnan(between) & (np.isnan(length) | differs | (units["stop"] == "frames"))
        length = np.where(own, between, length)
    return start, length, notes + _compare(raw, start, length, files, names)


def _choose_columns(raw: RawTable, others: set[str]) -> tuple[dict[str, str], dict[str, str]]:
    """The column of each role, and its unit. Raises UserError for one that looks like a segment's and is not used."""
    columns, names, units = [name for name in raw.table.column_names if name not in others], {}, {}
    for name in sorted(columns, key=lambda name: "dur" not in name):  # a length may be that of a text
        role, unit = read_name(name) or ("", "")
        if "offset" in name and any("onset" in other for other in columns):
            role = "stop"
        if role and role not in names:
            names[role], units[role] = name, unit
        elif role:
            needed = pc.and_(pc.is_null(raw.table[names[role]]), pc.is_valid(raw.table[name]))
            raw.refuse(needed, name, raw.table[name], f"other rows name it {names[role]}: name it so in all rows")
    if {"frames", ""} & set(units.values()):
        names |= dict([("rate", name) for name in RATE_NAMES if name in columns][:1])
    unused = [name for name in columns if LOOKS_LIKE_ONE.search(name) and name not in names.values()]
    for name in unused:
        cells = pc.utf8_trim_whitespace(cast_text(raw, name))
        if pc.all(pc.match_substring_regex(cells, r"^([0-9.]*$|\[\{)")).as_py():  # numbers, or lists of objects
            given = pc.match_substring_regex(cells, r"[1-9]|\[\{")
            remedy = "it looks like a segment and is not used: write start and stop in rows of their own, or remove it"
            raw.refuse(given, f"{name} ({pc.sum(given).as_py():,} rows)", pc.utf8_slice_codeunits(cells, 0, 60), remedy)
    return names, units


def merge_aliases(raw: RawTable, names: Sequence[str]) -> list[str]:
    """Fill the nulls of the first of these columns from the others, for it is chosen; a line for each that is needed."""
    lines, is_null = [], pc.is_null(raw.table[names[0]])
    for name in names[1:] if raw.table[names[0]].null_count else ():
        gaps = pc.and_(is_null, pc.is_valid(raw.table[name]))
        is_null = pc.and_not(is_null, gaps)
        if count := pc.sum(gaps).as_py():
            texts = [cast_text(raw, column) for column in (names[0], name)]
            merged = by_batch(lambda first, other, gap: pc.if_else(gap, other, first), *texts, gaps)
            raw.table = raw.table.set_column(raw.table.column_names.index(names[0]), names[0], merged)
            where = raw.where(pc.index(gaps, True).as_py())
            lines.append(
                f"{raw.path}: {count:,} rows have no {names[0]}: their {name} is read for it (the first: {where})"
            )
    return lines


def cast_text(raw: RawTable, name: str) -> pa.ChunkedArray:
    """A column as text, "" for nothing."""
    try:
        return by_batch(lambda cells: pc.fill_null(cells.cast(pa.string()), ""), raw.table[name])
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        kind = f"the column {name} holds {raw.table[name].type}"
        raise UserError(f"manifest {raw.path}: {kind}, where text is expected: write it as text") from None


def cast_numbers(raw: RawTable, name: str, least: float, most: float) -> np.ndarray:
    """float64, NaN where the cell is empty; what is no number from `least` to `most` is an error that names its row."""
    column = raw.table[name]
    if not (pa.types.is_floating(column.type) or pa.types.is_integer(column.type) or pa.types.is_decimal(column.type)):
        text = pc.utf8_trim_whitespace(cast_text(raw, name))
        column = pc.if_else(pc.equal(text, ""), None, text)
        is_number = pc.match_substring_regex(column, NUMBER, ignore_case=True)
        raw.refuse(pc.invert(is_number), name, column, "write a number, or leave it empty")
    column = column.cast(pa.float64())
    wrong = pc.invert(pc.and_(pc.less_equal(column, most), pc.greater_equal(column, least)))  # NaN is neither
    bounds = f"{'0 or more' if least == 0 else 'more than 0'} and at most {most:g}"
    raw.refuse(wrong, name, column, f"write {bounds}, or leave it empty")
    return column.to_numpy()


def _read_some(audio: pa.ChunkedArray, rows: np.ndarray, measure: Measure, with_rates: bool) -> Files:
    """A few of the `rows`, evenly spread."""
    rows = rows[np.unique(np.linspace(0, max(0, len(rows) - 1), min(len(rows), NUM_INSPECTED)).astype(int))]
    paths = [audio[int(row)].as_py() for row in rows]
    found = measure([*{*paths}]), measure([*{*paths}], **RATES) if with_rates else {}
    values = [[n if isinstance(n := numbers.get(path), int) else np.nan for path in paths] for numbers in found]
    return Files(rows, np.array(values[0], float) / SAMPLING_RATE, np.array(values[1], float))


def _find_rates(audio: pa.ChunkedArray, files: Files, measure: Measure, told: float | None) -> np.ndarray:
    """Frames a second of every row: `told` by durations, or the file's own; 16,000 where it cannot be read."""
    own = np.unique(files.rates[~np.isnan(files.rates)])
    if told or len(own) < 2:
        return np.broadcast_to(float(told or (own[0] if len(own) else SAMPLING_RATE)), len(audio))
    found = measure(audio.unique().to_pylist(), **RATES)
    return np.array(
        [rate if isinstance(rate := found[path], int) else SAMPLING_RATE for path in audio.to_pylist()], float
    )


def _tell_unit(raw: RawTable, times: tuple[np.ndarray, ...], files: Files) -> tuple[str, float | None, str]:
    """Unit of starts and stops whose names tell none; their rate, where durations tell it; and how it was found.

    `times` are starts, stops, and durations in seconds. The first case that holds decides:

    | the numbers                                                              | unit                        |
    |--------------------------------------------------------------------------|-----------------------------|
    | are no whole ones, or `stop - start` is every duration within 1 s        | seconds                     |
    | differ by 1,000 × the durations                                          | milliseconds                |
    | … by a usual rate × these (the files' rate, if these are of whole files) | frames at this rate         |
    | no file can be read                                                      | seconds, SpeechBrain frames |
    | lie within the files as seconds                                          | seconds                     |
    | are SpeechBrain's: columns wav, start, stop                              | frames of the file          |
    | lie within the files as frames; and also as milliseconds                 | frames of the file; error   |
    | anything else                                                            | seconds: `_compare` tells   |
    """
    start, stop, duration = np.nan_to_num(times[0]), *times[1:]
    between, known = stop - start, (stop > start) & (duration > 0)
    if (np.append(start, stop) % 1 > 0).any() or (known.any() and (np.abs(between - duration)[known] < 1.0).all()):
        return "s", None, ""
    rate = _find_usual_rate(between[known], duration[known]) if known.any() else 0
    if rate == MILLISECONDS:
        return "ms", None, "milliseconds, which fits the durations"
    rows, seconds, own = (values[~np.isnan(files.seconds)] for values in files)
    are_whole = (np.abs(duration[rows] - seconds) < TOLERANCE).sum() > len(rows) / 2
    if rate and (rate in own or not are_whole):
        others = "" if rate in own or not len(own) else f", where the files have {own[0]:g}"
        return "frames", rate, f"frames, {rate:,} a second, which fits the durations{others}"
    is_speechbrain = {"wav", "start", "stop"} <= set(raw.table.column_names)
    last, span = (np.where(np.isnan(stop), start, values)[rows] for values in (stop, between))
    rest = np.where(np.isnan(stop), np.nan_to_num(duration), 0)[rows]  # seconds that follow `last`
    rows, seconds, own, last, span, rest = (values[last > 0] for values in (rows, seconds, own, last, span, rest))
    if not len(rows):
        return "frames" if is_speechbrain else "s", None, ""
    fits = {
        unit: (last / per_second + rest <= seconds + TOLERANCE).mean() >= 0.5
        and np.median(span / per_second) > SHORTEST
        for unit, per_second in (("s", 1), ("ms", MILLISECONDS), ("frames", own))
    }
    if fits["s"] or not (is_speechbrain or fits["frames"]):
        return "s", None, ""
    if fits["ms"] and not is_speechbrain:
        example = f"{raw.where(rows[nth := int(last.argmax())])}: {last[nth]:g} in a file of {seconds[nth]:g} s"
        remedy = "name the columns start_ms and end_ms, or start_frame and end_frame"
        raise UserError(f"{raw.path}: starts and stops may be milliseconds or frames ({example}): {remedy}")
    return "frames", None, "frames, which fits the lengths of the files"


def _find_usual_rate(between: np.ndarray, duration: np.ndarray) -> int:
    """The usual rate at which these frames last so many seconds; 0 where there is none."""
    rate = min(USUAL_RATES, key=lambda rate: abs(np.log(np.median(between / duration) / rate)))
    return rate if np.mean(np.abs(between / rate - duration) <= 0.02 * duration + 0.01) > 0.9 else 0


def _compare(raw: RawTable, start: np.ndarray, length: np.ndarray, files: Files, names: dict[str, str]) -> list[str]:
    """Lines about compared rows that do not fit their files. Raises UserError where those are the rule."""
    ends, notes = (start + length)[files.rows], []
    known = ~np.isnan(ends) & ~np.isnan(files.seconds)
    from_zero = "stop" not in names and not start.any()
    shorter = known & from_zero & ((ends < files.seconds - TOLERANCE) | (ends < 0.7 * files.seconds))
    longer = known & (ends > files.seconds + TOLERANCE)
    for misfit, what, remedy in (
        (shorter, "are shorter than their files, with no start", "give start and stop, or the right lengths"),
        (longer, "go beyond the end of their files", "give the right lengths"),
    ):
        if not misfit.any():
            continue
        said, (rows, seconds, rates), hint = ends[misfit], (values[misfit] for values in files), ""
        factor, counted = said / (seconds + TOLERANCE), said * SAMPLING_RATE / rates
        own = (np.abs(counted / seconds - 1) < 0.02) & (rates != SAMPLING_RATE)  # counted at their files' rate
        if factor.min() > 10:
            unit, name = ("milliseconds", "duration_ms") if factor.max() <= MILLISECONDS else ("frames", "num_frames")
            hint = f"; are they {unit}? Name the column {name}"
        elif names.get("frames") == "num_samples" and own.any():
            hint = f"; is num_samples at the file's {rates[own][0]:,.0f} a second? Name it num_frames"
        example = f"{raw.where(rows[0])}: {said[0]:g} s, the file holds {seconds[0]:g} s"
        line = f"{raw.path}: {len(rows)} of {known.sum()} rows that were compared {what} ({example}{hint})"
        if "num_frames" in hint or len(rows) >= RULE * known.sum():
            raise UserError(f"{line}: {remedy}")
        notes.append(line)
    return notes
