"""Lengths of many audio files, measured in parallel threads and remembered from run to run."""

import contextlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from tqdm.auto import tqdm

from w2v2.data.audio import SAMPLING_RATE, AudioError

BLOCK = 10_000  # files measured between two writes to the cache, so that an interrupted scan of millions is not lost
NUM_THREADS = min(32, 4 * (os.cpu_count() or 1))  # they wait for the disk


def fill_lengths(
    table: pa.Table, probe: Callable[[str], int], cache_dir: str | Path | None
) -> tuple[pa.Table, list[dict]]:
    """Fill the nulls of `num_samples`; rows whose file cannot be measured come back as {id, audio, reason} instead."""
    unknown = pc.is_null(table["num_samples"]).combine_chunks()
    rows = table.filter(unknown).select(["id", "audio", "start"]).to_pylist()
    if not rows:
        return table, []
    found = measure_lengths(list(dict.fromkeys(row["audio"] for row in rows)), probe, cache_dir)
    skipped, lengths = [], []
    for row in rows:
        length, start = found[row["audio"]], round(row["start"] * SAMPLING_RATE)
        if isinstance(length, int) and length <= start:
            length = f"ends before {row['start']:g} s, where the row starts"
        if isinstance(length, str):
            skipped.append({"id": row["id"], "audio": row["audio"], "reason": length})
        lengths.append(None if isinstance(length, str) else length - start)
    known = table["num_samples"].combine_chunks()
    filled = pc.replace_with_mask(known, unknown, pa.array(lengths, pa.int64()))
    table = table.set_column(table.column_names.index("num_samples"), "num_samples", filled)
    return table.filter(pc.is_valid(filled)), skipped


def measure_lengths(
    paths: list[str], probe: Callable[[str], int], cache_dir: str | Path | None = None
) -> dict[str, int | str]:
    """Length of each file, or the reason (a string) why it has none.

    `probe` raises AudioError for a file that cannot be used; any other exception is a bug and goes through. Lengths are
    kept in `cache_dir/durations.jsonl`, by path, size and time of change, a line a file, so that processes which
    measure at the same time do each other no harm.
    """
    cache = None if cache_dir is None else Path(cache_dir, "durations.jsonl")
    known = _read_cache(cache) if cache and cache.exists() else {}

    def measure(path: str) -> tuple[int | str, tuple | None]:
        """Length or reason, and the key to remember a new length by."""
        key = None
        with contextlib.suppress(OSError, ValueError):  # the probe says why; ValueError: a null character
            status = os.stat(path)
            key = (path, status.st_size, status.st_mtime_ns)
        if key in known:
            return known[key], None
        try:
            return int(probe(path)), key
        except AudioError as error:
            return error.reason, None

    lengths = {}
    bar = tqdm(total=len(paths), desc="Measuring audio files", unit=" files", disable=None)
    with ThreadPoolExecutor(NUM_THREADS) as pool, bar:
        for first in range(0, len(paths), BLOCK):
            block, fresh = paths[first : first + BLOCK], []
            for path, (length, key) in zip(block, pool.map(measure, block), strict=True):
                lengths[path] = length
                bar.update()
                if key is not None:
                    fresh.append(json.dumps([*key, length]) + "\n")
            if cache and fresh:
                cache.parent.mkdir(parents=True, exist_ok=True)
                with open(cache, "a", encoding="utf-8") as file:
                    file.write("".join(fresh))
    return lengths


def _read_cache(cache: Path) -> dict[tuple, int]:
    known: dict[tuple, int] = {}
    with open(cache, encoding="utf-8", errors="replace") as file:
        for line in file:
            with contextlib.suppress(ValueError, TypeError):  # a line torn by an interruption
                path, size, mtime, length = json.loads(line)
                known[path, size, mtime] = int(length)
    return known
