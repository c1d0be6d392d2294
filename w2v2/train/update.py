"""One update of the effective batch, and validation.

The gradient of an update is that of one sum over the whole effective batch, whichever way it was cut (but for the
diversity term, whose code statistics are a micro-batch's unless `diversity_scope` is `effective_batch`):

    fetch the micro-batches one by one           losses are sums over masked frames
    backward each, scaled by a constant          the same on every rank; communication only at the last
    sum counts and metrics over all ranks        one small all-reduce
    divide the gradient by the masked frames     once, together with the clipping
    step, if loss and gradient are finite        all ranks decide alike

No random state is carried along: (seed, update, piece) seeds dropout and Gumbel noise of each micro-batch.

Shapes: G codebook groups, V entries of a group.
"""

import contextlib
import math
import time
from collections.abc import Iterable, Iterator

import torch
from accelerate import Accelerator
from torch.distributed.fsdp import FSDPModule

from w2v2.audio.crops import SAMPLING_RATE
from w2v2.data.batching import LATENT_STRIDE, Cursor
from w2v2.data.collate import PretrainBatch
from w2v2.data.hashing import NOISE, derive, positive
from w2v2.data.loader import end_workers
from w2v2.errors import UserError
from w2v2.model.pretraining import PretrainingModel, PretrainSums
from w2v2.train.capture import CapturedStep
from w2v2.train.launch import StopRequest
from w2v2.train.schedule import UpdateSettings
from w2v2.train.state import Totals


class Feed:
    """Hands out a loader's micro-batches update by update, and measures throughput since it was last restarted."""

    def __init__(self, loader: Iterable[PretrainBatch]):
        self.loader, self.iterator = loader, iter(loader)
        self.cursor: Cursor | None = None  # where the data stands after the update that was handed out last
        self.restart()

    def restart(self) -> None:
        self.started, self.waited_seconds = time.perf_counter(), 0.0
        self.heard_samples = 0  # of all ranks, which the caller counts

    def update(self) -> Iterator[PretrainBatch]:
        """The micro-batches of the next update."""
        batch = self._next()
        self.cursor = batch.plan.following
        yield batch
        for _ in range(1, batch.plan.num_rounds):
            yield self._next()

    def close(self) -> None:
        end_workers(self.loader)
        self.iterator = iter(())

    def _next(self) -> PretrainBatch:
        asked = time.perf_counter()
        batch = next(self.iterator)
        self.waited_seconds += time.perf_counter() - asked
        return batch

    def rates(self) -> dict[str, float]:
        """Audio-seconds per second, and the share of the time that was spent waiting for data."""
        seconds = max(time.perf_counter() - self.started, 1e-9)
        return {
            "audio_seconds_per_second": self.heard_samples / SAMPLING_RATE / seconds,
            "data_wait_fraction": self.waited_seconds / seconds,
        }


def build_optimizer(model: torch.nn.Module, args) -> torch.optim.AdamW:
    """AdamW with decoupled weight decay, on norms and biases too unless `decay_norms_and_biases` is false.

    Frozen parameters are left out, so they are neither decayed nor saved with moments.
    """
    decayed, others = [], []
    for parameter in filter(lambda parameter: parameter.requires_grad, model.parameters()):
        (decayed if args.decay_norms_and_biases or parameter.ndim > 1 else others).append(parameter)
    groups = [{"params": decayed, "weight_decay": args.weight_decay}]
    groups += [{"params": others, "weight_decay": 0.0}] if others else []
    betas = (args.adam_beta1, args.adam_beta2)
    return torch.optim.AdamW(groups, lr=args.learning_rate, betas=betas, eps=args.adam_epsilon, fused=True)


def train_update(
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: Iterable[PretrainBatch],
    settings: UpdateSettings,
    stop: StopRequest | None = None,
) -> tuple[dict[str, float], Totals]:
    """One update from one effective batch; no step where loss or gradient is not finite, or nothing could be read.

    Returns: its metrics, and the totals that they come from.
    """
    totals, scale = accumulate(accelerator, model, micro_batches, settings, stop)
    masked = float(totals.sums.num_masked)
    factor = scale / masked if masked else math.nan  # NaN takes no step: nothing could be read
    norm = take_step(accelerator, optimizer, factor, settings, loss_is_finite=math.isfinite(totals.sums.loss))
    used = {"gumbel_temperature": settings.gumbel_temperature, "learning_rate": settings.learning_rate}
    return totals.metrics() | used | {"grad_norm": norm}, totals


def accumulate(
    accelerator: Accelerator,
    model: torch.nn.Module,
    micro_batches: Iterable[PretrainBatch],
    settings: UpdateSettings,
    stop: StopRequest | None = None,
) -> tuple[Totals, float]:
    """Forward and backward passes over this rank's micro-batches of one update.

    Returns: the totals over all ranks, and the constant that the summed gradient was divided by.
    """
    mean_codes = None
    if settings.shared_diversity:
        micro_batches = list(micro_batches)  # read twice
        mean_codes = compute_mean_codes(accelerator, model, micro_batches, settings)
    totals, scale = Totals(), 1.0
    step = model if isinstance(model, CapturedStep) else EagerStep(accelerator, model)
    step.begin()
    for batch in micro_batches:
        # The same for all micro-batches and ranks. `take_step` undoes it; it keeps fp16 in range.
        scale = batch.plan.batch_samples / LATENT_STRIDE
        batch = batch.to(accelerator.device)
        seed_noise(settings.seed, settings.step, batch.plan.piece, accelerator.device)
        totals.add(step(batch, settings, scale, mean_codes), batch)
    step.end()
    totals.counts = totals.counts._replace(stops_asked=float(stop is not None and stop.is_asked))
    return totals.reduced(accelerator), scale


class EagerStep:
    """Runs micro-batches forward and backward, and adds up their gradients; those of all ranks with the last one."""

    def __init__(self, accelerator: Accelerator, model: torch.nn.Module):
        self.accelerator, self.model, self.number = accelerator, model, 0

    def begin(self) -> None:
        pass

    end = begin

    def __call__(self, batch: PretrainBatch, settings: UpdateSettings, scale: float, mean_codes=None) -> PretrainSums:
        accelerator, model = self.accelerator, self.model
        self.number += 1
        is_last = self.number == batch.plan.num_rounds  # only then are gradients sent
        if isinstance(model, FSDPModule):
            model.set_reshard_after_backward(is_last)
        with contextlib.nullcontext() if is_last else accelerator.no_sync(model):
            sums = model(batch, settings.gumbel_temperature, settings.diversity_weight, mean_codes)
            # DDP averages over ranks; times their number the gradient is a sum.
            accelerator.backward(sums.loss * (accelerator.num_processes / scale))
        return sums


def take_step(
    accelerator: Accelerator,
    optimizer: torch.optim.Optimizer,
    gradient_factor: float,
    settings: UpdateSettings,
    loss_is_finite: bool = True,
) -> float:
    """Scale the gradient once, clip it, and step if both gradient and loss are finite; all ranks decide alike.

    Without a step weights and moments stay; only a loss scaler learns of the overflow. Returns: the gradient's norm
    before clipping.
    """
    accelerator.unscale_gradients(optimizer)
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm) * gradient_factor
    if loss_is_finite and math.isfinite(norm):
        clip = min(1.0, settings.max_grad_norm / (norm + 1e-6)) if settings.max_grad_norm > 0 else 1.0
        torch._foreach_mul_(gradients, gradient_factor * clip)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate
        optimizer.step()
    elif accelerator.scaler is not None:
        accelerator.scaler.update()
    optimizer.zero_grad()
    return norm


def compute_mean_codes(
    accelerator: Accelerator, model: torch.nn.Module, micro_batches: list[PretrainBatch], settings: UpdateSettings
) -> torch.Tensor:
    """(G, V) mean code distribution over the effective batch's masked frames: a first pass without gradient."""
    bare: PretrainingModel = accelerator.unwrap_model(model)
    soft, num_masked = 0.0, 0.0
    for batch in micro_batches:
        seed_noise(settings.seed, settings.step, batch.plan.piece, accelerator.device)
        with accelerator.autocast():
            sums, masked = bare.code_sums(batch.to(accelerator.device))
        soft, num_masked = soft + sums, num_masked + masked
    soft = accelerator.reduce(soft, reduction="sum")
    return soft / accelerator.reduce(num_masked.to(soft.dtype), reduction="sum").clamp_min(1)


def seed_noise(seed: int, step: int, piece: int, device: torch.device) -> None:
    """Seed dropout and Gumbel noise of one micro-batch, alike on whichever rank it runs.

    `torch.manual_seed` takes half a millisecond for the kinds of devices that are absent.
    """
    number = int(positive(derive(seed, NOISE, step, piece)))
    torch.default_generator.manual_seed(number)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(number)


@torch.no_grad()
def validate(
    accelerator: Accelerator, model: torch.nn.Module, micro_batches: Iterable[PretrainBatch], diversity_weight: float
) -> tuple[dict[str, float], Totals]:
    """Metrics of a validation set under `eval_`, and its totals: fixed crops and masks, the likeliest codes, no dropout.

    Raises `UserError` when none of it can be read.
    """
    model.eval()
    totals = Totals()
    for batch in micro_batches:
        batch = batch.to(accelerator.device)
        totals.add(model(batch, diversity_weight=0.0), batch)  # that of the whole set is added below
    if isinstance(model, FSDPModule):
        model.reshard()  # gives back the gathered weights
    model.train()
    totals = totals.reduced(accelerator).with_diversity(diversity_weight)
    if not totals.sums.num_masked:
        raise UserError("none of the validation audio can be read any more: mend the paths in --validation_data")
    metrics = totals.metrics(prefix="eval_") | {"eval_skipped_audio": int(totals.counts.num_skipped)}
    left_out = ("eval_batch_hours", "eval_cropped_fraction", "eval_padded_fraction")
    return {name: value for name, value in metrics.items() if name not in left_out}, totals
