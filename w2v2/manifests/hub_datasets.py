"""Data sets of Hugging Face → tables as manifests give them: Hub ids, and whatever folder `datasets` loads.

`datasets` keeps encoded audio as bytes in Arrow files. The audio of an utterance is the address of its bytes there,
`FILE:OFFSET:SIZE`, or the path of a file where the data set holds paths. Nothing is decoded, so torchcodec is not
needed. What is decided here:

- A split may be written as `datasets` reads it: `train+validation`, `train[:10%]`. A single saved set is `train`.
- An id is that of a column `id` whose values are unique, else the audio's path below the folder that all share, else
  `split/row`: none depends on where the data set lies.
- Audio of a row is the utterance. Columns of starts and stops tell of the original recording and are not read.
- Rows without audio are left out and counted.
"""

import os
from collections.abc import Collection
from pathlib import Path
from uuid import uuid4

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets.table import MemoryMappedTable, Table

from w2v2.errors import UserError, one_line, refuse
from w2v2.manifests.columns import COLUMNS, is_own_length
from w2v2.manifests.dataset_loading import DatasetSource, load_splits, say_names, say_near
from w2v2.manifests.readers import RawTable

STRINGS, BINARIES = (pa.types.is_string, pa.types.is_large_string), (pa.types.is_binary, pa.types.is_large_binary)


def read_dataset(source: DatasetSource, known: Collection[str], cache_dir: str | Path | None) -> RawTable:
    """The splits of a data set as one manifest, with the columns of `known` lower-case names and lengths.

    Bytes that lie in no uncompressed Arrow file are written to one below `cache_dir`. Raises UserError.
    """
    splits = load_splits(source)
    parts = _pick_rows(source, splits)
    given, tables, warnings = {}, [], []
    for split, first, part in parts:
        columns = _choose_columns(source, part.features, known)
        given |= dict.fromkeys(name for name in COLUMNS["id"] if name in columns)
        addresses, paths = _read_audio(part, columns.pop("audio"), cache_dir)
        numbers = pa.array(np.arange(first, first + len(part))).cast(pa.string())
        rows = {"audio": addresses, "path": paths, "row": pc.binary_join_element_wise(split, numbers, "/")}
        rows |= {ours: _read_column(part, theirs) for ours, theirs in columns.items()}
        tables.append(pa.table(rows))
    table = pa.concat_tables(tables, promote_options="default")
    if num_silent := table["audio"].null_count:
        warnings.append(f"{source}: {num_silent:,} of {len(table):,} rows have no audio and are left out")
        table = table.filter(pc.is_valid(table["audio"]))
    refuse((not len(table), f"{source}: no row has audio: name another split, or --audio_column_name"))
    names = [*(table[name].cast(pa.string()) for name in given), _shorten(table["path"]), table["row"]]
    found = (ids for ids in names if not ids.null_count and pc.count_distinct(ids).as_py() == len(ids))
    unique = next(found, None)
    refuse((unique is None, f"{source}: its splits share rows: name splits that do not overlap"))
    table = table.drop_columns(["path", "row", *given]).append_column("id", unique)
    return RawTable(
        Path(source.name).expanduser() / "+".join(source.splits), table, list(parts[0][2].features), warnings=warnings
    )


# -- rows and columns


def _pick_rows(source: DatasetSource, splits: dict[str, datasets.Dataset]) -> list[tuple[str, int, datasets.Dataset]]:
    """Name of the split, number of the first row and the rows, for each part that the source names."""
    parts = []
    for text in source.splits:
        for name in (part.partition("[")[0].strip() for part in text.split("+")):
            if name not in splits:
                raise UserError(f"{source}: has no split {name!r}: {say_near(name, splits)}it has {say_names(splits)}")
        try:
            found = datasets.ReadInstruction.from_spec(text).to_absolute({name: len(splits[name]) for name in splits})
        except (ValueError, AssertionError) as error:
            remedy = "write train, train+validation or train[:10%]"
            raise UserError(f"{source}: the split {text!r} does not parse ({one_line(error)}): {remedy}") from None
        parts += [
            (one.splitname, one.from_, splits[one.splitname].select(range(one.from_, one.to)))
            for one in found
            if one.to > one.from_
        ]
    refuse((not parts, f"{source}: is empty: name another split"))
    return parts


def _choose_columns(source: DatasetSource, features: datasets.Features, known: Collection[str]) -> dict[str, str]:
    """Our name of each column that is read → its own; `audio` among them."""
    named = {"audio": source.audio_column, "text": source.text_column}
    for role, name in named.items():
        if name and name not in features:
            remedy = f"{say_near(name, features)}it has {say_names(features)}"
            raise UserError(f"{source}: has no column {name!r}, which --{role}_column_name names: {remedy}")
    named["audio"] = named["audio"] or _find_audio(source, features)
    columns = {role: name for role, name in named.items() if name}
    taken = {alias for role in columns for alias in COLUMNS[role]}
    for name, feature in features.items():
        lower = name.lower()
        is_plain = isinstance(feature, datasets.Value | datasets.ClassLabel)
        if (
            is_plain
            and (is_own_length(lower) or lower in known)
            and lower not in taken
            and name not in columns.values()
        ):
            columns.setdefault(lower, name)
    kind = features[columns["audio"]]
    stored = pa.schema({"audio": features.arrow_schema.field(columns["audio"]).type}).field(0).type
    fields = {field.name for field in stored} if pa.types.is_struct(stored) else set()
    if ("array" in fields or not {"bytes", "path"} & fields) and not any(
        test(stored) for test in (*STRINGS, *BINARIES)
    ):
        remedy = "write its encoded bytes or paths as a column of datasets.Audio, or name another --audio_column_name"
        raise UserError(f"{source}: the column {columns['audio']} holds {kind}, not encoded audio: {remedy}")
    return columns


def _find_audio(source: DatasetSource, features: datasets.Features) -> str:
    """The column of audio: the only one of that kind, else `audio`, else one that a manifest may have."""
    kinds = [name for name, feature in features.items() if isinstance(feature, datasets.Audio)]
    lower = {name.lower(): name for name in features}
    found = [lower[alias] for alias in COLUMNS["audio"] if alias in lower]
    if len(kinds) == 1 or (found and len(kinds) == 0) or "audio" in kinds:
        return kinds[0] if len(kinds) == 1 else found[0]
    what = (
        f"has several columns of audio ({say_names(kinds)})"
        if kinds
        else f"has no column of audio: it has {say_names(features)}"
    )
    raise UserError(f"{source}: {what}; choose one by --audio_column_name")


def _read_column(part: datasets.Dataset, name: str) -> pa.ChunkedArray:
    """A column as it is; of classes their names, null where there is none."""
    column, feature = part.data.column(name), part.features[name]
    if not isinstance(feature, datasets.ClassLabel):
        return column
    numbers = pc.if_else(pc.less(column, 0), None, column)
    return pc.take(pa.array(feature.names, pa.string()), numbers)


def _shorten(paths: pa.ChunkedArray) -> pa.ChunkedArray:
    """Paths below the folder that all of them share."""
    if not len(paths) or paths.null_count:
        return paths
    bounds = pc.min_max(paths).as_py()
    shared = os.path.commonprefix([bounds["min"], bounds["max"]]).rpartition("/")
    return pc.utf8_slice_codeunits(paths, len(shared[0] + shared[1]))


# -- audio


def _read_audio(
    part: datasets.Dataset, column: str, cache_dir: str | Path | None
) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    """Address of each row's audio (null where there is none), and its path in the data set (null where it has none)."""
    found = find_addresses(part.data, column)
    if found is None:  # in memory, or compressed
        folder = Path(cache_dir or datasets.config.HF_DATASETS_CACHE, f"audio-{part._fingerprint}-{column}")
        if not folder.exists():
            aside = folder.with_name(f"{folder.name}-{uuid4().hex}.tmp")
            part.select_columns(column).save_to_disk(str(aside))
            aside.rename(folder)
        found = find_addresses(datasets.load_from_disk(str(folder), keep_in_memory=False).data, column)
    return found


def find_addresses(data: Table, column: str) -> tuple[pa.ChunkedArray, pa.ChunkedArray] | None:
    """As `_read_audio`; None where bytes lie in no memory-mapped file.

    A buffer that was read from a mapped file is a slice of it: its first ancestor is the whole file.
    """
    files = {}  # address in memory → path of the file that is mapped there
    for block in (block for row in getattr(data, "blocks", [[data]]) for block in row):
        if isinstance(block, MemoryMappedTable) and column in block.column_names:
            buffers = (buffer for chunk in block.column(column).chunks for buffer in chunk.buffers() if buffer)
            size = os.path.getsize(block.path)  # decompressed buffers are their own root
            files |= {root.address: block.path for root in map(_find_root, buffers) if root.size == size}
    addresses, paths = [], []
    for chunk in data.column(column).chunks:
        parts = (
            dict(zip([field.name for field in chunk.type], chunk.flatten(), strict=True))
            if pa.types.is_struct(chunk.type)
            else {"bytes" if any(test(chunk.type) for test in BINARIES) else "path": chunk}
        )
        nothing = pa.nulls(len(chunk), pa.string())
        path = parts.get("path", nothing).cast(pa.string())
        paths.append(path)
        content = parts.get("bytes", nothing)
        if content.null_count == len(content):
            addresses.append(path)
            continue
        _, offsets, values = content.buffers()
        root = _find_root(values)
        if root.address not in files:
            return None
        width = np.int64 if pa.types.is_large_binary(content.type) else np.int32
        bounds = np.frombuffer(offsets, width)[content.offset :][: len(content) + 1].astype(np.int64)
        bounds += values.address - root.address
        numbers = [pa.array(values).cast(pa.string()) for values in (bounds[:-1], np.diff(bounds))]
        written = pc.binary_join_element_wise(files[root.address], *numbers, ":")
        addresses.append(pc.if_else(content.is_valid(), written, path))
    return pa.chunked_array(addresses, pa.string()), pa.chunked_array(paths, pa.string())


def _find_root(buffer: pa.Buffer) -> pa.Buffer:
    while buffer.parent is not None:
        buffer = buffer.parent
    return buffer
