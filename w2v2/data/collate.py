"""Crops → one `PretrainBatch`: decode, lay side by side, mask, in the `DataLoader`'s workers.

There is no padding. Each utterance begins on a slot of its own, as many samples as one latent frame advances (320), and
is followed by at least one slot whose frame would look into the next utterance: the gap, which nobody hears.

Shapes: B utterances, N slots, T latent frames of the longest, P masked frames of all utterances, M of the one that has
most in its group.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from w2v2.audio.crops import SAMPLING_RATE, AudioError, read_pcm
from w2v2.data.batching import Crops, MicroBatchPlan
from w2v2.data.hashing import derive
from w2v2.data.masking import group_alike, inside_rows, kept_rows, latent_lengths, least_samples, mask_spans
from w2v2.data.rows import Rows

FULL_SCALE = 32_768  # of 16-bit samples


@dataclass
class PretrainBatch:
    """One micro-batch, ready for the model. All shapes are known on the host, so no device has to be asked."""

    samples: torch.Tensor  # (N · 320,) int16 where all files hold 16 bits, else float32; zeros in the gaps
    num_samples: torch.Tensor  # (B,) int64
    keys: torch.Tensor  # (B,) int64, one an utterance and passage; the distractors follow from it
    kept: torch.Tensor  # (layers, B) bool, whether layerdrop leaves a layer to the utterance
    rows: Rows  # where the utterances lie among the slots
    masked: torch.Tensor  # (P,) int64, the slots of the masked frames, in rising order
    masked_rows: Rows  # where those of each utterance lie in `masked`, without gaps
    groups: tuple[tuple[slice, int], ...]  # utterances with about as many masked frames, and M of each group
    weight: float  # 0.0 for a dummy
    plan: MicroBatchPlan
    heard_samples: int  # samples of the utterances
    original_samples: int = 0  # samples of the utterances before cropping
    skipped: list[dict[str, Any]] = field(default_factory=list)  # utterances that could not be read, with the reason
    is_filled: bool = False  # up to sizes that all micro-batches of a run have

    def masked_groups(self) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """Consecutive utterances with about as many masked frames: which; the places in `masked` of each one's masked
        frames, (b, M) int64; and which of them hold one, (b, M) bool.
        """
        for rows, most in self.groups:
            valid = inside_rows(self.masked_rows.frames[rows], most)
            place = self.masked_rows.first[rows, None] + torch.arange(most, device=valid.device)
            yield rows, torch.where(valid, place, 0), valid

    def to(self, device: torch.device) -> "PretrainBatch":
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "PretrainBatch":
        return self.map(torch.Tensor.pin_memory)

    def map(self, move: Callable[[torch.Tensor], torch.Tensor]) -> "PretrainBatch":
        """Each tensor in place of another."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {name: move(value) for name, value in values.items() if torch.is_tensor(value)}
        return replace(self, rows=self.rows.map(move), masked_rows=self.masked_rows.map(move), **moved)


@dataclass
class Framing:
    """How waveforms become masked latent frames."""

    config: Any  # the model's, a `Wav2Vec2Config`: its convs, masks and layerdrop
    normalize: bool  # see `lay_out`

    @property
    def slot(self) -> int:
        """Samples that a latent frame advances."""
        return math.prod(self.config.conv_stride)

    @property
    def min_samples(self) -> int:
        """Fewest samples of an utterance that has a masked span and another frame beside it."""
        return least_samples(self.config.mask_time_length + 1, self.config.conv_kernel, self.config.conv_stride)


class CropDataset(Dataset):
    """Maps a `MicroBatchPlan` to its `PretrainBatch`. `table` has the columns of `load_manifest`."""

    def __init__(self, table, framing: Framing, seed: int):
        self.table, self.framing, self.seed = table, framing, seed

    def __getitem__(self, plan: MicroBatchPlan) -> PretrainBatch:
        waveforms, rows, skipped, original_samples = [], [], [], 0
        columns = {} if plan.dummy else self.table[plan.crops.utterance]
        for row, values in enumerate(zip(*columns.values(), strict=True)):
            entry = dict(zip(columns, values, strict=True))
            try:
                waveforms.append(self.read(entry, int(plan.crops.start[row]), int(plan.crops.num_samples[row])))
                rows.append(row)
                original_samples += entry["num_samples"]
            except AudioError as error:
                skipped.append({"id": entry["id"], "audio": entry["audio"], "reason": error.reason})
        weight = float(bool(rows))
        if not rows:  # silence without weight
            waveforms, rows = [np.zeros(int(plan.crops.num_samples[-1]), np.int16)], [-1]
        batch = build_batch(plan, plan.crops.take(rows), waveforms, self.framing, self.seed, weight)
        return replace(batch, skipped=skipped, original_samples=original_samples)

    def read(self, entry: dict[str, Any], start: int, num_samples: int) -> np.ndarray:
        """Samples of one crop, int16 or float32. Raises AudioError."""
        first = round(entry["start"] * SAMPLING_RATE)
        stop = first + entry["num_samples"]
        return read_pcm(entry["audio"], first + start, num_samples, stop, entry.get("channel"))


def build_batch(
    plan: MicroBatchPlan, crops: Crops, waveforms: list, framing: Framing, seed: int, weight: float = 1.0
) -> PretrainBatch:
    """The micro-batch of these crops. `waveforms` holds their samples, one int16 or float32 array a row."""
    # 1. Lengths and keys, (B,), and where the utterances lie.
    config, num_samples = framing.config, torch.from_numpy(crops.num_samples)
    frames = latent_lengths(num_samples, config.conv_kernel, config.conv_stride)
    rows = Rows.build(frames, torch.maximum(-(-num_samples // framing.slot) - frames, torch.tensor(1)))
    keys = derive(seed, torch.from_numpy(crops.passage), torch.from_numpy(crops.utterance))
    starts = (rows.first * framing.slot).tolist()
    # 2. Masked frames, and the utterances that each layer is computed for.
    spans = config.mask_time_prob, config.mask_time_length, config.mask_time_min_masks
    mask = mask_spans(keys, frames, *spans)  # (B, T)
    return PretrainBatch(
        samples=lay_out(waveforms, starts, len(rows.row) * framing.slot, framing.normalize),
        num_samples=num_samples,
        keys=keys,
        kept=kept_rows(keys, config.num_hidden_layers, config.layerdrop),
        rows=rows,
        **place_masks(mask, rows),
        weight=weight,
        plan=plan,
        heard_samples=int(crops.num_samples.sum()),
    )


def place_masks(mask: torch.Tensor, rows: Rows) -> dict[str, Any]:
    """A `PretrainBatch`'s fields of masked frames, from those of each utterance, (B, T) bool."""
    num_masked = mask.sum(1)
    return dict(
        masked=(rows.first[:, None] + torch.arange(mask.shape[1]))[mask],  # (B, T) -> (P,)
        masked_rows=Rows.build(num_masked, torch.zeros_like(num_masked)),
        groups=group_alike(num_masked.tolist()),
    )


def lay_out(waveforms: list[np.ndarray], starts: list[int], size: int, normalize: bool = False) -> torch.Tensor:
    """Waveforms side by side, zeros between: (size,), int16 if all of them are, else floats of full scale 1.

    `normalize` gives each zero mean and unit variance, as `Wav2Vec2FeatureExtractor(do_normalize=True)`.
    """
    if normalize or any(w.dtype != np.int16 for w in waveforms):
        waveforms = [w / np.float32(FULL_SCALE) if w.dtype == np.int16 else w for w in waveforms]
    if normalize:
        waveforms = [(w - w.mean()) / np.sqrt(w.var() + 1e-7) for w in waveforms]
    samples = np.zeros(size, np.result_type(*waveforms))
    for waveform, start in zip(waveforms, starts, strict=True):
        samples[start : start + len(waveform)] = waveform
    return torch.from_numpy(samples)


def sound(samples: torch.Tensor) -> torch.Tensor:
    """Samples as the model hears them: floats of full scale 1, or normalised."""
    return samples.float() / FULL_SCALE if samples.dtype == torch.int16 else samples
