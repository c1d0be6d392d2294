"""Crops → one `PretrainBatch`: decode, lay side by side, mask, in the `DataLoader`'s workers; `sound` runs on the device.

There is no padding. Each utterance begins on a slot of its own, as many samples as one latent frame advances (320), and
is followed by at least one slot whose frame would look into the next utterance: the gap, which nobody hears.

Shapes: B utterances, N slots, T latent frames of the longest, P masked frames of all utterances, M of the one that has
most in its group.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from w2v2.audio.crops import AudioError, read_pcm
from w2v2.data.batching import Crops, MicroBatchPlan
from w2v2.data.hashing import derive
from w2v2.data.masking import group_alike, inside_rows, kept_rows, latent_lengths, least_samples, mask_spans
from w2v2.data.rows import Rows

FULL_SCALE = 32_768  # of 16-bit samples


@dataclass
class PretrainBatch:
    """One micro-batch, ready for the model. All shapes are known on the host, so no device has to be asked."""

    samples: torch.Tensor  # (N · 320,) int16 where all files hold 16 bits, else float32; zeros in the gaps
    row: torch.Tensor  # (N,) int64, the utterance of each slot; a gap belongs to the utterance before it
    first: torch.Tensor  # (B,) int64, the slot where each utterance begins
    num_samples: torch.Tensor  # (B,) int64
    frames: torch.Tensor  # (B,) int64 latent frames
    keys: torch.Tensor  # (B,) int64, one an utterance and passage; the distractors follow from it
    mask: torch.Tensor  # (N,) bool, masked latent frames
    masked: torch.Tensor  # (P,) int64, the slots of the masked frames, in rising order
    num_masked: torch.Tensor  # (B,) int64, masked frames of each utterance
    kept: torch.Tensor  # (layers, B) bool, whether layerdrop leaves a layer to the utterance
    rows: Rows  # where the utterances lie among the slots
    masked_rows: Rows  # where those of each utterance lie in `masked`, without gaps
    is_filled: bool  # up to sizes that all micro-batches of a run have
    groups: tuple[tuple[slice, int], ...]  # utterances with about as many masked frames, and M of each group
    normalize: bool  # give each row zero mean and unit variance, as `Wav2Vec2FeatureExtractor(do_normalize=True)`
    weight: float  # 0.0 for a dummy
    plan: MicroBatchPlan
    heard_samples: int  # samples of the utterances
    original_samples: int  # samples of the utterances before cropping
    skipped: list[dict[str, Any]]  # utterances that could not be read, with the reason

    @property
    def inside(self) -> torch.Tensor:
        """(N,) bool: the slots that are a latent frame of their utterance, and no gap."""
        return torch.arange(len(self.row), device=self.row.device) - self.first[self.row] < self.frames[self.row]

    @property
    def is_masked(self) -> torch.Tensor:
        """(P,) bool: the places of `masked` that hold a masked frame."""
        return torch.arange(len(self.masked), device=self.masked.device) < self.num_masked.sum()

    def masked_groups(self) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """Consecutive utterances with about as many masked frames: which; the places in `masked` of each one's masked
        frames, (b, M) int64; and which of them hold one, (b, M) bool.
        """
        begin = self.num_masked.cumsum(0) - self.num_masked  # (B,)
        for rows, most in self.groups:
            valid = inside_rows(self.num_masked[rows], most)
            place = begin[rows, None] + torch.arange(most, device=valid.device)
            yield rows, torch.where(valid, place, 0), valid

    def to(self, device: torch.device) -> "PretrainBatch":
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "PretrainBatch":
        return self.map(torch.Tensor.pin_memory)

    def map(self, move: Callable[[torch.Tensor], torch.Tensor]) -> "PretrainBatch":
        """Each tensor in place of another."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {name: move(value) for name, value in values.items() if torch.is_tensor(value)}
        return replace(self, rows=self.rows.move(move), masked_rows=self.masked_rows.move(move), **moved)


@dataclass
class Framing:
    """How waveforms become masked latent frames: the data's share of the model's configuration."""

    kernels: tuple[int, ...]
    strides: tuple[int, ...]
    mask_prob: float
    mask_length: int
    min_masks: int
    num_layers: int
    layerdrop: float
    sampling_rate: int
    normalize: bool  # see `PretrainBatch`

    @property
    def slot(self) -> int:
        """Samples that a latent frame advances."""
        return math.prod(self.strides)

    @property
    def min_samples(self) -> int:
        """Fewest samples of an utterance that has a masked span and another frame beside it."""
        return least_samples(self.mask_length + 1, self.kernels, self.strides)


class CropDataset(Dataset):
    """Maps a `MicroBatchPlan` to its `PretrainBatch`. `table` has the columns of `load_manifest`."""

    def __init__(self, table, framing: Framing, seed: int):
        self.table, self.framing, self.seed = table, framing, seed

    def __getitem__(self, plan: MicroBatchPlan) -> PretrainBatch:
        if plan.dummy:
            return self._silence(plan, row=0)
        waveforms, rows, skipped, original_samples = [], [], [], 0
        columns = self.table[plan.crops.utterance]
        for row, values in enumerate(zip(*columns.values(), strict=True)):
            entry = dict(zip(columns, values, strict=True))
            try:
                waveforms.append(self.read(entry, int(plan.crops.start[row]), int(plan.crops.num_samples[row])))
                rows.append(row)
                original_samples += entry["num_samples"]
            except AudioError as error:
                skipped.append({"id": entry["id"], "audio": entry["audio"], "reason": error.reason})
        if not rows:
            return replace(self._silence(plan, row=-1), skipped=skipped)
        batch = build_batch(plan, plan.crops.take(rows), waveforms, self.framing, self.seed)
        return replace(batch, skipped=skipped, original_samples=original_samples)

    def read(self, entry: dict[str, Any], start: int, num_samples: int) -> np.ndarray:
        """Samples of one crop, int16 or float32. Raises AudioError."""
        first = round(entry["start"] * self.framing.sampling_rate)
        stop = first + entry["num_samples"]
        return read_pcm(entry["audio"], first + start, num_samples, stop, entry.get("channel"))

    def _silence(self, plan: MicroBatchPlan, row: int) -> PretrainBatch:
        """One row of the plan, as silence without weight."""
        silence = [np.zeros(int(plan.crops.num_samples[row]), np.int16)]
        return build_batch(plan, plan.crops.take([row]), silence, self.framing, self.seed, weight=0.0)


def build_batch(
    plan: MicroBatchPlan, crops: Crops, waveforms: list, framing: Framing, seed: int, weight: float = 1.0
) -> PretrainBatch:
    """The micro-batch of these crops. `waveforms` holds their samples, one int16 or float32 array a row."""
    # 1. Lengths, keys, and where the utterances lie: (B,), (N,).
    num_samples = torch.from_numpy(crops.num_samples)
    frames = latent_lengths(num_samples, framing.kernels, framing.strides)
    slots = torch.maximum(-(-num_samples // framing.slot), frames + 1)
    first = slots.cumsum(0) - slots
    keys = derive(seed, torch.from_numpy(crops.passage), torch.from_numpy(crops.utterance))
    # 2. Masked frames, and the utterances that each layer is computed for.
    mask = mask_spans(keys, frames, framing.mask_prob, framing.mask_length, framing.min_masks)  # (B, T)
    kept = kept_rows(keys, framing.num_layers, framing.layerdrop)
    heard = int(crops.num_samples.sum())
    return PretrainBatch(
        samples=lay_out(waveforms, (first * framing.slot).tolist(), int(slots.sum()) * framing.slot),
        row=torch.repeat_interleave(torch.arange(len(slots)), slots),
        first=first,
        num_samples=num_samples,
        frames=frames,
        keys=keys,
        **place_masks(mask, first, int(slots.sum())),
        kept=kept,
        rows=Rows.build(frames, slots - frames),
        is_filled=False,
        normalize=framing.normalize,
        weight=weight,
        plan=plan,
        heard_samples=heard,
        original_samples=heard if weight else 0,
        skipped=[],
    )


def place_masks(mask: torch.Tensor, first: torch.Tensor, num_slots: int) -> dict[str, Any]:
    """A `PretrainBatch`'s fields of masked frames, from those of each utterance, (B, T) bool."""
    masked = (first[:, None] + torch.arange(mask.shape[1]))[mask]  # (B, T) -> (P,)
    num_masked = mask.sum(1)
    return dict(
        mask=torch.zeros(num_slots, dtype=torch.bool).index_fill_(0, masked, True),
        masked=masked,
        num_masked=num_masked,
        masked_rows=Rows.build(num_masked, torch.zeros_like(num_masked)),
        groups=group_alike(num_masked.tolist()),
    )


def lay_out(waveforms: list[np.ndarray], starts: list[int], size: int) -> torch.Tensor:
    """Waveforms side by side, zeros between: (size,), int16 if all of them are, else floats of full scale 1."""
    if any(w.dtype != np.int16 for w in waveforms):
        waveforms = [w / np.float32(FULL_SCALE) if w.dtype == np.int16 else w for w in waveforms]
    samples = np.zeros(size, np.result_type(*waveforms))
    for waveform, start in zip(waveforms, starts, strict=True):
        samples[start : start + len(waveform)] = waveform
    return torch.from_numpy(samples)


def sound(batch: PretrainBatch) -> torch.Tensor:
    """Samples as the model hears them: (N · 320,) floats on the batch's device, full scale 1, normalised if asked for."""
    x = batch.samples.float() / FULL_SCALE if batch.samples.dtype == torch.int16 else batch.samples
    if not batch.normalize:
        return x
    # Mean and variance of each utterance's own samples: (N, slot) -> (B, 1) -> (N, 1).
    x, row, device = x.view(len(batch.row), -1), batch.row, x.device
    place = (torch.arange(len(row), device=device) - batch.first[row])[:, None] * x.shape[1]
    inside = place + torch.arange(x.shape[1], device=device) < batch.num_samples[row, None]

    def mean_of(values):
        sums = values.new_zeros(len(batch.first), 1).index_add_(0, row, values.sum(1, keepdim=True))
        return (sums / batch.num_samples[:, None])[row]

    centred = torch.where(inside, x - mean_of(x), 0.0)
    return (centred * torch.rsqrt(mean_of(centred.pow(2)) + 1e-7)).flatten()
