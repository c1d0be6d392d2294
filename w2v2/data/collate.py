"""Crops → one `PretrainBatch`: decode, pad, mask. It runs in the `DataLoader`'s workers, except `sound`, on the device.

Shapes: B utterances, S samples of the longest, T latent frames of the longest, N latent frames of all utterances
together, M masked frames of the row that has most.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from w2v2.data.audio import AudioError, read_pcm
from w2v2.data.batching import Crops, MicroBatchPlan
from w2v2.data.hashing import derive
from w2v2.data.masking import kept_rows, latent_lengths, least_samples, mask_spans, masked_positions

FULL_SCALE = 32_768  # of 16-bit samples


@dataclass
class PretrainBatch:
    """One micro-batch, ready for the model. All shapes are known on the host, so no device has to be asked."""

    waveforms: torch.Tensor  # (B, S) int16 where all files hold 16 bits, else float32; zeros past a row's end
    num_samples: torch.Tensor  # (B,) int64
    frames: torch.Tensor  # (B,) int64 latent frames
    keys: torch.Tensor  # (B,) int64, one an utterance and epoch; the distractors follow from it
    mask: torch.Tensor  # (B, T) bool, masked latent frames
    positions: torch.Tensor  # (B, M) int64, the masked frames, compacted
    num_masked: torch.Tensor  # (B,) int64, how many of the M slots hold a masked frame
    inside: torch.Tensor  # (N,) int64, the frames that are no padding, as row · T + frame
    kept: torch.Tensor  # (layers, B) int64, the rows that a layer is computed for, in rising order; then the others
    # (layers + 1, B + 1) int32. A layer concatenates the frames of its kept rows (of the first row, where none is
    # kept): where each row begins, and the end. The last line is for all rows.
    bounds: torch.Tensor
    lengths: tuple[int, ...]  # `frames` on the host
    kept_rows: tuple[tuple[int, ...], ...]  # `kept` on the host, without the others
    normalize: bool  # give each row zero mean and unit variance, as `Wav2Vec2FeatureExtractor(do_normalize=True)`
    weight: float  # 0.0 for a dummy
    plan: MicroBatchPlan
    heard_samples: int  # samples of the rows, without padding
    original_samples: int  # samples of the utterances before cropping
    skipped: list[dict[str, Any]]  # utterances that could not be read, with the reason

    @property
    def uniform(self) -> bool:
        """Every row has the same length: there is no padding."""
        return len(set(self.lengths)) == 1

    def to(self, device: torch.device) -> "PretrainBatch":
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v.to(device, non_blocking=True) for k, v in moved.items() if torch.is_tensor(v)})

    def pin_memory(self) -> "PretrainBatch":
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v.pin_memory() for k, v in moved.items() if torch.is_tensor(v)})


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
        for row, entry in enumerate(self.entries(plan)):
            start, num_samples = int(plan.crops.start[row]), int(plan.crops.num_samples[row])
            try:
                waveforms.append(self.read(entry, start, num_samples))
                rows.append(row)
                original_samples += entry["num_samples"]
            except AudioError as error:
                skipped.append({"id": entry["id"], "audio": entry["audio"], "reason": error.reason})
        if not rows:
            return replace(self._silence(plan, row=-1), skipped=skipped)
        batch = build_batch(plan, plan.crops.take(rows), waveforms, self.framing, self.seed)
        return replace(batch, skipped=skipped, original_samples=original_samples)

    def entries(self, plan: MicroBatchPlan) -> list[dict[str, Any]]:
        """The table's rows of a micro-batch, in its order, from one look into the table."""
        columns = self.table[plan.crops.utterance]
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def read(self, entry: dict[str, Any], start: int, num_samples: int) -> np.ndarray:
        """Samples of one crop, int16 or float32. Raises AudioError."""
        first = round(entry["start"] * self.framing.sampling_rate)
        return read_pcm(entry["audio"], first + start, num_samples, stop=first + entry["num_samples"])

    def _silence(self, plan: MicroBatchPlan, row: int) -> PretrainBatch:
        """One row of the plan, as silence without weight."""
        silence = [np.zeros(int(plan.crops.num_samples[row]), np.int16)]
        return build_batch(plan, plan.crops.take([row]), silence, self.framing, self.seed, weight=0.0)


def build_batch(
    plan: MicroBatchPlan, crops: Crops, waveforms: list, framing: Framing, seed: int, weight: float = 1.0
) -> PretrainBatch:
    """The micro-batch of these crops. `waveforms` holds their samples, one int16 or float32 array a row."""
    # 1. Lengths and keys: (B,).
    num_samples = torch.from_numpy(crops.num_samples)
    frames = latent_lengths(num_samples, framing.kernels, framing.strides)
    lengths = frames.tolist()
    keys = derive(seed, torch.from_numpy(crops.epoch), torch.from_numpy(crops.utterance))
    # 2. Masked frames (B, T), compacted (B, M); rows that each layer is computed for (layers, B).
    mask = mask_spans(keys, frames, framing.mask_prob, framing.mask_length, framing.min_masks)
    positions, num_masked = masked_positions(mask)
    kept = kept_rows(keys, framing.num_layers, framing.layerdrop)
    rows = [torch.nonzero(flags)[:, 0].tolist() for flags in kept]
    heard = int(crops.num_samples.sum())
    return PretrainBatch(
        waveforms=pad(waveforms),
        num_samples=num_samples,
        frames=frames,
        keys=keys,
        mask=mask,
        positions=positions,
        num_masked=num_masked,
        inside=torch.nonzero((torch.arange(mask.shape[1]) < frames[:, None]).flatten())[:, 0],
        kept=kept.to(torch.uint8).argsort(dim=1, descending=True, stable=True),
        bounds=_bounds(lengths, [*(own or [0] for own in rows), range(len(lengths))]),
        lengths=tuple(lengths),
        kept_rows=tuple(map(tuple, rows)),
        normalize=framing.normalize,
        weight=weight,
        plan=plan,
        heard_samples=heard,
        original_samples=heard if weight else 0,
        skipped=[],
    )


def _bounds(lengths: list[int], rows: list[Sequence[int]]) -> torch.Tensor:
    """For each list of rows: where each row begins in their concatenation, and the end. (len(rows), B + 1) int32."""
    bounds = np.zeros((len(rows), len(lengths) + 1), np.int32)
    for line, own in zip(bounds, rows, strict=True):
        np.cumsum([lengths[row] for row in own], out=line[1 : len(own) + 1])
    return torch.from_numpy(bounds)


def pad(waveforms: list[np.ndarray]) -> torch.Tensor:
    """Rows of different lengths → (B, S), zeros at their ends; int16 if all rows are, else floats of full scale 1."""
    if any(w.dtype != np.int16 for w in waveforms):
        waveforms = [w / np.float32(FULL_SCALE) if w.dtype == np.int16 else w for w in waveforms]
    padded = np.zeros((len(waveforms), max(map(len, waveforms))), np.result_type(*waveforms))
    for row, waveform in zip(padded, waveforms, strict=True):
        row[: len(waveform)] = waveform
    return torch.from_numpy(padded)


def sound(batch: PretrainBatch) -> torch.Tensor:
    """Waveforms as the model hears them: (B, S) floats on the batch's device, full scale 1, normalised if asked for."""
    x = batch.waveforms.float() / FULL_SCALE if batch.waveforms.dtype == torch.int16 else batch.waveforms
    if not batch.normalize:
        return x
    # Mean and variance of each row, without its padding: (B, 1).
    inside = torch.arange(x.shape[1], device=x.device) < batch.num_samples[:, None]  # (B, S)
    mean = x.sum(1, keepdim=True) / batch.num_samples[:, None]
    centred = torch.where(inside, x - mean, 0.0)
    variance = centred.pow(2).sum(1, keepdim=True) / batch.num_samples[:, None]
    return centred * torch.rsqrt(variance + 1e-7)
