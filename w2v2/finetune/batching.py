"""Which utterances go through the model together: by number in groups of like length, or by seconds.

By seconds: an epoch of utterances → updates of about equal seconds → this rank's micro-batches.

1. *Order.* The epoch's order is a pure function of (seed, epoch): `batching.EpochOrder`.
2. *Share.* That order is cut where whole numbers of effective batches are reached, into as many updates as fit the
   epoch best. Every utterance is heard once an epoch, no update is a small remainder, and every epoch has as many
   updates, as `Trainer` needs to resume. Devices and micro-batches play no part. A set that is smaller than an
   effective batch is one update.
3. *Cut.* Sorted by length, longest first, into micro-batches within the padded budget, and dealt so that every rank
   has as many (`cutting.py`); dummies without weight fill up.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler
from transformers import TrainerCallback, set_seed

from w2v2.data.batching import EpochOrder
from w2v2.data.cutting import cut, deal, padded_sizes


class LengthSampler(Sampler[int]):
    """Batches of like length in random order, a pure function of (seed, epoch): a resumed run goes on with its batches.

    A random permutation is cut into windows of many batches. Each window is sorted by length and cut into batches, and
    these are shuffled; a last batch that is not full stays last. `Trainer`'s own groups run from long to short: the
    demo learns more slowly from them.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, batches_per_window: int = 50):
        self.lengths, self.batch_size, self.seed = lengths, batch_size, seed
        self.window = batch_size * batches_per_window
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed((self.seed << 20) + self.epoch)
        order = torch.randperm(len(self), generator=generator).tolist()
        windows = [order[i : i + self.window] for i in range(0, len(order), self.window)]
        order = [row for window in windows for row in sorted(window, key=self.lengths.__getitem__)]
        num_full = len(order) // self.batch_size
        for batch in torch.randperm(num_full, generator=generator).tolist():
            yield from order[batch * self.batch_size : (batch + 1) * self.batch_size]
        yield from order[num_full * self.batch_size :]


class MicroBatch(NamedTuple):
    """Rows of a data set that go through the model together."""

    rows: tuple[int, ...]
    is_dummy: bool  # carries no weight: makes the number of micro-batches the same on every rank


class UpdateSampler(Sampler[list[MicroBatch]]):
    """This rank's micro-batches, one list an update: the `batch_sampler` of a `DataLoader` over `MicroBatches`.

    `epoch` says which epoch is drawn next. Lengths and budgets are in samples; a single utterance longer than
    `micro_batch_samples` is a micro-batch of its own.
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
        for rows in self.updates(self.epoch):
            yield self.micro_batches(rows)

    def updates(self, epoch: int) -> list[np.ndarray]:
        """Rows of each effective batch of an epoch, int64."""
        order = self.order(epoch, torch.arange(len(self.lengths))).numpy()
        heard = np.cumsum(self.lengths[order])
        middles = heard - self.lengths[order] / 2
        update = np.minimum((middles * self.num_updates / heard[-1]).astype(np.int64), self.num_updates - 1)
        if len(np.unique(update)) < self.num_updates:  # an utterance longer than a share: by number instead
            return np.array_split(order, self.num_updates)
        return np.split(order, np.searchsorted(update, np.arange(1, self.num_updates)))

    def micro_batches(self, rows: np.ndarray) -> list[MicroBatch]:
        """This rank's part of an effective batch: as many micro-batches as every other rank has."""
        rows = rows[np.lexsort((rows, -self.lengths[rows]))]
        lengths = self.lengths[rows]
        rounds, pieces = cut(lengths, self.num_ranks, self.micro_batch_samples)
        sizes = padded_sizes(lengths, pieces, rounds * self.num_ranks)
        dealt = []
        for piece in deal(sizes, self.num_ranks)[self.rank].tolist():
            is_dummy = piece >= len(pieces)
            chosen = rows[-1:] if is_dummy else rows[pieces[piece]]
            dealt.append(MicroBatch(tuple(chosen.tolist()), is_dummy))
        return dealt


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


class DrawEpoch(TrainerCallback):
    """Tells the sampler and the data set which epoch is drawn, before the workers start. Ranks draw masks of their own.

    accelerate's loaders sometimes do not tell the sampler.
    """

    def __init__(self, *drawn: Sampler | Dataset):
        self.drawn = drawn

    def on_train_begin(self, args, state, control, **kwargs):
        if args.process_index > 0:
            set_seed(args.seed + args.process_index)

    def on_epoch_begin(self, args, state, control, **kwargs):
        for one in self.drawn:
            one.epoch = int(state.epoch or 0)
