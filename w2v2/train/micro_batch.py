"""`--micro_batch_seconds auto`: the largest micro-batch that every rank's accelerator holds, found by trying the worst.

The unit is n crops of the longest length: no micro-batch within that budget has more frames, attention weights or
masked frames. A CPU's memory ends with a kill, which no trial could meet: a CPU takes `CPU_SECONDS`.
"""

import bisect
import gc
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from w2v2.audio.crops import SAMPLING_RATE
from w2v2.data.batching import Crops, Cursor, EffectiveBatches, MicroBatchPlan
from w2v2.data.collate import Framing, PretrainBatch, build_batch, place_masks
from w2v2.data.masking import inside_rows
from w2v2.data.sampling import build_batches
from w2v2.errors import UserError
from w2v2.train.log import announce
from w2v2.train.schedule import UpdateSettings
from w2v2.train.update import seed_noise

DEVICE_SHARE = 0.92  # of the memory that is free: the rest is for communication and fragmentation
GRAPH_SHARE = 0.45  # with --cuda_graph, which keeps its memory: a micro-batch that is too large for it needs its own
CPU_SECONDS = 60.0  # a CPU gains nothing from larger micro-batches
ACCELERATOR_SECONDS = 800.0  # keep a GPU busy with BASE (docs/performance.md)


@dataclass
class Trial:
    """Tries micro-batches of n crops of `longest` samples, on an accelerator."""

    accelerator: Accelerator
    model: torch.nn.Module  # prepared
    optimizer: torch.optim.Optimizer
    framing: Framing
    settings: UpdateSettings
    longest: int
    share: float = DEVICE_SHARE

    def run(self, n: int) -> None:
        """Forward and backward pass of the bare model; gradients and weights are then as they were."""
        device, bare = self.accelerator.device, self.accelerator.unwrap_model(self.model)
        try:
            batch = worst_case(n, self.longest, self.framing, self.settings.seed).to(device)
            # What an update's later micro-batches find allocated: gradients, and AdamW's moments if there are none yet.
            # Written to, so that they are really there. DDP's gradients, whose buckets exist, are counted twice.
            parameters = [parameter for parameter in bare.parameters() if parameter.requires_grad]
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)
            moments = [torch.ones_like(p) for p in parameters if p not in self.optimizer.state for _ in range(2)]
            seed_noise(self.settings.seed, self.settings.step, 0, device)
            with self.accelerator.autocast():
                sums = bare(batch, self.settings.gumbel_temperature, self.settings.diversity_weight)
            sums.loss.backward()
            del moments  # not before
        finally:
            bare.zero_grad()

    def fits(self, n: int) -> bool:
        """Whether the device does not run out of memory."""
        found = True
        try:
            self.run(n)
        except torch.OutOfMemoryError:
            found = False  # leave the handler first: its traceback holds on to the activations
        self.free()
        return found

    def free(self) -> None:
        """Give back what a trial took."""
        gc.collect()
        torch.get_device_module(self.accelerator.device).empty_cache()

    def search(self, bound: int) -> tuple[int, float]:
        """The most crops up to `bound` that fit into `share` of what is free or ours, and that in bytes."""
        module = torch.get_device_module(self.accelerator.device)
        device = torch.device(self.accelerator.device.type, module.current_device())
        self.free()
        free, total = module.mem_get_info(device)
        limit = self.share * (free + module.memory_reserved(device))
        module.set_per_process_memory_fraction(limit / total, device)
        try:
            return largest(self.fits, bound), limit
        finally:
            module.set_per_process_memory_fraction(1.0, device)


def worst_case(n: int, longest: int, framing: Framing, seed: int) -> PretrainBatch:
    """The micro-batch of n rows of `longest` samples (noise) that takes most memory.

    No layer leaves out a row, and no two mask spans overlap.
    """
    rows = np.arange(n, dtype=np.int64)
    crops = Crops(rows, np.zeros_like(rows), np.zeros_like(rows), np.full_like(rows, longest))
    plan = MicroBatchPlan(crops, 0, 0, 1, n * longest, False, Cursor())
    noise = np.random.default_rng(seed).integers(-3_000, 3_000, longest, dtype=np.int16)
    batch = build_batch(plan, crops, [noise] * n, framing, seed)

    prob, length, least = (getattr(framing.config, f"mask_time_{name}") for name in ("prob", "length", "min_masks"))
    spans = torch.ceil(prob * batch.rows.frames / length).clamp_min(least)
    masked = torch.minimum(spans * length, batch.rows.frames).long()
    mask = inside_rows(masked, max(batch.rows.lengths))  # (B, T)
    return replace(batch, kept=torch.ones_like(batch.kept), **place_masks(mask, batch.rows))


def largest(fits: Callable[[int], bool], bound: int) -> int:
    """The largest n in 1…bound that fits, 0 if none does. None beyond twice what fits is tried."""
    low, high = 0, 1  # `low` fits
    while fits(high):
        if high == bound:
            return bound
        low, high = high, min(2 * high, bound)
    return low + bisect.bisect_left(range(low + 1, high), True, key=lambda n: not fits(n))


def find_micro_batch(run, batches: EffectiveBatches) -> float:
    """Seconds for `--micro_batch_seconds auto`: the checkpoint's, as noise follows the cut, or what the devices hold.

    `run` is `pretrain.Run`. Call on all ranks.
    """
    accelerator, state, seconds = run.accelerator, run.state, run.state.micro_batch_seconds
    longest = max(batches.longest, build_batches(run.validation, run.args).longest if run.validation else 0)
    if state.num_processes == accelerator.num_processes and seconds * SAMPLING_RATE >= longest:
        finding = f"{seconds:.1f} s, as before the checkpoint"
    else:
        settings = UpdateSettings.at(state.step, run.args, run.config.diversity_loss_weight)
        share = GRAPH_SHARE if run.args.cuda_graph else DEVICE_SHARE
        trial = Trial(accelerator, run.model, run.optimizer, run.framing, settings, longest, share)
        # Beyond a device's part of an effective batch, a larger micro-batch saves no round.
        seconds, finding = fit(trial, math.ceil(batches.batch_samples / accelerator.num_processes / longest))
    announce(accelerator, f"micro-batch   auto: {finding}")
    return seconds


def fit(trial: Trial, share: int) -> tuple[float, str]:
    """Seconds of the largest micro-batch of at most `share` crops that every rank's device holds, and why.

    Call on all ranks. Raises `UserError` if not even one crop fits.
    """
    seconds, device = trial.longest / SAMPLING_RATE, trial.accelerator.device.type
    enough = CPU_SECONDS if device == "cpu" else ACCELERATOR_SECONDS
    most = max(1, int(enough / seconds))
    bound, why = min((share, "that is the device's share of an effective batch"), (most, f"{enough:g} s are enough"))
    if device == "cpu":
        return bound * seconds, f"{bound * seconds:.1f} s, not tried on a CPU; {why}"

    crops, limit = min(gather_object([trial.search(bound)]))
    if crops < bound:
        why = f"more would take above {limit / 1e9:.1f} GB, {trial.share:.0%} of what is free"
    if crops == 0:
        advice = "lower --crop_seconds, use --gradient_checkpointing, a smaller model, or a device with more memory"
        raise UserError(f"--micro_batch_seconds auto: not even one crop of {seconds:.2f} s fits: {why}; {advice}")
    return crops * seconds, f"{crops * seconds:.1f} s, {crops} times {seconds:.2f} s; {why}"
