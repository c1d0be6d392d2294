"""Shards, files of many utterances, wherever fsspec reaches them.

    corpus/train-{000..127}.tar    s3://bucket/train/*.tar    https://host/train-{0..9}.parquet    corpus/

The id of an utterance begins with the name of its shard, which does not depend on the place where the shards lie. A tar
on a local disk is read in place; of anything else a copy is read, which `ShardCache` fetches.
"""

import glob
import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from w2v2.audio.crops import SAMPLING_RATE
from w2v2.audio.inspection import NUM_INSPECTED
from w2v2.data.shard_cache import FETCHED_AT_ONCE, GIGABYTE, Shard, ShardCache, find_suffix, find_version
from w2v2.data.shard_index import describe_lost, index_shards, unpack_parquet
from w2v2.errors import UserError, one_line, tell
from w2v2.manifests.archives import expand_braces
from w2v2.manifests.columns import EXTRAS
from w2v2.manifests.dataset_loading import DatasetSource, Manifest, list_parquet, name_sources
from w2v2.manifests.manifest import count_channels
from w2v2.manifests.tables import take_rows

SUFFIXES = (".tar", ".parquet")
AHEAD = 3  # windows that the cache holds unless told: one is heard, one fetched, one is left by the slowest worker
LEAST_AHEAD = 2
MOST_LINES = 5  # that are told


@dataclass
class Shards:
    """What a run streams."""

    list: list[Shard]
    num_rows: np.ndarray  # (N,) utterances of each that are heard
    cache: ShardCache
    window_shards: int

    def keep(self, kept: np.ndarray) -> None:
        """Only some of the rows are heard: a bool for each."""
        number = np.repeat(np.arange(len(self.list)), self.num_rows)
        self.num_rows = np.bincount(number[kept], minlength=len(self.list))

    def find_rows(self, most: int) -> np.ndarray:
        """At most so many rows, evenly spread over the shards that are there; the first is fetched if none is."""
        there = np.array([shard.is_there for shard in self.list]) & (self.num_rows > 0)
        if not there.any():
            there[first := int(np.argmax(self.num_rows > 0))] = True
            self.cache.fetch(self.list[first])
        counts = np.where(there, self.num_rows, 0)
        ends = np.cumsum(counts)
        picked = np.unique(np.linspace(0, ends[-1] - 1, min(ends[-1], most)).astype(int))  # of the rows that are there
        shard = np.searchsorted(ends, picked, side="right")
        return picked - ends[shard] + np.cumsum(self.num_rows)[shard]

    def summarize(self) -> dict[str, Any]:
        """For the plan."""
        copied = [shard for shard in self.list if not shard.in_place]
        return {
            "shards": len(self.list),
            "gigabytes": sum(shard.num_bytes for shard in self.list) / GIGABYTE,
            "window_shards": min(self.window_shards, len(self.list)),
            "cache_gigabytes": self.cache.most_bytes / GIGABYTE if copied else 0.0,
            "cache_dir": str(self.cache.folder) if copied else None,
        }


def read_shards(manifests: Sequence[Manifest], args) -> tuple[pa.Table, list[dict], dict[str, Any]]:
    """The utterances of all shards that are named, as `read_manifests` gives them.

    Among the notes are `shards`, with the number of rows of each. Raises UserError.
    """
    cache_dir, title = Path(args.output_dir) / "cache", name_sources(manifests)
    copies = Path(args.shard_cache_dir or cache_dir / "shards")
    shards = list_shards(manifests, copies)
    cache = ShardCache(copies, find_room(shards, args), unpack_parquet)
    indexes = index_shards(shards, cache, cache_dir / "index")
    # 1. One table, in the order of the shards, and what could not be measured.
    table, warnings = _join(shards, indexes, title)
    is_read = pc.equal(table["reason"], "")
    skipped = table.filter(pc.invert(is_read)).select(["id", "audio", "reason"]).to_pylist()
    number = np.repeat(np.arange(len(shards)), list(map(len, indexes)))[is_read.to_numpy()]
    table = table.filter(is_read).drop_columns("reason")
    if not len(table):
        first = f"{skipped[0]['audio']}, which {skipped[0]['reason']}" if skipped else shards[0].url
        raise UserError(
            f"{title}: no audio could be measured, beginning with {first}: mend these shards, or give others"
        )
    # 2. Room for the copies, now that their sizes are known, and how many windows an effective batch takes.
    hours_a_shard = pc.sum(table["num_samples"]).as_py() / SAMPLING_RATE / 3600 / len(shards)
    windows_a_batch = math.ceil(args.batch_hours / hours_a_shard / args.shuffle_window_shards)
    cache.most_bytes = find_room(shards, args, windows_a_batch)
    # 3. What was met on the way.
    passed_over = Counter()
    for shard, index in zip(shards, indexes, strict=True):
        passed_over.update(json.loads(index.schema.metadata[b"passed_over"]))
        warnings += [line.replace(shard.path, shard.url) for line in json.loads(index.schema.metadata[b"lines"])]
        warnings += describe_lost(shard, index)
    for line in warnings[:MOST_LINES]:
        tell(line)
    if len(warnings) > MOST_LINES:
        tell(f"{len(warnings) - MOST_LINES:,} more lines on shards are in plan.json")
    found = Shards(shards, np.bincount(number, minlength=len(shards)), cache, args.shuffle_window_shards)
    notes = {"warnings": warnings, "passed_over": dict(passed_over), "shards": found}
    return table, skipped, notes | {"samples": {title: take_rows(table, found.find_rows(NUM_INSPECTED))}}


def _join(shards: Sequence[Shard], indexes: Sequence[pa.Table], title: str) -> tuple[pa.Table, list[str]]:
    """All indexes in one table: ids with the shard's name, addresses with the path of what is read; and warnings."""

    def repeat(words: Iterator[str]) -> pa.ChunkedArray:
        return pa.chunked_array([pa.repeat(word, len(index)) for word, index in zip(words, indexes, strict=True)])

    table = pa.concat_tables(indexes, promote_options="default")
    columns = {name: pc.fill_null(table[name], "") if name in EXTRAS else table[name] for name in table.column_names}
    columns["id"] = pc.binary_join_element_wise(repeat(shard.name for shard in shards), table["id"], "/")
    columns["audio"] = pc.binary_join_element_wise(repeat(shard.path for shard in shards), table["audio"], "")
    tables = {title: pa.table(columns)}
    lines = count_channels(tables) if "channel" in columns else []
    return tables[title], lines


def describe_shards(summary: dict[str, Any]) -> str:
    """What `Shards.summarize` gives, as a line of the plan."""
    copies = f"up to {summary['cache_gigabytes']:.3g} GB of copies in {summary['cache_dir']}"
    return (
        f"streaming     {summary['gigabytes']:.2f} GB in {summary['shards']:,} shards, {summary['window_shards']:,} in a window, "
        f"{copies if summary['cache_dir'] else 'read in place'}"
    )


def find_room(shards: Sequence[Shard], args, windows_a_batch: int = 1) -> int:
    """Bytes that the copies may take, with those being unpacked. Raises UserError where what is heard does not fit.

    An effective batch is sorted by length, so each of its micro-batches may lie in any of its windows.
    """
    least_ahead = LEAST_AHEAD + windows_a_batch - 1
    sizes = sorted((shard.num_bytes for shard in shards if not shard.in_place), reverse=True)
    packed = sorted((shard.size for shard in shards if shard.is_parquet and "://" in shard.url), reverse=True)
    spare = sum(packed[:1] * FETCHED_AT_ONCE)
    least = sum(sizes[: least_ahead * args.shuffle_window_shards]) + spare
    most = sum(sizes[: (AHEAD + windows_a_batch - 1) * args.shuffle_window_shards]) + spare
    if args.shard_cache_gb is None:
        return most
    if (given := round(args.shard_cache_gb * GIGABYTE)) < least:
        raise UserError(
            f"--shard_cache_gb {args.shard_cache_gb:g} does not hold {least_ahead} windows of shards, {least / GIGABYTE:.3g} GB: "
            f"raise it, or lower --shuffle_window_shards {args.shuffle_window_shards}"
        )
    return given


# -- listing


def list_shards(manifests: Sequence[Manifest], copies: Path) -> list[Shard]:
    """The shards that patterns, folders, URLs and data sets name, sorted by name; `copies` is where those not in place are read.

    Raises UserError for what cannot be found or is no shard.
    """
    found = {}
    for manifest in manifests:
        column = manifest.audio_column if isinstance(manifest, DatasetSource) else None
        for url, info in _list_manifest(manifest):
            if find_suffix(url) not in SUFFIXES:
                raise UserError(
                    f"{url} is not a shard: --streaming reads {' and '.join(SUFFIXES)} files, neither manifests nor compressed tars"
                )
            if url in found:
                raise UserError(f"shard {url} is given twice: name each once")
            if info.get("size") is None:
                raise UserError(
                    f"shard {url}: its server does not tell its size, so a copy could not be checked: copy it to a disk, and name that"
                )
            found[url] = info | {"column": column}
    urls = sorted(found)
    shards = []
    for url, name in zip(urls, _name_shards(urls), strict=True):
        size, version = int(found[url]["size"]), find_version(found[url])
        in_place = "://" not in url and find_suffix(url) == ".tar"
        key = hashlib.sha256("\0".join([url, str(size), version, found[url]["column"] or ""]).encode()).hexdigest()[:16]
        base = re.sub(r"[^\w.-]", "_", name.split("/")[-1])[-80:]
        copy = str(copies.absolute() / f"shard-{key}-{base}")
        shards.append(Shard(url, name, url if in_place else copy, size, found[url]["column"], version))
    return shards


def _name_shards(urls: Sequence[str]) -> list[str]:
    """Paths below the folder that all share, without queries (signatures) where these do not tell shards apart."""
    depth = len(os.path.commonprefix([url.split("?")[0].split("/")[:-1] for url in urls]))
    whole = ["/".join(url.split("/")[depth:]) for url in urls]
    bare = [name.split("?")[0] if "://" in url else name for name, url in zip(whole, urls, strict=True)]
    return bare if len(set(bare)) == len(bare) else whole


def _list_manifest(manifest: Manifest) -> list[tuple[str, dict]]:
    """URL or absolute path, and what its place tells, of each file that a pattern or a data set names."""
    if isinstance(manifest, DatasetSource):
        names = list_parquet(manifest)
    elif manifest.startswith("pipe:") or "::" in manifest:
        raise UserError(f"{manifest}: commands and chained addresses are not run: name files or URLs that fsspec opens")
    else:
        is_url = "://" in manifest
        names = list(expand_braces(manifest if is_url else os.path.abspath(os.path.expanduser(manifest))))
    try:
        with ThreadPool(min(32, len(names))) as pool:
            entries = [entry for found in pool.imap(_list_name, names) for entry in found]
    except ImportError as error:
        raise UserError(f"{manifest}: {one_line(error)}") from None  # fsspec names the package to install
    except Exception as error:  # file systems raise whatever their clients raise
        reason = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be listed ({one_line(error)})"
        raise UserError(f"{manifest} {reason}: check the address, and the connection or rights it needs") from None
    if not entries:
        raise UserError(f"{manifest} matches no shard ({' or '.join(SUFFIXES)}): check the pattern")
    return entries


def _list_name(name: str) -> list[tuple[str, dict]]:
    files, path = fsspec.core.url_to_fs(name)
    as_url = files.unstrip_protocol if "://" in name else str
    has_pattern = "*" in name if name.startswith("http") else glob.has_magic(name)
    if has_pattern:
        entries = files.glob(path, detail=True)
        return [(as_url(key), info) for key, info in sorted(entries.items()) if info["type"] == "file"]
    info = files.info(path)
    if info["type"] == "directory":
        entries = files.ls(path, detail=True)
        shards = [(as_url(info["name"]), info) for info in entries if info["name"].lower().endswith(SUFFIXES)]
        if passed_over := len(entries) - len(shards):
            tell(
                f"{name}: {passed_over:,} of its {len(entries):,} entries are not shards (folders are not searched) and are skipped"
            )
        return shards
    return [(as_url(path), info)]
