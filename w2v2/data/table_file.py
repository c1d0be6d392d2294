"""A table of utterances as a `datasets.Dataset` in a memory-mapped Arrow file: processes and workers share its pages, and none holds it.

The file is named by the digest of its own bytes, so that the same manifests find it again, and whoever else writes it at the same
time writes the same.
"""

import contextlib
import hashlib
import os
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from datasets.table import MemoryMappedTable

from w2v2.errors import UserError

BATCH_ROWS = 65_536
KEPT = 8  # files in a folder: those of a run's sets are among the newest, what earlier manifests left goes
STALE_SECONDS = 86_400  # an unfinished file of this age belongs to no living process


def hold(table: pa.Table, cache_dir: str | Path | None, kept: np.ndarray | None = None) -> datasets.Dataset:
    """The rows of `table` that are `kept`, from a file in `cache_dir`, or in memory where that is None.

    They are filtered a batch at a time while they are written: an index of the rows (what `Dataset.select` makes) would take eight
    bytes a row and a detour at each access.

    Args:
        kept: (rows,) bool; None keeps all.

    Raises UserError where the file cannot be written.
    """
    digest = _Digest()
    _write(table, kept, digest)
    if cache_dir is None:
        return datasets.Dataset(_batched(table, kept), fingerprint=digest.hexdigest())
    path = Path(cache_dir) / f"utterances-{digest.hexdigest()}.arrow"
    try:
        if path.exists() and path.stat().st_size == digest.num_bytes:
            os.utime(path)  # in use: the last to be cleared away
        else:
            _write_aside(table, kept, path)
            _clear(path.parent)
    except OSError as error:
        raise UserError(
            f"{path.parent}: the table of utterances ({digest.num_bytes / 1e6:,.0f} MB) cannot be written: "
            f"{error.strerror or error}; make room or choose another --output_dir"
        ) from None
    return datasets.Dataset(MemoryMappedTable.from_file(str(path)), fingerprint=digest.hexdigest())


class _Digest:
    """A file that keeps only the hash and the number of the bytes written to it."""

    closed = False

    def __init__(self):
        self._hash, self.num_bytes = hashlib.blake2b(digest_size=8), 0
        self.hexdigest = self._hash.hexdigest

    def write(self, data) -> int:
        self._hash.update(data)
        size = memoryview(data).nbytes
        self.num_bytes += size
        return size

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


def _batches(table: pa.Table, kept: np.ndarray | None) -> Iterator[pa.RecordBatch]:
    first = 0
    for batch in table.to_batches(max_chunksize=BATCH_ROWS):
        chosen = batch if kept is None else batch.filter(pa.array(kept[first : first + len(batch)]))
        first += len(batch)
        if len(chosen):
            yield chosen


def _batched(table: pa.Table, kept: np.ndarray | None) -> pa.Table:
    return table if kept is None else pa.Table.from_batches(_batches(table, kept), table.schema)


def _write(table: pa.Table, kept: np.ndarray | None, file) -> None:
    with pa.ipc.new_stream(file, table.schema) as stream:
        for batch in _batches(table, kept):
            stream.write_batch(batch)


def _write_aside(table: pa.Table, kept: np.ndarray | None, path: Path) -> None:
    """Write under another name and rename what has reached the disk: whatever bears the final name is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(aside, "xb") as file:
            _write(table, kept, file)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def _clear(folder: Path) -> None:
    """Remove all but the newest files, and what killed processes left unfinished. A process that has mapped one goes on reading it."""
    for _, path in sorted(_ages(folder.glob("utterances-*.arrow")))[KEPT:]:
        path.unlink(missing_ok=True)
    for age, path in _ages(folder.glob("utterances-*.tmp")):
        if age > STALE_SECONDS:
            path.unlink(missing_ok=True)


def _ages(paths: Iterable[Path]) -> Iterator[tuple[float, Path]]:
    """Seconds since each was changed; one that another process renamed or removed meanwhile is left out."""
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            yield time.time() - path.stat().st_mtime, path
