"""Epoch order, effective batches, and their cut into micro-batches. State = (epoch, position), nothing else.

1. *Order.* An `Order` says which utterance is heard at a position of an epoch. `EpochOrder` is a keyed bijection on
   0…n−1 (a Feistel network with cycle walking): no table in memory.
2. *Draw.* An effective batch is the next utterances in that order until they hold at least `batch_samples` after
   cropping. Seed, lengths and sizes decide it, not devices, workers or micro-batches. It may span two epochs.
3. *Crop.* Its length follows from the utterance's; its start is a pure function of seed, passage and utterance.
4. *Cut.* The crops are packed into pieces, one a micro-batch, that hold about as many slots, within budget. A slot is
   320 samples, and a crop begins on one. A round is a piece on every rank; dummies without weight fill up the last one
   (`cutting.py`).

Shapes: n positions of an epoch, N utterances of a batch; lengths and offsets are samples at 16 kHz.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from w2v2.data.cutting import cut, deal
from w2v2.data.hashing import CROP, ORDER, below, derive, derive_many, positive
from w2v2.errors import UserError

LATENT_STRIDE = 320  # samples between latent frames of the wav2vec 2.0 convs
FEISTEL_ROUNDS = 6
SLOT_STEP = 64  # the size of a run's micro-batches is a multiple of it
SAMPLED_UPDATES = 32
CHUNK = 1 << 16  # utterances looked at together: temporaries stay small, and in the processor's cache

Hash = Callable[[np.ndarray], np.ndarray]


class Cursor(NamedTuple):
    """Where in the data a run stands: all that has to be saved of it."""

    epoch: int = 0
    position: int = 0


class Crops(NamedTuple):
    """Utterances, and the part of each that is heard: four int64 arrays of shape (N,)."""

    utterance: np.ndarray
    passage: np.ndarray  # how often the utterance was heard before: another passage, another crop and mask
    start: np.ndarray
    num_samples: np.ndarray

    def take(self, rows) -> "Crops":
        return Crops(*(column[rows] for column in self))


class MicroBatchPlan(NamedTuple):
    """One micro-batch of one rank, before any audio is read."""

    crops: Crops
    update: int  # the update that it belongs to, counted from 0
    piece: int  # its number among the effective batch's pieces, over all ranks; seeds dropout and Gumbel noise
    num_rounds: int  # micro-batches of this rank in this update
    batch_samples: int  # samples of the whole effective batch, over all ranks
    dummy: bool  # it has no weight, and evens out the number of micro-batches over the ranks
    following: Cursor  # where the data stands after this update


class Order(Protocol):
    """Which utterance is heard at a position of an epoch: a pure function, so a place in it is (epoch, position)."""

    n: int  # positions of an epoch
    identity: dict[str, Any]  # what it depends on besides seed and utterances, for JSON; a resumed run has to agree

    def __call__(self, epoch: int, positions: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Utterances at `positions` (int64, each in 0…n−1), and their passages; int64. No such pair comes twice."""
        ...


class EpochOrder:
    """A pseudo-random permutation of 0…n−1 for each epoch, evaluated pointwise. The passage is the epoch."""

    identity: dict[str, Any] = {}

    def __init__(self, n: int, seed: int):
        self.n, self.seed = n, seed
        self.half_bits = find_half_bits(n)

    def __call__(self, epoch: int, positions: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        keys = derive(self.seed, ORDER, epoch, torch.arange(FEISTEL_ROUNDS)).tolist()
        hashes = [derive_many(key) for key in keys]  # one round function a key
        x = permute(positions.numpy(), self.half_bits, hashes)
        # Cycle walking: up to three quarters of the domain lie outside 0…n−1 and are permuted again.
        while len(outside := np.flatnonzero(x >= self.n)):
            x[outside] = permute(x[outside], self.half_bits, hashes)
        return x, np.full_like(x, epoch)


def find_half_bits(n: int) -> int:
    """Bits of each half of a Feistel network over at least 0…n−1."""
    return max(1, math.ceil(math.log2(max(n, 2)) / 2))


def permute(x: np.ndarray, half_bits: int | np.ndarray, hashes: list[Hash]) -> np.ndarray:
    """Feistel network on 2 · `half_bits` bits: each round swaps the halves and adds a hash of one to the other."""
    low = (1 << half_bits) - 1
    left, right = x >> half_bits, x & low
    for hashed in hashes:
        left, right = right, left ^ (positive(hashed(right)) & low)
    return (left << half_bits) | right


def crop_length(num_samples: np.ndarray, crop_samples: int, grid_samples: int) -> np.ndarray:
    """Longest crop of 320 + k · grid samples (latent frames: 16 · k at 0.32 s). A shorter utterance keeps its length."""
    longest = np.minimum(num_samples, crop_samples)
    if grid_samples <= 0:
        return longest
    on_grid = longest - (longest - LATENT_STRIDE) % grid_samples
    return np.where(on_grid > LATENT_STRIDE, on_grid, longest)


class EffectiveBatches:
    """Draws effective batches of at least `batch_samples` from utterances of known lengths, kept as int32.

    `order` defaults to every utterance once an epoch. Raises UserError where one utterance alone holds more than an
    effective batch.
    """

    def __init__(self, num_samples: np.ndarray, *, batch_samples: int, crop_samples: int, grid_samples: int, seed: int,
                 order: Order | None = None):  # fmt: skip
        self.num_samples = np.asarray(num_samples, dtype=np.int32)
        self.batch_samples, self.seed = batch_samples, seed
        self.crop_samples = min(crop_samples, np.iinfo(np.int32).max)  # no utterance is longer
        self.grid_samples = grid_samples
        self.order = order or EpochOrder(len(self.num_samples), seed)
        self.longest = int(crop_length(self.num_samples.max(keepdims=True), self.crop_samples, grid_samples)[0])
        if batch_samples < self.longest:
            raise UserError(
                f"--batch_hours {batch_samples / 16_000 / 3600:g} is smaller than one utterance "
                f"({self.longest / 16_000:.1f} s after cropping): raise it (the method needs hours, 1.6 for BASE)"
            )

    @property
    def heard_samples(self) -> int:
        """Samples of all utterances, each heard once."""
        parts = (self.num_samples[i : i + CHUNK] for i in range(0, len(self.num_samples), CHUNK))
        return sum(int(crop_length(part, self.crop_samples, self.grid_samples).sum(dtype=np.int64)) for part in parts)

    def check_budget(self, micro_batch_samples: int) -> None:
        """Raises UserError where a micro-batch cannot hold the longest crop."""
        if micro_batch_samples < self.longest:
            raise UserError(
                f"--micro_batch_seconds {micro_batch_samples / 16_000:g} is less than the longest crop "
                f"({self.longest / 16_000:.2f} s): raise it or lower --crop_seconds"
            )

    def crops(self, utterance: np.ndarray, passage: np.ndarray | int) -> Crops:
        """The crops of these utterances, (N,) int64, at these passages, (N,) or one for all."""
        passage = np.full_like(utterance, passage)
        length = self.num_samples[utterance].astype(np.int64)
        cropped = crop_length(length, self.crop_samples, self.grid_samples)
        keys = derive(self.seed, CROP, torch.from_numpy(passage), torch.from_numpy(utterance))  # (N,)
        start = below(keys, torch.from_numpy(length - cropped + 1)).numpy()
        return Crops(utterance, passage, start, cropped)

    def draw(self, cursor: Cursor) -> tuple[Crops, Cursor]:
        """The effective batch that begins at `cursor`, and where the next one begins."""
        n, epoch, position = self.order.n, *cursor
        drawn, missing = [], self.batch_samples
        while missing > 0:
            # 1. A generous guess of the utterances that are missing, up to the epoch's end.
            stop = min(n, position + max(16, 2 * math.ceil(missing / self.longest)))
            chunk = self.crops(*self.order(epoch, torch.arange(position, stop)))
            # 2. Those of them that fill the batch.
            heard = np.cumsum(chunk.num_samples)
            count = min(int(np.searchsorted(heard, missing)) + 1, len(heard))
            drawn.append(chunk.take(slice(count)))
            missing -= int(heard[count - 1])
            position += count
            if position == n:
                epoch, position = epoch + 1, 0
        return Crops(*(np.concatenate(columns) for columns in zip(*drawn, strict=True))), Cursor(epoch, position)


def count_slots(num_samples: Any) -> Any:
    """Slots of 320 samples that a crop of `num_samples` takes; an integer or an array."""
    return -(-num_samples // LATENT_STRIDE)


def plan_update(
    crops: Crops, update: int, following: Cursor, *, rank: int, num_ranks: int, micro_batch_samples: int
) -> list[MicroBatchPlan]:
    """This rank's micro-batches of one effective batch: fuller ones first, and the last may be a dummy.

    In each, the crops are longest first.
    """
    # Longest first; utterances of the same length in rising order.
    crops = crops.take(np.lexsort((crops.utterance, -crops.num_samples)))
    rounds, pieces = cut(count_slots(crops.num_samples), num_ranks, count_slots(micro_batch_samples))
    total, num_real = int(crops.num_samples.sum()), len(pieces)
    pieces += [slice(-1, None)] * (rounds * num_ranks - num_real)  # dummies, of the shortest row
    return [
        MicroBatchPlan(crops.take(pieces[piece]), update, piece, rounds, total, piece >= num_real, following)
        for piece in deal(rounds, num_ranks, rank)
    ]


class PieceSize(NamedTuple):
    """What a micro-batch holds at most."""

    slots: int
    rows: int


def find_size(batches: EffectiveBatches, num_ranks: int, micro_batch_samples: int) -> PieceSize:
    """The one size that the micro-batches of a run fit into, so that all of them can have the same shapes.

    It holds for `SAMPLED_UPDATES` updates from all over an epoch: the slots of their fullest piece, up to the next
    multiple of `SLOT_STEP`, and the most rows with a margin as wide as they vary. A larger piece is rare, not excluded.
    """
    slots, rows = [], []
    for number in range(SAMPLED_UPDATES):
        crops, _ = batches.draw(Cursor(0, number * batches.order.n // SAMPLED_UPDATES))
        sizes = np.sort(count_slots(crops.num_samples))[::-1]
        _, pieces = cut(sizes, num_ranks, count_slots(micro_batch_samples))
        slots.append(int(sizes[pieces[0]].sum()))
        rows.append(max(map(len, pieces)))
    return PieceSize(-(-max(slots) // SLOT_STEP) * SLOT_STEP, 2 * max(rows) - min(rows))


class PlanStream:
    """The micro-batch plans of one rank, update after update: the `sampler` of the training `DataLoader`."""

    def __init__(self, batches: EffectiveBatches, cursor: Cursor, updates: range, **cut_arguments):
        self.batches, self.cursor, self.updates, self.cut_arguments = batches, cursor, updates, cut_arguments

    def __iter__(self) -> Iterator[MicroBatchPlan]:
        cursor = self.cursor
        for update in self.updates:
            crops, cursor = self.batches.draw(cursor)
            yield from plan_update(crops, update, cursor, **self.cut_arguments)


def plan_validation(
    batches: EffectiveBatches, *, rank: int, num_ranks: int, micro_batch_samples: int
) -> list[MicroBatchPlan]:
    """This rank's micro-batches of a whole validation set, with the same crops every time."""
    batches.check_budget(micro_batch_samples)
    crops = batches.crops(np.arange(len(batches.num_samples)), passage=0)
    return plan_update(crops, 0, Cursor(), rank=rank, num_ranks=num_ranks, micro_batch_samples=micro_batch_samples)
