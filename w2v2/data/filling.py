"""Micro-batches of one shape: filled up with silence that nobody hears, so that a CUDA graph can take each of them.

A graph is captured once and replayed with other values in the same memory. So nothing of a micro-batch may be a number
on the host: `fill_up` makes every shape, and every number that the model reads on the host, one of `Sizes`.

Shapes: B utterances, N slots, P masked frames, M of the utterance that has most, R stretches that attention is within.
"""

import math
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from w2v2.data.batching import MicroBatchPlan, PieceSize
from w2v2.data.collate import PretrainBatch
from w2v2.data.masking import SLOTS
from w2v2.data.rows import Rows

MARGIN = 1.15  # six standard deviations of the masked frames of one utterance


class Sizes(NamedTuple):
    """What every micro-batch is filled up to."""

    slots: int  # N
    utterances: int  # B
    masked: int  # P
    most_masked: int  # M, a multiple of `SLOTS`
    longest: int  # slots of the longest stretch that attention is within

    def hold(self, batch: PretrainBatch) -> bool:
        """Whether the micro-batch fits; at least one slot is left over."""
        most = -(-batch.masked_rows.longest // SLOTS) * SLOTS
        found = len(batch.rows.row) + 1, len(batch.keys), len(batch.masked), most, batch.rows.longest
        stretches = math.ceil((self.slots - len(batch.rows.row)) / self.longest)  # of what is left over
        fits = all(own <= size for own, size in zip(found, self, strict=True))
        return fits and self.masked - len(batch.masked) <= stretches * self.most_asked

    @property
    def most_asked(self) -> int:
        """Masked frames of a stretch: of an utterance, or of those that are missing."""
        return max(self.most_masked, self.masked // 2)


def find_sizes(batches: list[PretrainBatch], size: PieceSize) -> Sizes:
    """Sizes that hold a run's micro-batches: `size` is their plan's, and their masks are like those of these `batches`.

    Masks vary: `MARGIN` leaves room for others. A micro-batch that is larger still goes without a graph.
    """
    masked = max(len(batch.masked) for batch in batches)
    most = max(batch.masked_rows.longest for batch in batches)
    longest = max(batch.rows.longest for batch in batches)
    round_up = [math.ceil(MARGIN * number / SLOTS) * SLOTS for number in (masked, most)]
    return Sizes(math.ceil((size.slots + 1) / SLOTS) * SLOTS, size.rows, *round_up, longest)


class FilledCrops(Dataset):
    """Maps a `MicroBatchPlan` to its `PretrainBatch`, filled up where `sizes` hold it."""

    def __init__(self, crops: Dataset, sizes: Sizes):
        self.crops, self.sizes = crops, sizes

    def __getitem__(self, plan: MicroBatchPlan) -> PretrainBatch:
        batch = self.crops[plan]
        return fill_up(batch, self.sizes) if self.sizes.hold(batch) else batch


def fill_up(batch: PretrainBatch, sizes: Sizes) -> PretrainBatch:
    """The micro-batch in the shapes of `sizes`; loss and gradient stay as they are. `sizes` has to hold it."""
    N, P, b = len(batch.rows.row), len(batch.masked), len(batch.keys)
    slot = len(batch.samples) // N
    slots, rows, masked = sizes.slots - N, sizes.utterances - b, sizes.masked - P  # what is missing

    def more(x: torch.Tensor, number: int, value: int) -> torch.Tensor:
        return F.pad(x, (0, number), value=value)

    def longer(own: Rows, number: int, ends: torch.Tensor, longest: int) -> Rows:
        return own._replace(
            row=more(own.row, number, b - 1),
            first=more(own.first, rows, len(own.row) + number),
            frames=more(own.frames, rows, 0),
            bounds=torch.cat([own.bounds, ends]).int(),
            gaps=(*own.gaps[:-1], own.gaps[-1] + number),
            longest=longest,
        )

    # What is left over attends to itself, in stretches no longer than others. Stretches of no slot stand in for
    # utterances that are missing. The last slot is nobody's: masked frames that are missing lie there,
    # and each stretch asks for about as many.
    stretches = torch.full((math.ceil(sizes.slots / sizes.longest),), sizes.longest)
    rest = (slots - (stretches.cumsum(0) - stretches)).clamp(min=0).minimum(stretches).flip(0)  # the last is not empty
    ends = torch.cat([torch.full((2 * rows,), N), N + rest.cumsum(0)])
    share = (rest > 0).cumsum(0)
    asked = torch.cat([torch.full((2 * rows,), P), P + masked * share // share[-1]])
    return replace(
        batch,
        samples=more(batch.samples, slots * slot, 0),
        num_samples=more(batch.num_samples, rows, slot),  # statistics of no samples would not be numbers
        keys=more(batch.keys, rows, 0),
        masked=more(batch.masked, masked, sizes.slots - 1),
        kept=more(batch.kept, rows, False),
        rows=longer(batch.rows, slots, ends, sizes.longest),
        masked_rows=longer(batch.masked_rows, masked, asked, sizes.most_asked),
        groups=((slice(0, sizes.utterances), sizes.most_masked),),
        is_filled=True,
    )
