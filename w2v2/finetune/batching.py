"""Which utterances go through the model together: by number in groups of like length, or by seconds.

By seconds: an epoch of utterances → updates of about equal seconds → this rank's micro-batches. The epoch's order is
cut where whole effective batches are reached, into as many updates as fit best. Every utterance is heard once an
epoch, no update is a small remainder, and every epoch has as many updates, as `Trainer` needs to resume.
"""

import bisect
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from w2v2.data.batching import EpochOrder
from w2v2.data.cutting import deal

BATCHES_PER_WINDOW = 50


class LengthSampler(Sampler[int]):
    """Batches of like length in random order, a pure function of (seed, epoch): a resumed run goes on with its batches.

    A random permutation is cut into windows of many batches. Each is sorted by length and cut into batches, and these
    are shuffled; a last batch that is not full stays last. `Trainer`'s own groups run from long to short: the demo
    learns more slowly from them.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int):
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed((self.seed << 20) + self.epoch)
        order = torch.randperm(len(self), generator=generator).tolist()
        window, size = self.batch_size * BATCHES_PER_WINDOW, self.batch_size
        windows = [order[i : i + window] for i in range(0, len(order), window)]
        order = [row for some in windows for row in sorted(some, key=self.lengths.__getitem__)]
        num_full = len(order) // size
        for batch in torch.randperm(num_full, generator=generator).tolist():
            yield from order[batch * size : (batch + 1) * size]
        yield from order[num_full * size :]


class MicroBatch(NamedTuple):
    """Rows of a data set that go through the model together."""

    rows: tuple[int, ...]
    is_dummy: bool  # carries no weight: makes the number of micro-batches the same on every rank


class UpdateSampler(Sampler[list[MicroBatch]]):
    """This rank's micro-batches, one list an update: the `batch_sampler` of a `DataLoader` over `MicroBatches`.

    `epoch` says which epoch is drawn next. Lengths and budgets are in samples; a single utterance longer than
    `micro_batch_samples` is a micro-batch of its own. A set smaller than an effective batch is one update.
    """

    def __init__(self, lengths: Sequence[int], batch_samples: int, micro_batch_samples: int, seed: int, *,
                 rank: int = 0, num_ranks: int = 1):  # fmt: skip
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.micro_batch_samples = max(micro_batch_samples, int(self.lengths.max()))
        self.num_updates = min(len(self.lengths), max(1, round(int(self.lengths.sum()) / batch_samples)))
        self.order = EpochOrder(len(self.lengths), seed)
        self.rank, self.num_ranks, self.epoch = rank, num_ranks, 0

    def __len__(self) -> int:
        return self.num_updates

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        return map(self.micro_batches, self.updates(self.epoch))

    def updates(self, epoch: int) -> list[np.ndarray]:
        """Rows of each effective batch of an epoch, int64; devices and micro-batches play no part."""
        order = self.order(epoch, torch.arange(len(self.lengths)))[0]
        heard = np.cumsum(self.lengths[order])
        middles = heard - self.lengths[order] / 2
        update = np.minimum((middles * self.num_updates / heard[-1]).astype(np.int64), self.num_updates - 1)
        if len(np.unique(update)) < self.num_updates:  # an utterance longer than a share: by number instead
            return np.array_split(order, self.num_updates)
        return np.split(order, np.searchsorted(update, np.arange(1, self.num_updates)))

    def micro_batches(self, rows: np.ndarray) -> list[MicroBatch]:
        """This rank's part of an effective batch, larger ones first: as many micro-batches as every other rank has."""
        rows = rows[np.lexsort((rows, -self.lengths[rows]))]
        rounds, pieces = cut_padded(self.lengths[rows], self.num_ranks, self.micro_batch_samples)
        found = [MicroBatch(tuple(rows[piece].tolist()), is_dummy=False) for piece in pieces]
        found += [MicroBatch((int(rows[-1]),), is_dummy=True)] * (rounds * self.num_ranks - len(found))
        return [found[piece] for piece in deal(rounds, self.num_ranks, self.rank)]


def cut_padded(lengths: np.ndarray, num_ranks: int, budget: int) -> tuple[int, list[slice]]:
    """Cut utterances, longest first, into m rounds of pieces whose padded size (rows × longest) is within `budget`.

    m is the fewest rounds; for it, the pieces are those of the smallest budget that needs no more.

    Returns: m, and at most m × num_ranks pieces, the largest first.
    """

    def pieces(budget: int) -> list[slice]:
        found, first = [], 0
        while first < len(lengths):
            found.append(slice(first, first + max(1, budget // int(lengths[first]))))
            first = found[-1].stop
        return found

    rounds = math.ceil(len(pieces(budget)) / num_ranks)
    least = range(int(lengths[0]), budget)
    smallest = bisect.bisect_left(least, True, key=lambda budget: len(pieces(budget)) <= rounds * num_ranks)
    found = pieces(int(lengths[0]) + smallest)
    return rounds, sorted(found, key=lambda piece: -len(lengths[piece]) * int(lengths[piece.start]))


class MicroBatches(Dataset):
    """A data set indexed by `MicroBatch`. Gives `{"inputs": collated items, "weight": 0.0 for a dummy, else 1.0}`."""

    def __init__(self, data: Dataset, collate):
        self.data, self.collate = data, collate

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, micro_batch: MicroBatch) -> dict[str, Any]:
        inputs = self.collate([self.data[row] for row in micro_batch.rows])
        return {"inputs": inputs, "weight": 0.0 if micro_batch.is_dummy else 1.0}


def collate_update(micro_batches: list[dict[str, Any]]) -> dict[str, list]:
    """One update of one rank, as `Trainer` hands it to its training step."""
    return {"micro_batches": micro_batches}


def cut_evaluation(lengths: Sequence[int], budget: int, most: int) -> list[tuple[int, ...]]:
    """Rows in their order, in batches of at most `most` whose padded length is within `budget`.

    An utterance that is longer than the budget stands alone.
    """
    batches, longest = [], 0
    for row, length in enumerate(lengths):
        longest = max(longest, length)
        if not batches or len(batches[-1]) == most or (len(batches[-1]) + 1) * longest > budget:
            batches.append([])
            longest = length
        batches[-1].append(row)
    return [tuple(batch) for batch in batches]
