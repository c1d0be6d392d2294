"""The utterances that a run hears: read from manifests, those of a fitting length kept, a few of them looked at.

A run holds four bytes an utterance. All processes share the table of ids and paths, a memory-mapped Arrow file.
"""

import contextlib
import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets.table import MemoryMappedTable

from w2v2.audio.crops import SAMPLING_RATE, AudioError, is_compressed, read_crop
from w2v2.audio.inspection import INSPECTED_SECONDS, NUM_INSPECTED, SILENCE, inspect_files
from w2v2.data.batching import CHUNK, crop_length
from w2v2.data.collate import Framing
from w2v2.data.shards import Shards, read_shards
from w2v2.errors import UserError, tell
from w2v2.manifests.dataset_loading import Manifest, name_sources
from w2v2.manifests.manifest import read_manifests
from w2v2.manifests.sources import Source, count_utterances, is_sources_file, read_sources
from w2v2.manifests.tables import BATCH_ROWS, cut_table, filter_rows

SLOW_SECONDS = 300.0  # into a compressed file, beyond which packing is advised
NUM_DECODED = 16  # files that are decoded to find out whether the data is silence
MOST_SAMPLES = 2**31 - 1  # of an utterance: lengths are int32, and offsets of crops are drawn below 2³¹


@dataclass
class Utterances:
    """The eligible utterances of some manifests."""

    table: datasets.Dataset  # id, audio, start, num_samples, …
    num_samples: np.ndarray  # (n,) int32, at 16 kHz
    dropped: dict[str, int]  # how many were left out, by reason
    dropped_hours: dict[str, float] = field(default_factory=dict)  # where their length is known
    passed_over: dict[str, int] = field(default_factory=dict)  # files of folders that are no audio, by suffix
    warnings: list[str] = field(default_factory=list)  # of the manifests
    samples: dict[str, list[dict]] = field(default_factory=dict)  # a few rows of each manifest, or source
    sources: list[Source] = field(default_factory=list)  # of a sources file, each a range of rows
    shards: Shards | None = None  # where they are streamed

    @property
    def hours(self) -> float:
        return float(self.num_samples.sum(dtype=np.int64)) / SAMPLING_RATE / 3600

    @property
    def at_hand(self) -> datasets.Dataset:
        """The table, or a few of its rows where shards would have to be fetched for the others."""
        return self.table.select(self.shards.find_rows(NUM_INSPECTED)) if self.shards else self.table


def spread_rows(table: datasets.Dataset, most: int) -> list[dict]:
    """At most so many rows, evenly spread."""
    return [table[int(row)] for row in np.unique(np.linspace(0, len(table) - 1, min(len(table), most)).astype(int))]


def load_manifest(
    paths: Sequence[Manifest], *, cache_dir: str | Path | None = None, **options
) -> tuple[datasets.Dataset, list[dict]]:
    """`read_manifests` as a data set: memory-mapped from a file in `cache_dir`, or in memory where that is None."""
    table, skipped, _ = read_manifests(paths, cache_dir=cache_dir, **options)
    tell_slow_crops(table)
    return map_table(table, cache_dir), skipped


def map_table(table: pa.Table, cache_dir: str | Path | None, kept: np.ndarray | None = None) -> datasets.Dataset:
    """The rows where `kept`, (rows,) bool, is true, memory-mapped from a file in `cache_dir`.

    Where that is None, they stay as `tables` holds them.

    The digest of its content names the file, so that processes that start together share it. Each writes it aside and
    renames it when it has reached the disk.
    """
    if cache_dir is None:
        return datasets.Dataset(table if kept is None else filter_rows(table, kept))
    aside = Path(cache_dir, f"utterances-{uuid4().hex}.tmp")
    aside.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(aside, "w+b") as file:
            with pa.ipc.new_stream(file, table.schema) as stream:
                for part in cut_table(table, kept):
                    stream.write_table(part, max_chunksize=BATCH_ROWS)
            file.flush()
            os.fsync(file.fileno())
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        path = aside.with_name(f"utterances-{digest}.arrow")
        if not path.exists():
            aside.rename(path)
    finally:
        aside.unlink(missing_ok=True)
    return datasets.Dataset(MemoryMappedTable.from_file(str(path)), fingerprint=digest)


def load_utterances(
    manifests: Sequence[Manifest], args, framing: Framing, streaming: bool = False
) -> tuple[Utterances, list[dict]]:
    """Read manifests, a sources file or the shards that are streamed, and leave out what is too short or too long.

    Returns: the utterances, their table mapped from a file except in a dry run, and the files that could not be measured
    """
    cache_dir = Path(args.output_dir) / "cache"
    if streaming:
        table, unmeasured, notes = read_shards(manifests, args)
    elif is_sources_file(manifests):
        table, unmeasured, notes = read_sources(manifests[0], data_root=args.data_root, cache_dir=cache_dir)
    else:
        table, unmeasured, notes = read_manifests(manifests, data_root=args.data_root, cache_dir=cache_dir)
    notes["warnings"] += tell_slow_crops(table)
    num_samples = table["num_samples"].to_numpy()  # (rows,) int64
    # 1. Which rows are too short, as a whole or as a crop, or too long?
    least = max(math.ceil(args.min_seconds * SAMPLING_RATE), framing.min_samples)
    most = MOST_SAMPLES if args.max_seconds is None else min(args.max_seconds * SAMPLING_RATE, MOST_SAMPLES)
    crop = round(args.crop_seconds * SAMPLING_RATE), round(args.length_grid_seconds * SAMPLING_RATE)
    heard = np.empty(len(num_samples), np.int32)
    for at in range(0, len(num_samples), CHUNK):
        part = slice(at, at + CHUNK)
        heard[part] = np.minimum(crop_length(num_samples[part], *crop), MOST_SAMPLES)
    short, long = (num_samples < least) | (heard < framing.min_samples), num_samples > most
    kept = ~short & ~long
    dropped = {"too_short": int(short.sum()), "too_long": int(long.sum()), "unreadable": len(unmeasured)}
    left_out = {"too_short": short, "too_long": long}
    hours = {why: float(num_samples.sum(where=rows)) / SAMPLING_RATE / 3600 for why, rows in left_out.items()}
    if not kept.any():
        first = f", the first: {unmeasured[0]['audio']}: {unmeasured[0]['reason']}" if unmeasured else ""
        raise UserError(
            f"{name_sources(manifests)}: no utterance is left of {len(kept) + len(unmeasured)} ({dropped['too_short']} shorter "
            f"than {least / SAMPLING_RATE:g} s, {dropped['too_long']} longer than --max_seconds or 37 h, {len(unmeasured)} "
            f"unreadable{first}); lower --min_seconds, raise --crop_seconds (a mask span needs "
            f"{framing.min_samples / SAMPLING_RATE:.2f} s), or give other audio"
        )
    count_utterances(notes.get("sources", []), kept, num_samples, heard)
    # 2. Keep the others: their lengths in memory, the rest in a file.
    if streaming:
        notes["shards"].keep(kept)
    lengths = num_samples.astype(np.int32)[kept]  # what wraps around is too long, and left out
    del num_samples, heard
    data = map_table(table, None if args.dry_run else cache_dir, None if kept.all() else kept)
    del table
    pa.default_memory_pool().release_unused()  # Arrow would keep some of it for the next table
    return Utterances(data, lengths, dropped, hours, **notes), unmeasured


def tell_slow_crops(table: pa.Table) -> list[str]:
    """A warning that is also told, where crops lie deep in compressed files: each decodes its file from the beginning."""
    num_slow, first = 0, None
    for batch in table.select(["audio", "start", "num_samples"]).to_batches(BATCH_ROWS):
        audio, start, num_samples = batch.columns
        ends = pc.add(start, pc.divide(pc.cast(num_samples, pa.float64()), float(SAMPLING_RATE)))
        deep = audio.filter(pc.greater(ends, SLOW_SECONDS))
        slow = deep.filter(pc.is_in(deep, pa.array(list(filter(is_compressed, deep.unique().to_pylist())), deep.type)))
        num_slow, first = num_slow + len(slow), first or (slow[0].as_py() if len(slow) else None)
    if not num_slow:
        return []
    line = (
        f"{num_slow:,} of {len(table):,} utterances end more than {SLOW_SECONDS / 60:g} minutes into a compressed file, the first "
        f"in {first}: each of their crops decodes the file from its beginning, which is slow; data_scripts/pack_audio.py "
        "writes them to WAV shards once"
    )
    tell(line)
    return [line]


def inspect_some(table: datasets.Dataset) -> list[dict]:
    """Inspect the beginnings of a few files. Those that cannot be read come back as {id, audio, reason}."""
    entries = spread_rows(table, NUM_INSPECTED)
    looked = list(zip(entries, inspect_files([entry["audio"] for entry in entries], INSPECTED_SECONDS), strict=True))
    if opposite := [facts.path for entry, facts in looked if facts.is_antiphase and entry.get("channel") is None]:
        tell(
            f"{len(opposite)} of {len(looked)} files that were looked at are stereo whose sides cancel out when they are mixed, "
            f"the first: {opposite[0]}; pick a side by a column `channel` in the manifest"
        )
    reasons = [(row, facts.find_reason(row.get("channel"))) for row, facts in looked]
    return [{"id": row["id"], "audio": row["audio"], "reason": reason} for row, reason in reasons if reason]


def silent_share(utterances: Utterances) -> float:
    """Share of silence among a few utterances, of each at most five seconds from its middle."""
    is_silent = []
    for entry in spread_rows(utterances.at_hand, NUM_DECODED):
        num_samples = min(5 * SAMPLING_RATE, entry["num_samples"])
        start = round(entry["start"] * SAMPLING_RATE) + (entry["num_samples"] - num_samples) // 2
        with contextlib.suppress(AudioError):
            samples = read_crop(entry["audio"], start, num_samples, entry.get("channel"))
            is_silent.append(np.sqrt(np.mean(np.square(samples, dtype=np.float64))) < SILENCE)
    return float(np.mean(is_silent)) if is_silent else 0.0
