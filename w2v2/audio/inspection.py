"""What is found out about audio files, in worker processes: their lengths, and what is in them.

A file is decoded in a worker, so that a damaged one that crashes the decoder costs no process of the run itself.
"""

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from w2v2.audio.crops import check_peak, mix_down
from w2v2.audio.decoding import SAMPLING_RATE, AudioError, open_sound
from w2v2.audio.files import split_address

NUM_INSPECTED = 64  # files of a manifest, evenly spread
INSPECTED_SECONDS = 60.0  # of each of them, from its beginning
FILES_AT_ONCE = 8  # that a worker looks at before it reports
SILENCE = 1e-3  # of full scale, root mean square
CLIPPED = 1e-3  # share of the samples at full scale
ANTIPHASE = 0.25  # the mix, as a share of the quieter channel: −12 dB; independent channels give 0.7


@dataclass
class AudioFacts:
    """A file as a whole. Levels are of full scale 1; `error` says why it cannot be used, and then the rest is void."""

    path: str
    num_samples: int | None = None  # at 16 kHz, as it decodes; None where only the beginning was decoded
    sample_rate: int = 0  # of the file
    channels: int = 0
    codec: str = ""  # container and codec
    peak: float = 0.0
    is_silent: bool = False
    is_clipped: bool = False
    is_antiphase: bool = False  # the mix of its channels is far quieter than any of them
    error: str | None = None

    def find_reason(self, channel: int | None) -> str | None:
        """Why this channel (None: all) cannot be used."""
        if self.error is None and channel is not None and channel >= self.channels:
            return f"has {self.channels} channels, and the manifest asks for number {channel + 1}"
        return self.error


def inspect_audio(path: str, most_seconds: float = math.inf) -> AudioFacts:
    """Decode a file in blocks from its beginning, to its end or for so many seconds."""
    path = os.fsdecode(path)
    facts = AudioFacts(path)
    num_frames, num_full, power, mixed = 0, 0, 0.0, 0.0
    try:
        with open_sound(path) as file:
            facts.sample_rate, facts.channels, facts.codec = file.rate, file.channels, file.codec
            length = file.num_frames
            for block in file.blocks():  # (S, C)
                loudest = np.abs(block).max(axis=1)
                num_frames += len(block)
                num_full += int((loudest >= 1 - 2.0**-14).sum())
                facts.peak = float(np.maximum(facts.peak, loudest.max()))  # NaN where there is one
                check_peak(path, facts.peak)
                power = power + np.square(block, dtype=np.float64).sum(axis=0)  # (C,)
                mixed += float(np.square(mix_down(block), dtype=np.float64).sum())
                if num_frames >= most_seconds * file.rate:
                    break
            else:
                length = num_frames
            if num_frames * SAMPLING_RATE < file.rate:
                raise AudioError(path, "holds no audio")
    except AudioError as error:
        facts.error = error.reason
        return facts
    facts.num_samples = None if length is None else length * SAMPLING_RATE // facts.sample_rate
    levels, level = np.sqrt(power / num_frames), np.sqrt(mixed / num_frames)
    facts.is_silent = bool(levels.max() < SILENCE)
    facts.is_clipped = num_full > CLIPPED * num_frames
    facts.is_antiphase = bool(levels.min() >= SILENCE and level < ANTIPHASE * levels.min())
    return facts


def inspect_files(paths: Sequence[str], most_seconds: float = math.inf) -> list[AudioFacts]:
    """`inspect_audio` of each file, in their order."""
    return list(map_files(paths, partial(inspect_audio, most_seconds=most_seconds), "Looking at audio files"))


class _Files:
    def __init__(self, paths: Sequence[str], action: Callable[[str], Any], at_once: int):
        self.paths, self.action, self.at_once = paths, action, at_once

    def __getitem__(self, index: int) -> list:
        return [self.action(path) for path in self.paths[index * self.at_once : (index + 1) * self.at_once]]


def map_files(
    paths: Sequence[Any],
    action: Callable[[Any], Any],
    title: str,
    num_workers: int | None = None,
    at_once: int = FILES_AT_ONCE,
    unit: str = " files",
) -> Iterator:
    """What `action` finds of each file, in their order, from worker processes, with a bar of progress.

    `num_workers`: None for as many as there are cores, at most 32. A worker takes `at_once` files and reports them
    together. In a worker process, which can have none of its own, it runs there and without a bar.
    """
    import torch  # slow to import
    from torch.utils.data import DataLoader, get_worker_info

    if get_worker_info():
        yield from map(action, paths)
        return
    num_blocks = -(-len(paths) // at_once)
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    num_workers = min(num_workers or min(32, num_cores), num_blocks)
    # A generator of its own: what a run draws must not depend on the files that it looked at.
    options = {"batch_size": None, "num_workers": num_workers, "generator": torch.Generator()}
    files = _Files(paths, action, at_once)
    loader = DataLoader(files, sampler=range(num_blocks), **options, collate_fn=list)  # as they are
    with tqdm(total=len(paths), desc=title, unit=unit, disable=None) as bar:
        for found in loader:
            yield from found
            bar.update(len(found))


def _measure(measure: Callable[[str], int], path: str) -> int | str:
    """The length of a file, or the reason why it has none."""
    try:
        return int(measure(path))
    except AudioError as error:
        return error.reason


def identify_file(path: str) -> tuple[str, int, int] | None:
    """Path or address, and size and time of change of the file: the key in the cache."""
    with contextlib.suppress(OSError, ValueError):  # `measure` says why; ValueError: a null character
        status = os.stat(split_address(path)[0])
        return path, status.st_size, status.st_mtime_ns


def measure_lengths(
    paths: list[str],
    measure: Callable[[str], int],
    cache_dir: str | Path | None = None,
    file: str = "lengths.jsonl",
    num_workers: int | None = None,
) -> dict[str, int | str]:
    """Length of each file, or the reason (a string) why it has none: that of the AudioError which `measure` raises.

    Lengths are kept in `file` of `cache_dir` by path, size and time of change, a line a file, so that processes
    which measure at the same time do each other no harm. Files of known length go to no worker.
    """
    cache = None if cache_dir is None else Path(cache_dir, file)
    known: dict[tuple, int] = {}
    for line in cache.read_text(encoding="utf-8", errors="replace").splitlines() if cache and cache.exists() else ():
        with contextlib.suppress(ValueError, TypeError):  # a line torn by an interruption
            *key, length = json.loads(line)
            known[tuple(key)] = int(length)
    with ThreadPool(32) as pool:  # network storage answers many at once
        keys = dict(zip(paths, pool.map(identify_file, paths), strict=True)) if cache else {}
    lengths: dict[str, int | str] = {path: known[key] for path, key in keys.items() if key in known}
    unknown = [path for path in paths if path not in lengths]
    work = unknown, partial(_measure, measure), "Measuring audio files", num_workers
    found = map_files(*work) if unknown else ()
    for path, length in zip(unknown, found, strict=True):
        lengths[path] = length
        if isinstance(length, int) and keys.get(path):
            cache.parent.mkdir(parents=True, exist_ok=True)
            with open(cache, "a", encoding="utf-8") as out:
                out.write(json.dumps([*keys[path], length]) + "\n")
    return lengths
