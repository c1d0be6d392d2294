"""Audio files → exactly the crop that is asked for: 16 kHz, mono, int16 where the source holds 16 bits, else float32.

A file gives exactly the samples that were asked for, or an `AudioError`. libsndfile decodes only the crop. soxr
resamples other rates: the crop and a margin, cut where both rates have a sample at the same instant. The result equals
that part of the whole resampled file, but for the filter's far tails. Lengths are measured in threads and remembered.
"""

import contextlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from math import gcd
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import soxr
from tqdm.auto import tqdm

from w2v2.data.decoding import SAMPLING_RATE, AudioError, open_sound, scan_read, seek_read

AUDIO_SUFFIXES = frozenset(".wav .flac .ogg .oga .opus .mp3 .aif .aiff .aifc .au .snd .sph .nist .w64 .caf".split())
MARGIN = 1_600  # samples at 16 kHz on either side of a crop: many times the resampling filter's half-length
MAX_SHIFT = SAMPLING_RATE // 2  # a duration rounded to whole seconds overshoots the end by at most this
MAX_PADDING = SAMPLING_RATE // 100  # a duration rounded to two decimals: shorter than one latent frame
FITS_INT16 = frozenset("PCM_16 PCM_S8 PCM_U8 ULAW ALAW ALAC_16".split())  # every sample is a 16-bit number
MAX_AMPLITUDE = 2.0**31  # of floats on the scale of 32-bit integers; anything larger would only spoil an update
FILES_AT_ONCE = 10_000  # measured between two writes to the cache, so that an interrupted scan of millions is not lost
NUM_THREADS = min(32, 4 * (os.cpu_count() or 1))  # they wait for the disk


def probe(path: str) -> int:
    """Length of a file in samples at 16 kHz (rounded down), from its header. Raises AudioError."""
    with open_sound(os.fsdecode(path)) as (file, num_frames):
        return num_frames * SAMPLING_RATE // file.samplerate


def probe_rate(path: str) -> int:
    """Frames a second of a file. Raises AudioError."""
    with open_sound(os.fsdecode(path)) as (file, _):
        return file.samplerate


def read_crop(path: str, start: int = 0, num_samples: int | None = None) -> np.ndarray:
    """As `read_pcm`, always float32 in [-1, 1]: 16-bit samples are divided by 32,768, which is exact."""
    samples = read_pcm(path, start, num_samples)
    return samples if samples.dtype == np.float32 else samples * np.float32(1 / 32_768)


def read_pcm(path: str, start: int = 0, num_samples: int | None = None, stop: int | None = None) -> np.ndarray:
    """`num_samples` from `start` (both in samples at 16 kHz; None: to the end), mono, (S,), without any loss.

    int16 where the source is mono at 16 kHz and no sample needs more than 16 bits, else float32. Manifests often round
    durations: a window that overshoots the file's end by up to half a second moves back, and up to 10 ms that the whole
    file lacks are filled with zeros. `stop` is the end of the whole utterance by its manifest. A file that ends more
    than half a second before it is refused, so whether a file is used does not depend on the crop that is drawn.

    Raises AudioError where more is missing, where decoding fails or ends early, and for samples that no recording has.
    """
    path = os.fsdecode(path)
    assert start >= 0 and (num_samples is None or num_samples > 0), (path, start, num_samples)
    with open_sound(path) as (file, num_frames):
        rate = file.samplerate
        length = num_frames * SAMPLING_RATE // rate
        start, num_samples, padding = _fit_window(path, start, num_samples, length, stop)
        first, last, skip = _source_window(start, num_samples, rate, num_frames)
        dtype = "int16" if rate == SAMPLING_RATE and file.channels == 1 and file.subtype in FITS_INT16 else "float32"
        read = seek_read if num_frames == file.frames else scan_read
        samples = read(path, file, first, last, dtype)  # (last - first,) at the file's rate
    peak = 0 if dtype == "int16" else np.maximum(samples.max(), -samples.min())  # NaN where there is one
    if not peak <= MAX_AMPLITUDE:
        loud = f"samples up to {peak:.3g}, where full scale is 1: damaged"
        raise AudioError(path, f"holds {loud if np.isfinite(peak) else 'NaN or infinite samples'}")
    if rate != SAMPLING_RATE:
        samples = soxr.resample(samples, rate, SAMPLING_RATE, quality="HQ")  # → (skip + num_samples + margin,)
    return np.ascontiguousarray(np.pad(samples[skip : skip + num_samples], (0, padding)))


def _fit_window(path: str, start: int, num_samples: int | None, length: int, stop: int | None) -> tuple[int, int, int]:
    """Start, samples to take and zeros to append, for a file of `length` samples at 16 kHz."""
    has, short = f"has {length} samples at 16 kHz", "shorter than its manifest says"  # for messages
    if stop is not None and stop - length > MAX_SHIFT + MAX_PADDING:
        raise AudioError(path, f"{has} of {stop} in its manifest: {short}")
    if num_samples is None:
        if start >= length:
            raise AudioError(path, f"{has}, so nothing at {start}: {short}")
        return start, length - start, 0
    missing = max(0, start + num_samples - length)
    padding = max(0, num_samples - length)
    if padding > MAX_PADDING or missing > MAX_SHIFT + MAX_PADDING:
        raise AudioError(path, f"{has}, of which {start} to {start + num_samples} were asked for: {short}")
    return max(0, start - missing), num_samples - padding, padding


def _source_window(start: int, num_samples: int, rate: int, num_frames: int) -> tuple[int, int, int]:
    """First and last frame (at the file's `rate`) that the crop needs, and the resampled samples before the crop.

    The first frame lies on the common grid of both rates (every 441 frames = 160 samples for 44.1 kHz), so no fraction
    of a sample shifts the crop.
    """
    if rate == SAMPLING_RATE:
        return start, start + num_samples, 0
    common = gcd(rate, SAMPLING_RATE)
    samples_per_cell, frames_per_cell = SAMPLING_RATE // common, rate // common
    cell = max(0, start - MARGIN) // samples_per_cell
    last = -(-(start + num_samples + MARGIN) * rate // SAMPLING_RATE)
    return cell * frames_per_cell, min(last, num_frames), start - cell * samples_per_cell


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
    filled = pc.replace_with_mask(table["num_samples"].combine_chunks(), unknown, pa.array(lengths, pa.int64()))
    table = table.set_column(table.column_names.index("num_samples"), "num_samples", filled)
    return table.filter(pc.is_valid(filled)), skipped


def measure_lengths(
    paths: list[str], probe: Callable[[str], int], cache_dir: str | Path | None = None
) -> dict[str, int | str]:
    """Length of each file, or the reason (a string) why it has none: that of the AudioError which `probe` raises.

    Lengths are kept in `cache_dir/durations.jsonl` by path, size and time of change, a line a file, so that processes
    which measure at the same time do each other no harm.
    """
    cache = None if cache_dir is None else Path(cache_dir, "durations.jsonl")
    known: dict[tuple, int] = {}
    for line in cache.read_text(encoding="utf-8", errors="replace").splitlines() if cache and cache.exists() else ():
        with contextlib.suppress(ValueError, TypeError):  # a line torn by an interruption
            *key, length = json.loads(line)
            known[tuple(key)] = int(length)

    def measure(path: str) -> tuple[tuple | None, int | str]:
        """The key of a file in the cache, and its length or the reason why it has none."""
        key = None
        with contextlib.suppress(OSError, ValueError):  # the probe says why; ValueError: a null character
            status = os.stat(path)
            key = (path, status.st_size, status.st_mtime_ns)
        try:
            return key, known[key] if key in known else int(probe(path))
        except AudioError as error:
            return None, error.reason

    lengths = {}
    bar = tqdm(total=len(paths), desc="Measuring audio files", unit=" files", disable=None)
    with ThreadPoolExecutor(NUM_THREADS) as pool, bar:
        for first in range(0, len(paths), FILES_AT_ONCE):
            block, fresh = paths[first : first + FILES_AT_ONCE], []
            for path, (key, length) in zip(block, pool.map(measure, block), strict=True):
                lengths[path] = length
                bar.update()
                if key and key not in known:
                    fresh.append(json.dumps([*key, length]) + "\n")
            if cache and fresh:
                cache.parent.mkdir(parents=True, exist_ok=True)
                with open(cache, "a", encoding="utf-8") as file:
                    file.writelines(fresh)
    return lengths
