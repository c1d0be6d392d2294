"""A sample of the audio of a run, opened before it begins: what is wrong with the files, and how fast they are read."""

import contextlib
import os
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from w2v2.audio.crops import MAX_SHIFT, SAMPLING_RATE, AudioError, read_pcm
from w2v2.audio.files import split_address
from w2v2.audio.inspection import INSPECTED_SECONDS, AudioFacts, inspect_files
from w2v2.data.utterances import Utterances, spread_rows

UNUSABLE = ("missing", "unreadable", "ends_early")  # kinds of files that a run skips
KINDS = (*UNUSABLE, "silent", "clipped", "resampled", "stereo_mixed", "antiphase")
NUM_TIMED = 33  # odd, so that most rows are others than those that are looked at


def inspect_manifests(
    flag: str, utterances: Utterances, unmeasured: list[dict], max_fraction: float
) -> tuple[dict[str, dict[str, int]], list[str], str | None]:
    """Counts by kind for each manifest, a line for each, and why a run would stop (None: it would not)."""
    counts, lines, unusable = {}, [], {entry["audio"]: entry["reason"] for entry in unmeasured}
    for manifest, rows in utterances.samples.items():
        found = defaultdict(list)
        for row, facts in zip(rows, inspect_files([row["audio"] for row in rows], INSPECTED_SECONDS), strict=True):
            for kind, detail in find_faults(row, facts):
                found[kind].append(f"{row['audio']}: {detail}")
                unusable |= {row["audio"]: detail} if kind in UNUSABLE else {}
        counts[manifest] = {"files": len(rows)} | {kind: len(found[kind]) for kind in KINDS}
        said = [f"{len(found[kind])} {kind.replace('_', ' ')} ({found[kind][0]})" for kind in KINDS if found[kind]]
        lines.append(f"looked at     {len(rows)} files of {manifest}: {'; '.join(said) or 'nothing unusual'}")
    # A run stops where too many are known to be unusable, and sooner or later where the share of them is too large.
    looked_at = sum(found["files"] for found in counts.values())
    bad = sum(found[kind] for found in counts.values() for kind in UNUSABLE)
    is_certain = len(unusable) > max_fraction * (len(utterances.num_samples) + len(unmeasured))
    if not (is_certain or (bad > 2 and bad > max_fraction * looked_at)):
        return counts, lines, None
    path, reason = next(iter(unusable.items()))
    share = f"{bad} of {looked_at} files that were looked at cannot be used, more than --max_skipped_fraction {max_fraction:g} allows"
    return counts, lines, f"--{flag}: {path}: {reason}; {share}: a run would stop"


def find_faults(row: dict[str, Any], facts: AudioFacts) -> Iterator[tuple[str, str]]:
    """What is to be said of a row's file: the kind, and a detail for people."""
    if reason := facts.find_reason(row.get("channel")):
        yield "unreadable" if os.path.exists(split_address(row["audio"])[0]) else "missing", reason
        return
    end, length = row["start"] + (row["num_samples"] or 0) / SAMPLING_RATE, facts.num_samples
    if length is not None and end * SAMPLING_RATE > length + MAX_SHIFT:
        yield "ends_early", f"ends at {length / SAMPLING_RATE:.2f} s, its row at {end:.2f} s"
    if facts.is_silent:
        yield "silent", f"its peak is {facts.peak:.2g}"
    if facts.is_clipped:
        yield "clipped", f"many samples at its peak, {facts.peak:.2f}"
    if facts.sample_rate != SAMPLING_RATE:
        yield "resampled", f"{facts.sample_rate:,} Hz"
    if facts.channels > 1 and row.get("channel") is None:
        yield "stereo_mixed", f"{facts.channels} channels"
        if facts.is_antiphase:
            yield "antiphase", "its mix is far quieter than its channels: choose one in a column `channel`"


def measure_reading(utterances: Utterances, crop_seconds: float) -> float | None:
    """Seconds of audio that one process reads and decodes in a second, crop by crop; None where nothing can be read.

    The files that are looked at lie in the system's cache. So call it before them; a corpus that fits into memory may
    lie there all the same.
    """
    heard, seconds, most = 0, 0.0, round(crop_seconds * SAMPLING_RATE)
    for row in spread_rows(utterances.at_hand, NUM_TIMED):
        started, first = time.perf_counter(), round(row["start"] * SAMPLING_RATE)
        with contextlib.suppress(AudioError):
            heard += len(read_pcm(row["audio"], first, min(row["num_samples"], most), channel=row.get("channel")))
            seconds += time.perf_counter() - started
    return heard / SAMPLING_RATE / seconds if heard else None
