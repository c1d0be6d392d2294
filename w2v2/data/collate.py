"""Crops → one `PretrainBatch`: decode, pad, mask, in the `DataLoader`'s workers; `sound` runs on the device.

Shapes: B utterances, S samples of the longest, T latent frames of the longest, N latent frames of all utterances
together, M masked frames of the row that has most.
"""

import os
import re
import signal
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from w2v2.audio.crops import AudioError, read_pcm
from w2v2.data.batching import Crops, MicroBatchPlan
from w2v2.data.hashing import derive
from w2v2.data.masking import kept_rows, latent_lengths, least_samples, mask_spans, masked_positions

FULL_SCALE = 32_768  # of 16-bit samples
TIMEOUT_SECONDS = 1_800  # without a micro-batch from a worker: hung storage, or a decoder that never ends


@dataclass
class PretrainBatch:
    """One micro-batch, ready for the model. All shapes are known on the host, so no device has to be asked."""

    waveforms: torch.Tensor  # (B, S) int16 where all files hold 16 bits, else float32; zeros past a row's end
    num_samples: torch.Tensor  # (B,) int64
    frames: torch.Tensor  # (B,) int64 latent frames
    keys: torch.Tensor  # (B,) int64, one an utterance and passage; the distractors follow from it
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
        return self._move(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "PretrainBatch":
        return self._move(torch.Tensor.pin_memory)

    def _move(self, move: Callable[[torch.Tensor], torch.Tensor]) -> "PretrainBatch":
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: move(value) for name, value in values.items() if torch.is_tensor(value)})


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
    # 1. Lengths and keys: (B,).
    num_samples = torch.from_numpy(crops.num_samples)
    frames = latent_lengths(num_samples, framing.kernels, framing.strides)
    lengths = frames.tolist()
    keys = derive(seed, torch.from_numpy(crops.passage), torch.from_numpy(crops.utterance))
    # 2. Masked frames (B, T), compacted (B, M); rows that each layer is computed for (layers, B).
    mask = mask_spans(keys, frames, framing.mask_prob, framing.mask_length, framing.min_masks)
    positions, num_masked = masked_positions(mask)
    kept = kept_rows(keys, framing.num_layers, framing.layerdrop)
    rows = [torch.nonzero(flags)[:, 0].tolist() for flags in kept]
    bounds = np.zeros((len(rows) + 1, len(lengths) + 1), np.int32)
    for line, own in zip(bounds, [*(own or [0] for own in rows), range(len(lengths))], strict=True):
        np.cumsum([lengths[row] for row in own], out=line[1 : len(own) + 1])
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
        bounds=torch.from_numpy(bounds),
        lengths=tuple(lengths),
        kept_rows=tuple(map(tuple, rows)),
        normalize=framing.normalize,
        weight=weight,
        plan=plan,
        heard_samples=heard,
        original_samples=heard if weight else 0,
        skipped=[],
    )


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


def build_loader(
    dataset: Dataset, plans: Iterable[MicroBatchPlan], num_workers: int, prefetch_factor: int, pin_memory: bool
) -> DataLoader:
    """A loader that decodes the micro-batches of `plans` ahead of time, in their order."""
    options = {"num_workers": num_workers, "pin_memory": pin_memory}
    if num_workers:
        options |= {"prefetch_factor": prefetch_factor, "persistent_workers": True}
        options |= {"worker_init_fn": shield_worker, "timeout": TIMEOUT_SECONDS}
    return DataLoader(dataset, batch_size=None, sampler=plans, **options)


def shield_worker(worker: int) -> None:
    """Keep a worker alive when a scheduler or a terminal signals every process of the run: the last update needs it.

    A SIGTERM from its own parent ends it, which is the loader's last resort. It also ends when its parent is gone.
    """

    def obey_parent() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    for name in ("SIGUSR1", "SIGHUP", "SIGINT"):  # Slurm's warning, a closed terminal, Ctrl-C
        if number := getattr(signal, name, None):
            signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=obey_parent, name="sigterm", daemon=True).start()


def explain_loss(error: BaseException) -> str | None:
    """One line for a worker that was lost or hangs, with the likely cause and the remedy; None for any other error.

    torch raises a bare RuntimeError from wherever the main process is when it hears of its child's death.
    """
    text = " ".join(f"{error.__cause__ or ''} {error}".split())  # the cause, where there is one, knows the signal
    if hung := re.search(r"DataLoader timed out after ([\d.]+)", text):
        return (
            f"no audio came for {float(hung[1]):,.0f} s from the processes that decode it: the storage does not "
            "answer, or a damaged file keeps the decoder busy"
        )
    lost = re.search(r"DataLoader worker \(pid(?:\(s\))? (\d+)[\d, ]*\) (?:is killed by signal: (\w[\w ]*))?", text)
    if not lost:
        return None
    how = lost[2] or "it ended by itself"
    cause = "memory ran out, or shared memory (in a container: --shm-size=2g): use fewer --dataloader_num_workers"
    if re.search("egmentation|loating|Abort", how):
        cause = "a damaged file crashed the decoder: find it and leave it out of the manifest"
    return (
        f"a process that decodes audio (pid {lost[1]}) was lost ({how}): probably {cause}; "
        "--resume_from_checkpoint auto goes on from the last checkpoint"
    )
