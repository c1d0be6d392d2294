"""The index of a shard: a table of its utterances, as of a manifest, made once and kept.

- A tar's members are addressed where they lie.
- A Parquet file holds the bytes of audio files in a column, as `datasets` writes them. They are unpacked into the copy,
  one after another in the order of the rows.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from uuid import uuid4

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from w2v2.audio.crops import measure_length
from w2v2.audio.inspection import map_files, measure_lengths
from w2v2.data.shard_cache import Shard, ShardCache
from w2v2.errors import UserError, one_line
from w2v2.manifests.archives import read_tars
from w2v2.manifests.columns import COLUMNS, EXTRAS, is_known, is_own_length
from w2v2.manifests.manifest import interpret
from w2v2.manifests.readers import RawTable
from w2v2.manifests.tables import fill_lengths

INDEX_VERSION = 2
MOST_WORKERS = 16  # that fetch and index shards; more than there are cores, for they wait for the network
ROWS_AT_ONCE = 256  # of a Parquet file, in memory


def index_shards(shards: Sequence[Shard], cache: ShardCache, folder: Path) -> list[pa.Table]:
    """The index of each shard, made where there is none, in worker processes. `audio` is without the copy's path.

    Sets the size of each copy, and where its index lies. Raises UserError for the first shard that cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{hashlib.sha256(_identify(shard).encode()).hexdigest()[:24]}.parquet" for shard in shards]
    missing = [number for number, path in enumerate(paths) if not path.exists()]
    action = partial(_index, shards=shards, cache=cache, paths=paths)
    # Each worker holds a shard and what it is unpacked from: all of them have to fit into the cache.
    largest = max((shard.num_bytes for shard in shards if not shard.in_place), default=0)
    num_workers = max(1, min(MOST_WORKERS, cache.most_bytes // (2 * largest))) if largest else None
    for error in map_files(missing, action, "Indexing shards", num_workers, at_once=1, unit=" shards"):
        if error:
            raise UserError(error)
    with ThreadPool(16) as pool:
        tables = pool.map(_read_index, paths)
    for shard, path, table in zip(shards, paths, tables, strict=True):
        shard.index, shard.copy_size = str(path), int(table.schema.metadata[b"num_bytes"])
    return tables


def _read_index(path: Path) -> pa.Table:
    try:
        return pq.read_table(path)
    except (OSError, pa.ArrowException):  # torn, where the machine stopped before the disk had it
        raise UserError(f"{path}, an index of a shard, is damaged: remove it, and it is made again") from None


def _identify(shard: Shard) -> str:
    return json.dumps([INDEX_VERSION, shard.url, shard.size, shard.version, shard.audio_column])


def _index(number: int, shards: Sequence[Shard], cache: ShardCache, paths: Sequence[Path]) -> str | None:
    """Write the index of a shard; the message of a UserError, which would lose its form on its way from a worker."""
    shard = shards[number]
    try:
        table = index_shard(shard, cache)
    except UserError as error:
        return str(error).replace(f"manifest {shard.path}", f"shard {shard.url}").replace(shard.path, shard.url)
    aside = paths[number].with_suffix(f".{uuid4().hex}.tmp")
    pq.write_table(table, aside)
    os.replace(aside, paths[number])
    return None


def index_shard(shard: Shard, cache: ShardCache) -> pa.Table:
    """Fetch a shard, and list and measure its utterances. Rows with a `reason` cannot be read."""
    with cache.hold(shard, anew=shard.is_parquet) as raw:
        raw = raw or read_tars(shard.path, [shard.path], is_known)
        measure = partial(measure_lengths, measure=measure_length, cache_dir=None)
        table, lines = interpret(raw, EXTRAS, None, measure)
        measured, skipped = fill_lengths(table, measure_length, None)
        size = os.path.getsize(shard.path)
    reasons = {row["id"]: row["reason"] for row in skipped}
    lost = table.filter(pc.is_in(table["id"], pa.array(list(reasons), pa.string())))
    table = pa.concat_tables([measured, lost])
    columns = {name: table[name] for name in table.column_names}
    columns["audio"] = pc.utf8_slice_codeunits(table["audio"], start=len(shard.path))
    columns["reason"] = pa.array([reasons.get(name, "") for name in table["id"].to_pylist()], pa.string())
    notes = {"lines": raw.warnings + lines, "passed_over": raw.passed_over, "num_bytes": size}
    return pa.table(columns).replace_schema_metadata({name: json.dumps(note) for name, note in notes.items()})


def describe_lost(shard: Shard, index: pa.Table) -> list[str]:
    """A line where an index lacks utterances: it keeps what may have been a passing failure."""
    lost = index.filter(pc.not_equal(index["reason"], ""))
    if not len(lost):
        return []
    first = f"{lost['id'][0].as_py()}, which {lost['reason'][0].as_py()}"
    counts = f"{len(lost):,} of {len(index):,} utterances could not be read when it was indexed"
    return [f"shard {shard.url}: {counts}, the first {first}; to try again, remove {shard.index}"]


def unpack_parquet(shard: Shard, source: str, part: str) -> RawTable:
    """Write the audio files that a column of the Parquet file `source` holds one after another into `part`.

    Returns the other columns, with addresses in the shard's copy, which `part` will be. Raises UserError for a file that holds no such column.
    """
    try:
        with pq.ParquetFile(source) as file, open(part, "r+b") as out:
            name, others = _choose_columns(file.schema_arrow, shard)
            tables, offset, times, num_rows = [], 0, Counter(), 0
            for batch in file.iter_batches(ROWS_AT_ONCE, columns=[name, *others]):
                is_nested = pa.types.is_struct(batch.column(name).type)
                num_rows += len(batch)
                batch = batch.filter(
                    pc.is_valid(pc.struct_field(batch.column(name), "bytes") if is_nested else batch.column(name))
                )
                if not len(batch):
                    continue
                column, addresses, ids = batch.column(name), [], []
                given = column.field("path").to_pylist() if is_nested else [None] * len(column)
                contents = column.field("bytes") if is_nested else column
                for content, file_name in zip(contents, given, strict=True):
                    out.write(content := content.as_buffer())
                    addresses.append(f"{shard.path}:{offset}:{len(content)}")
                    file_name = os.path.basename(file_name or "") or f"{times.total():06d}"
                    times[file_name] += 1
                    ids.append(file_name if times[file_name] == 1 else f"{file_name}#{times[file_name]}")
                    offset += len(content)
                rest = pa.Table.from_batches([batch.select(others)])
                named = {} if "id" in map(str.lower, others) else {"id": ids}
                tables.append(pa.table({"audio": addresses} | named | {n.lower(): rest[n] for n in others}))
            out.truncate()
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"shard {shard.url} cannot be read as a Parquet file ({one_line(error)}): fetch it again, or leave it out"
        ) from None
    if not tables:
        raise UserError(f"shard {shard.url} is empty, or has no row with audio: leave it out of --train_data")
    table = pa.concat_tables(tables)
    num_silent = num_rows - len(table)
    silent = [f"shard {shard.url}: {num_silent:,} of {num_rows:,} rows have no audio and are left out"] * bool(
        num_silent
    )
    return RawTable(Path(shard.path), table, table.column_names, warnings=silent)


def _choose_columns(schema: pa.Schema, shard: Shard) -> tuple[str, list[str]]:
    """The column of audio bytes, and the others that a manifest may have."""

    def holds_bytes(kind: pa.DataType) -> bool:
        if pa.types.is_struct(kind):
            return kind.get_field_index("bytes") >= 0 and holds_bytes(kind.field("bytes").type)
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    names = [field.name for field in schema if field.name.lower() in COLUMNS["audio"] and holds_bytes(field.type)]
    found = ", ".join(schema.names)
    if shard.audio_column:
        if shard.audio_column not in schema.names:
            missing = f"{shard.audio_column!r}, which --audio_column_name names"
            raise UserError(f"shard {shard.url} has no column {missing}: it has {found}")
        names = [shard.audio_column] if holds_bytes(schema.field(shard.audio_column).type) else []
    if not names:
        wanted = shard.audio_column or "audio"
        raise UserError(f"shard {shard.url} has no column `{wanted}` with the bytes of audio files: it has {found}")
    taken = {names[0].lower(), *COLUMNS["audio"]}
    aliases = {alias for known in COLUMNS.values() for alias in known} - taken
    return names[0], [name for name in schema.names if name.lower() in aliases or is_own_length(name.lower())]
