"""Crops → one `PretrainBatch`: decode, normalise, pad, mask. Runs in the `DataLoader`'s workers.

Shapes: B utterances, S samples of the longest, T latent frames of the longest.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from w2v2.audio import AudioError, read_crop
from w2v2.batching import MicroBatchPlan
from w2v2.hashing import derive
from w2v2.masking import latent_lengths, mask_spans


@dataclass
class PretrainBatch:
    """One micro-batch, ready for the model."""

    waveforms: torch.Tensor  # (B, S) float32, zeros past a row's end
    num_samples: torch.Tensor  # (B,) int64
    frames: torch.Tensor  # (B,) int64 latent frames
    keys: torch.Tensor  # (B,) int64, one an utterance and epoch: distractors and layerdrop follow from it
    mask: torch.Tensor  # (B, T) bool, masked latent frames
    uniform: bool  # every row has the same length: no padding, no attention mask
    weight: float  # 0.0 for a dummy
    plan: MicroBatchPlan
    heard_samples: int  # samples of the rows, without padding
    original_samples: int  # samples of the utterances before cropping
    skipped: list[dict[str, Any]]  # utterances that could not be read, with the reason

    def to(self, device: torch.device) -> "PretrainBatch":
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v.to(device, non_blocking=True) for k, v in moved.items() if torch.is_tensor(v)})

    def pin_memory(self) -> "PretrainBatch":
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v.pin_memory() for k, v in moved.items() if torch.is_tensor(v)})


@dataclass
class Framing:
    """How waveforms become masked latent frames: the part of the model's configuration that the data needs."""

    kernels: tuple[int, ...]
    strides: tuple[int, ...]
    mask_prob: float
    mask_length: int
    min_masks: int
    sampling_rate: int
    normalize: bool  # zero mean and unit variance a crop, as `Wav2Vec2FeatureExtractor(do_normalize=True)`

    @property
    def min_samples(self) -> int:
        """Fewest samples of an utterance that has a masked span and another frame beside it."""
        samples = self.mask_length + 1
        for kernel, stride in zip(reversed(self.kernels), reversed(self.strides), strict=True):
            samples = (samples - 1) * stride + kernel
        return samples


class CropDataset(Dataset):
    """Maps a `MicroBatchPlan` to its `PretrainBatch`. `table` has the columns of `load_manifest`."""

    def __init__(self, table, framing: Framing, seed: int):
        self.table, self.framing, self.seed = table, framing, seed

    def __getitem__(self, plan: MicroBatchPlan) -> PretrainBatch:
        if plan.dummy:
            return self._batch(plan, [np.zeros(int(plan.crops.num_samples[0]), np.float32)], [0], weight=0.0)
        waveforms, rows, skipped, original_samples = [], [], [], 0
        for row, (utterance, _, start, num_samples) in enumerate(zip(*plan.crops, strict=True)):
            entry = self.table[int(utterance)]
            try:
                offset = round(entry["start"] * self.framing.sampling_rate) + int(start)
                waveforms.append(read_crop(entry["audio"], offset, int(num_samples)))
                rows.append(row)
                original_samples += entry["num_samples"]
            except AudioError as error:
                skipped.append({"id": entry["id"], "audio": entry["audio"], "reason": error.reason})
        if not rows:
            dummy = self._batch(plan, [np.zeros(int(plan.crops.num_samples[-1]), np.float32)], [-1], weight=0.0)
            return replace(dummy, skipped=skipped)
        batch = self._batch(plan, waveforms, rows, weight=1.0)
        return replace(batch, skipped=skipped, original_samples=original_samples)

    def _batch(self, plan: MicroBatchPlan, waveforms: list, rows: list[int], weight: float) -> PretrainBatch:
        framing, crops = self.framing, plan.crops.take(rows)
        num_samples = torch.from_numpy(crops.num_samples)
        frames = latent_lengths(num_samples, framing.kernels, framing.strides)
        keys = derive(self.seed, torch.from_numpy(crops.epoch), torch.from_numpy(crops.utterance))
        padded = torch.zeros(len(waveforms), int(num_samples.max()))
        for target, waveform in zip(padded, waveforms, strict=True):
            target[: len(waveform)] = torch.from_numpy(_normalized(waveform) if framing.normalize else waveform)
        return PretrainBatch(
            waveforms=padded,
            num_samples=num_samples,
            frames=frames,
            keys=keys,
            mask=mask_spans(keys, frames, framing.mask_prob, framing.mask_length, framing.min_masks),
            uniform=bool((num_samples == num_samples[0]).all()),
            weight=weight,
            plan=plan,
            heard_samples=int(crops.num_samples.sum()),
            original_samples=0,
            skipped=[],
        )


def _normalized(waveform: np.ndarray) -> np.ndarray:
    return (waveform - waveform.mean()) / np.sqrt(waveform.var() + 1e-7)


def build_loader(dataset: CropDataset, plans, num_workers: int, prefetch_factor: int, pin_memory: bool) -> DataLoader:
    """Decodes the micro-batches of `plans` (any iterable of them) ahead of time and in order."""
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=plans,
        num_workers=num_workers,
        prefetch_factor=prefetch_factor if num_workers > 0 else None,
        pin_memory=pin_memory,
    )
