"""The utterances that a run hears: read from manifests, those of a fitting length kept, a few of them looked at.

A run holds four bytes an utterance, its length; ids and paths stay in a memory-mapped file (`table_file.py`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa

from w2v2.data.audio import SAMPLING_RATE, AudioError, probe, read_crop
from w2v2.data.batching import CHUNK, crop_length
from w2v2.data.collate import Framing
from w2v2.data.manifest import read_manifests
from w2v2.data.table_file import hold
from w2v2.errors import UserError

NUM_PROBED = 64  # files whose headers are read before a run begins
NUM_LISTENED = 16  # files that are decoded to find out whether the data is silence
SILENCE = 1e-3  # of full scale, root mean square
MOST_SAMPLES = 2**31 - 1  # of an utterance: lengths are int32, and offsets of crops are drawn below 2³¹


@dataclass
class Utterances:
    """The eligible utterances of some manifests."""

    table: datasets.Dataset  # id, audio, start, num_samples, …
    num_samples: np.ndarray  # (n,) int32, at 16 kHz
    dropped: dict[str, int]  # how many were left out, by reason

    @property
    def hours(self) -> float:
        return float(self.num_samples.sum(dtype=np.int64)) / SAMPLING_RATE / 3600


def load_utterances(manifests: Sequence[str], args, framing: Framing) -> tuple[Utterances, list[dict]]:
    """Read manifests and leave out what is too short or too long.

    Returns: the utterances, and the files whose length had to be measured and could not. Their table is mapped from a file in the
    run's folder, except for a dry run, which leaves none. Raises `UserError` when nothing is left.
    """
    cache_dir = Path(args.output_dir) / "cache"
    table, unmeasured = read_manifests(list(manifests), data_root=args.data_root, cache_dir=cache_dir, probe=probe)
    kept, num_samples, dropped = _eligible(table, args, framing)
    dropped |= {"unreadable": len(unmeasured)}
    if not len(num_samples):
        raise UserError(
            f"{', '.join(manifests)}: no utterance is left of {len(table) + len(unmeasured)} ({dropped['too_short']} shorter than "
            f"{_least_samples(args, framing) / SAMPLING_RATE:g} s, {dropped['too_long']} longer than --max_seconds, "
            f"{len(unmeasured)} unreadable"
            + (f", the first: {unmeasured[0]['audio']}: {unmeasured[0]['reason']}" if unmeasured else "")
            + f"); lower --min_seconds, raise --crop_seconds (a mask span needs {framing.min_samples / SAMPLING_RATE:.2f} s), or "
            "give other audio"
        )
    held = hold(table, None if args.dry_run else cache_dir, None if kept.all() else kept)
    del table
    pa.default_memory_pool().release_unused()  # Arrow would keep a hundred bytes an utterance for the next table
    return Utterances(held, num_samples, dropped), unmeasured


def _least_samples(args, framing: Framing) -> int:
    return max(math.ceil(args.min_seconds * SAMPLING_RATE), framing.min_samples)


def _eligible(table: pa.Table, args, framing: Framing) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
    """Which rows are kept, (rows,) bool; the lengths of those, (n,) int32; and how many are too short and too long.

    Raises UserError for an utterance of 2³¹ samples (37 h) or more that `max_seconds` does not leave out.
    """
    least = _least_samples(args, framing)
    most = np.inf if args.max_seconds is None else args.max_seconds * SAMPLING_RATE
    crop = round(args.crop_seconds * SAMPLING_RATE), round(args.length_grid_seconds * SAMPLING_RATE)
    masks, lengths, dropped = [], [], {"too_short": 0, "too_long": 0}
    for batch in table.to_batches(max_chunksize=CHUNK):
        num_samples = batch.column("num_samples").to_numpy()
        short = (num_samples < least) | (crop_length(num_samples, *crop) < framing.min_samples)
        long = num_samples > most
        masks.append(~short & ~long)
        if (endless := np.flatnonzero(masks[-1] & (num_samples > MOST_SAMPLES))).size:
            row = int(endless[0])
            raise UserError(
                f"utterance {batch.column('id')[row]} has {num_samples[row] / SAMPLING_RATE / 3600:.1f} h, more than "
                f"{MOST_SAMPLES / SAMPLING_RATE / 3600:.1f}: cut it into several, or leave it out with --max_seconds"
            )
        lengths.append(num_samples[masks[-1]].astype(np.int32))
        dropped["too_short"] += int(short.sum())
        dropped["too_long"] += int(long.sum())
    return np.concatenate(masks), np.concatenate(lengths), dropped


def probe_some(utterances: Utterances) -> list[dict]:
    """Read the headers of a few files, evenly spread: a wrong root or format is found before the first update."""
    rows = np.unique(np.linspace(0, len(utterances.num_samples) - 1, NUM_PROBED).astype(int))
    unreadable = []
    for row in rows:
        entry = utterances.table[int(row)]
        try:
            probe(entry["audio"])
        except AudioError as error:
            unreadable.append({"id": entry["id"], "audio": entry["audio"], "reason": error.reason})
    return unreadable


def silent_share(utterances: Utterances) -> float:
    """Share of silence among a few utterances, evenly spread, of each at most five seconds from its middle."""
    rows = np.unique(np.linspace(0, len(utterances.num_samples) - 1, NUM_LISTENED).astype(int))
    is_silent = []
    for row in rows:
        entry, length = utterances.table[int(row)], int(utterances.num_samples[row])
        num_samples = min(5 * SAMPLING_RATE, length)
        start = round(entry["start"] * SAMPLING_RATE) + (length - num_samples) // 2
        try:
            is_silent.append(np.sqrt(np.mean(np.square(read_crop(entry["audio"], start, num_samples)))) < SILENCE)
        except AudioError:
            continue
    return float(np.mean(is_silent)) if is_silent else 0.0


def check_validation(utterances: Utterances, unmeasured: list[dict], max_fraction: float) -> None:
    """Raises `UserError` where more of the validation set is unreadable than tolerated: its figures would mislead."""
    unreadable = unmeasured + probe_some(utterances)
    num_files = len(utterances.num_samples) + len(unmeasured)
    if len(unreadable) > max_fraction * num_files:
        first = unreadable[0]
        raise UserError(
            f"--validation_data: {first['audio']}: {first['reason']}; {len(unreadable)} of {num_files} files cannot be read, more "
            f"than --max_skipped_fraction {max_fraction:g} allows: mend or remove them"
        )
