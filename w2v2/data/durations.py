"""Lengths of many audio files, measured in parallel threads and remembered from run to run."""

import contextlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm.auto import tqdm

from w2v2.data.retries import is_passing, retried
from w2v2.errors import LocalError

BLOCK = 10_000  # files measured between two writes to the cache, so that an interrupted scan of millions is not lost


def measure_lengths(
    paths: list[str], probe: Callable[[str], int], cache_dir: str | Path | None = None, num_workers: int = 0
) -> dict[str, int | str]:
    """Length of each file, or the reason (a string) why it has none.

    `probe` raises an exception with a `reason` for a file that cannot be used; any other exception is a bug and goes through.
    Raises UserError where the system refuses a file for the moment (`retries.PASSING`).
    Lengths are kept in `cache_dir/durations.jsonl`, by path, size and time of change, a line a file, so that processes which
    measure at the same time do each other no harm. `num_workers` threads (0: four a core, at most 32) wait for the disk.
    """
    cache = None if cache_dir is None else Path(cache_dir, "durations.jsonl")
    known = _read_cache(cache)

    def measure(path: str) -> tuple[str, int | str, tuple | None]:
        try:
            status = retried(lambda: os.stat(path), is_passing)
        except (OSError, ValueError) as error:  # ValueError: a null character
            reason = getattr(error, "strerror", None) or str(error)
            _refuse_passing(path, reason, error)
            return (
                path,
                "does not exist" if isinstance(error, (FileNotFoundError, NotADirectoryError)) else reason,
                None,
            )
        key = (path, status.st_size, status.st_mtime_ns)
        try:
            return (path, known[key], None) if key in known else (path, int(probe(path)), key)
        except Exception as error:
            if not hasattr(error, "reason"):
                raise
            _refuse_passing(path, error.reason, error)
            return path, error.reason, None

    lengths = {}
    workers = num_workers or min(32, 4 * (os.cpu_count() or 1))
    bar = tqdm(total=len(paths), desc="Measuring audio files", unit=" files", disable=None)
    with ThreadPoolExecutor(workers) as pool, bar:
        for first in range(0, len(paths), BLOCK):
            fresh = []
            try:
                for path, length, key in pool.map(measure, paths[first : first + BLOCK]):
                    lengths[path] = length
                    bar.update()
                    if key is not None:
                        fresh.append(json.dumps([*key, length]) + "\n")
            finally:  # also before the first file that cannot be measured for the moment
                if cache is not None and fresh:
                    cache.parent.mkdir(parents=True, exist_ok=True)
                    with open(cache, "a", encoding="utf-8") as file:
                        file.write("".join(fresh))
    return lengths


def _refuse_passing(path: str, reason: str, error: Exception) -> None:
    """A file that is there but cannot be asked is not left out: the run's utterances, and so its batches, would be others next time."""
    if is_passing(error):
        raise LocalError(
            f"{path}: {reason}, also when tried again; nothing was changed: start again when it can be read"
        )


def _read_cache(cache: Path | None) -> dict[tuple, int]:
    known: dict[tuple, int] = {}
    if cache is not None and cache.exists():
        with open(cache, encoding="utf-8", errors="replace") as file:
            for line in file:
                with contextlib.suppress(ValueError, TypeError):  # a line torn by an interruption
                    path, size, mtime, length = json.loads(line)
                    known[path, size, mtime] = int(length)
    return known
