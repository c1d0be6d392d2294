"""The work of pack_audio.py that is done in parallel: one shard of utterances, read, rounded where need be, and written."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, as_completed, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import wait as wait_for
from pathlib import Path

import numpy as np
from packed_folder import AGAIN, written_aside

from w2v2.data.audio import MAX_PADDING, MAX_SHIFT, AudioError, probe, read_pcm
from w2v2.data.packed import quantized, sha256_of, write_shard
from w2v2.errors import UserError


@dataclass
class ShardTask:
    """The utterances of one shard, as columns of equal length."""

    folder: Path
    name: str
    ids: list[str]
    audio: list[str]
    num_samples: list[int]  # at 16 kHz
    starts: list[int]  # in samples


def read_utterance(audio: str, start: int, num_samples: int) -> np.ndarray:
    """An utterance's samples as `read_pcm` gives them, shape (S,).

    A file that its manifest makes longer than it is, by no more than a rounded duration explains, gives what it holds: a crop that
    overshoots the packed end then moves back exactly as it does in the file. Raises AudioError.
    """
    missing = num_samples - probe(audio) if start == 0 else 0
    return read_pcm(audio, start, num_samples - missing if 0 < missing <= MAX_SHIFT + MAX_PADDING else num_samples)


def pack_shard(task: ShardTask) -> dict:
    """Write one shard aside, down to the disk, and put it in its place. Returns its line of `shards.jsonl`.

    `skipped` holds `[row, reason]` of the utterances that could not be read. Raises UserError where the shard cannot be written.
    """
    path = task.folder / task.name
    record = {"shard": task.name, "bytes": 0, "sha256": "", "utterances": 0, "samples": 0}
    record |= {"rounded": 0, "clipped": 0, "clipped_samples": 0, "skipped": []}
    try:
        with written_aside(path) as unfinished:
            write_shard(unfinished, _utterances(task, record))
            record |= {"bytes": unfinished.stat().st_size, "sha256": sha256_of(unfinished)}
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"{path} cannot be written: {reason}: mend that and {AGAIN}, which keeps what is there"
        ) from None
    return record


def _utterances(task: ShardTask, record: dict) -> Iterator[tuple[str, np.ndarray]]:
    rows = zip(task.ids, task.audio, task.starts, task.num_samples, strict=True)
    for row, (name, audio, start, num_samples) in enumerate(rows):
        try:
            samples = read_utterance(audio, start, num_samples)
        except AudioError as error:
            record["skipped"].append([row, error.reason])
            continue
        if samples.dtype != np.int16:
            samples, num_clipped, inexact = quantized(samples)
            record["rounded"] += inexact
            record["clipped"] += num_clipped > 0
            record["clipped_samples"] += num_clipped
        record["utterances"] += 1
        record["samples"] += len(samples)
        yield name, samples


def pack_all(tasks: Iterable[ShardTask], num_workers: int) -> Iterator[dict]:
    """Records of all shards as they are finished, from `num_workers` processes; only a few tasks are built ahead.

    Raises UserError as `pack_shard` does, and where a worker is killed.
    """
    if num_workers <= 1:
        yield from map(pack_shard, tasks)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, mp_context=context, initializer=_die_with_parent) as pool:
        running = set()
        try:
            for task in tasks:
                running.add(pool.submit(pack_shard, task))
                if len(running) >= 2 * num_workers:
                    finished, running = wait(running, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in finished)
            yield from (future.result() for future in as_completed(running))
        except BrokenProcessPool:
            raise UserError(
                f"a worker was killed, perhaps for want of memory: {AGAIN}, with fewer --num_workers"
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _die_with_parent() -> None:
    """A worker neither outlives the command nor answers the terminal's Ctrl-C by itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch():
        wait_for([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
