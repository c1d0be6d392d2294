"""Which utterance comes next where the data are shards that are fetched, and what is fetched before it is heard.

1. *Order.* An epoch hears the shards in a permuted order, cut into windows of at most `window_shards`. Within a window
   all utterances are permuted. Both permutations are keyed bijections: a place in an epoch is all that has to be saved.
2. *Ahead.* Threads fetch the shards of the next window while one is heard, across the end of an epoch too.
3. *Reading.* A shard that is not there when its audio is read is fetched then.

Shapes: N shards, P positions of an epoch.
"""

import contextlib
import queue
import threading
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from w2v2.audio.crops import AudioError
from w2v2.data.batching import Cursor, EpochOrder, MicroBatchPlan, PlanStream
from w2v2.data.collate import CropDataset
from w2v2.data.hashing import SHARDS, WINDOW, derive
from w2v2.data.shard_cache import FETCHED_AT_ONCE, ShardCache
from w2v2.data.shards import Shards
from w2v2.errors import UserError, tell


class Layout(NamedTuple):
    """The shards of an epoch, in the order in which they are heard."""

    shards: np.ndarray  # (N,) numbers of the shards
    ends: np.ndarray  # (N,) position after each of them, before the permutation within a window
    window_ends: np.ndarray  # position after each window


class ShardOrder:
    """A permutation of all utterances for each epoch that needs only a window of shards at a time.

    `num_rows`, (N,): utterances of each shard, which follow one another in the table.
    """

    def __init__(self, num_rows: np.ndarray, window_shards: int, seed: int):
        self.num_rows, self.seed = np.asarray(num_rows, np.int64), seed
        self.identity = {"shuffle_window_shards": window_shards}
        self.n = int(self.num_rows.sum())
        self.first_rows = np.cumsum(self.num_rows) - self.num_rows
        num_windows = -(-len(self.num_rows) // window_shards)
        self.cuts = np.arange(num_windows + 1) * len(self.num_rows) // num_windows  # windows of equal size, up to one
        self.shard_order = EpochOrder(len(self.num_rows), int(derive(seed, SHARDS)))
        self.layout = lru_cache(4)(self._lay_out)

    def _lay_out(self, epoch: int) -> Layout:
        shards = _permute(self.shard_order, epoch, np.arange(len(self.num_rows)))
        ends = np.cumsum(self.num_rows[shards])
        return Layout(shards, ends, ends[self.cuts[1:] - 1])

    def __call__(self, epoch: int, positions: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Utterances at `positions`, (P,) int64, of the epoch's order, and the epoch for each of them: (P,) int64."""
        shards, ends, window_ends = self.layout(epoch)
        place = positions.numpy().copy()  # → position before the permutation within a window
        windows = np.searchsorted(window_ends, place, side="right")
        for window in np.unique(windows):
            start = window_ends[window - 1] if window else 0
            inside = EpochOrder(int(window_ends[window] - start), int(derive(self.seed, WINDOW, int(window))))
            here = windows == window
            place[here] = start + _permute(inside, epoch, place[here] - start)
        slots = np.searchsorted(ends, place, side="right")
        number = shards[slots]
        utterance = self.first_rows[number] + place - (ends[slots] - self.num_rows[number])
        return utterance, np.full_like(utterance, epoch)

    def find_window(self, cursor: Cursor) -> tuple[int, int]:
        """Epoch, and number of the window in it, that hold this position."""
        return cursor.epoch, int(np.searchsorted(self.layout(cursor.epoch).window_ends, cursor.position, side="right"))

    def windows(self, cursor: Cursor) -> Iterator[tuple[tuple[int, int], list[int]]]:
        """Endless: each window from that of `cursor` on, as `find_window` names it, and the numbers of its shards."""
        epoch, window = self.find_window(cursor)
        while True:
            shards = self.layout(epoch).shards
            for number in range(window, len(self.cuts) - 1):
                yield (epoch, number), shards[self.cuts[number] : self.cuts[number + 1]].tolist()
            epoch, window = epoch + 1, 0


def _permute(order: EpochOrder, epoch: int, positions: np.ndarray) -> np.ndarray:
    return order(epoch, torch.from_numpy(positions))[0]


class FetchAhead:
    """The plans of `stream`; while a window is heard, threads fetch the shards of the next.

    The first window is here once this is made, before a loader starts its processes. What threads fail to fetch is
    told, and tried again by the worker that needs it.
    """

    def __init__(self, stream: PlanStream, shards: Shards):
        self.stream, self.shards, self.waiting = stream, shards, queue.SimpleQueue()
        self.windows = stream.batches.order.windows(stream.cursor)
        self.first = next(self.windows)
        shards.cache.fetch_all([shards.list[number] for number in self.first[1]], "Fetching the first shards")

    def __iter__(self) -> Iterator[MicroBatchPlan]:
        order: ShardOrder = self.stream.batches.order
        window, numbers = self.first
        for _ in range(FETCHED_AT_ONCE):
            threading.Thread(target=self._work, name="shards", daemon=True).start()
        try:
            for plan in self.stream:
                while window <= order.find_window(plan.following):
                    self._queue(numbers)  # what is there counts as used, so others are evicted before it
                    window, numbers = next(self.windows)
                    self._queue(numbers)
                yield plan
        finally:  # heard to its end, or given up
            with contextlib.suppress(queue.Empty):
                while True:
                    self.waiting.get_nowait()
            for _ in range(FETCHED_AT_ONCE):
                self.waiting.put(None)

    def _queue(self, numbers: list[int]) -> None:
        for number in numbers:
            self.waiting.put(self.shards.list[number])

    def _work(self) -> None:
        while shard := self.waiting.get():
            try:
                self.shards.cache.fetch(shard)
            except UserError as error:
                tell(f"{error}; it is tried again when its audio is needed")


class StreamedCrops(CropDataset):
    """`CropDataset` whose audio lies in shards: a copy that is missing is fetched before it is read."""

    def __init__(self, table, framing, seed: int, shards: Shards):
        super().__init__(table, framing, seed)
        self.cache: ShardCache = shards.cache
        self.copies = {shard.path: shard for shard in shards.list if not shard.in_place}

    def read(self, entry: dict, start: int, num_samples: int) -> np.ndarray:
        """Raises AudioError for damaged audio, and LocalError for a shard that cannot be fetched."""
        if not (shard := self.copies.get(entry["audio"].rsplit(":", 2)[0])):
            return super().read(entry, start, num_samples)
        self.cache.fetch(shard)
        try:
            return super().read(entry, start, num_samples)
        except AudioError:  # damaged, or evicted meanwhile, and perhaps there again
            with self.cache.hold(shard):
                return super().read(entry, start, num_samples)
