"""One update of the effective batch, and validation.

The gradient of an update is that of one sum over the whole effective batch, whichever way it was cut:

    fetch the micro-batches one by one           losses are sums over masked frames
    backward each, scaled by a constant          the same on every rank; communication only at the last
    sum counts and metrics over all ranks        one small all-reduce
    divide the gradient by the masked frames     once, together with the clipping
    step, if loss and gradient are finite        decided alike on all ranks

Nothing here has a random state: dropout and Gumbel noise of a micro-batch are seeded by (seed, update, piece).
"""

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator

from w2v2.data.audio import SAMPLING_RATE
from w2v2.data.batching import LATENT_STRIDE, Cursor, MicroBatchPlan
from w2v2.data.collate import PretrainBatch
from w2v2.data.hashing import NOISE, derive, positive
from w2v2.errors import UserError
from w2v2.model import objective
from w2v2.model.pretraining import PretrainingModel, PretrainSums
from w2v2.train import heartbeat, sharding
from w2v2.train.stop import StopRequest


@dataclass
class UpdateSettings:
    """What one update depends on, beside its batch."""

    step: int  # updates finished before this one
    seed: int
    learning_rate: float
    gumbel_temperature: float
    diversity_weight: float
    shared_diversity: bool  # diversity_scope: effective_batch
    max_grad_norm: float  # 0: no clipping


class Totals:
    """Sums over micro-batches, then over ranks: everything that is reported of an effective batch."""

    COUNTS = ("heard_samples", "original_samples", "padded_samples", "skipped", "asked_to_stop")

    def __init__(self, sums: PretrainSums | None = None, counts: torch.Tensor | None = None):
        self.sums, self.counts = sums, counts

    def add(self, sums: PretrainSums, batch: PretrainBatch) -> None:
        real = batch.weight > 0
        heard = batch.heard_samples if real else 0
        padded = batch.waveforms.numel() if real else 0
        counts = torch.tensor([heard, batch.original_samples, padded, len(batch.skipped), 0], dtype=torch.float64)
        sums = PretrainSums(*(x.detach() for x in sums))
        self.sums = sums if self.sums is None else PretrainSums(*(a + b for a, b in zip(self.sums, sums, strict=True)))
        self.counts = counts if self.counts is None else self.counts + counts

    def reduced(self, accelerator: Accelerator) -> "Totals":
        """Summed over all ranks, on the CPU, in one message."""
        flat = torch.cat([x.reshape(-1).double() for x in self.sums] + [self.counts.to(self.sums.loss.device)])
        flat = accelerator.reduce(flat, reduction="sum").cpu()
        shapes = [x.shape for x in self.sums]
        parts = flat.split([shape.numel() for shape in shapes] + [len(self.COUNTS)])
        return Totals(PretrainSums(*(p.view(s) for p, s in zip(parts, shapes, strict=False))), parts[-1])

    def with_diversity(self, weight: float) -> "Totals":
        """With the diversity loss of the whole in place of its pieces', added to the loss: no longer a matter of the cut."""
        sums = self.sums
        statistics = objective.CodeStatistics(sums.codes_soft, sums.codes_hard, sums.code_entropy)
        diversity = objective.diversity_loss(statistics, sums.num_masked)
        return Totals(sums._replace(diversity=diversity, loss=sums.loss + weight * diversity), self.counts)

    @property
    def heard_samples(self) -> int:
        return int(self.counts[0])

    @property
    def num_skipped(self) -> int:
        return int(self.counts[3])

    @property
    def is_stop_asked(self) -> bool:
        """Of any rank."""
        return bool(self.counts[4])

    def metrics(self, prefix: str = "") -> dict[str, float]:
        """Means over masked frames, and the batch's composition."""
        sums, masked = self.sums, max(float(self.sums.num_masked), 1.0)
        heard, original, padded = self.counts[:3].tolist()
        soft, hard = (objective.perplexity(x / masked).item() for x in (sums.codes_soft, sums.codes_hard))
        values = {
            "loss": float(sums.loss) / masked,
            "contrastive_loss": float(sums.contrastive) / masked,
            "diversity_loss": float(sums.diversity) / masked,
            "feature_penalty": float(sums.penalty) / masked,
            "accuracy": float(sums.correct) / masked,
            "codebook_perplexity": soft,
            "codebook_perplexity_hard": hard,
            "code_entropy": float(sums.code_entropy) / masked,
            "distractors_left": float(sums.distractors_left) / masked,
            "masked_frames": int(sums.num_masked),
            "batch_hours": heard / SAMPLING_RATE / 3600,
            "cropped_fraction": 1.0 - heard / max(original, 1.0),
            "padded_fraction": 1.0 - heard / max(padded, 1.0),
        }
        return {prefix + name: value for name, value in values.items()}


@dataclass
class Heard:
    """What this rank heard in one update: looked at only when something was wrong with it."""

    skipped: list[dict] = field(default_factory=list)  # utterances that could not be read
    # Each micro-batch with weight, and () the part of its loss that is its own (the diversity term may be the whole's), on the device.
    losses: list[tuple[MicroBatchPlan, torch.Tensor]] = field(default_factory=list)

    def add(self, sums: PretrainSums, batch: PretrainBatch) -> None:
        self.skipped += batch.skipped
        if batch.weight > 0:
            self.losses.append((batch.plan, sums.contrastive.detach() + sums.penalty.detach()))


class Feed:
    """Hands out a loader's micro-batches update by update, and counts the seconds spent waiting for them."""

    def __init__(self, loader: Iterable[PretrainBatch]):
        self.iterator = iter(loader)
        self.waited_seconds = 0.0
        self.cursor: Cursor | None = None  # where the data stands after the update handed out last
        self.waiting = "waiting for the first micro-batch"

    def update(self) -> Iterator[PretrainBatch]:
        """The micro-batches of the next update."""
        batch = self._next()
        self.cursor = batch.plan.following
        yield batch
        for done in range(1, batch.plan.num_rounds):
            self.waiting = (
                f"update {batch.plan.update + 1}, waiting for micro-batch {done + 1} of {batch.plan.num_rounds}"
            )
            yield self._next()
        self.waiting = f"update {batch.plan.update + 2}, waiting for its first micro-batch"

    def _next(self) -> PretrainBatch:
        asked = time.perf_counter()
        heartbeat.at(self.waiting)
        batch = next(self.iterator)
        self.waited_seconds += time.perf_counter() - asked
        return batch


class Clock:
    """Throughput since the last look, over all ranks."""

    def __init__(self, feed: Feed):
        self.feed, self.heard_samples = feed, 0
        self._restart()

    def _restart(self) -> None:
        self.started, self.heard_samples, self.waited_before = time.perf_counter(), 0, self.feed.waited_seconds

    def rates(self) -> dict[str, float]:
        """Audio-seconds per second, and the share of the time that went into waiting for data."""
        seconds = max(time.perf_counter() - self.started, 1e-9)
        return {
            "audio_seconds_per_second": self.heard_samples / SAMPLING_RATE / seconds,
            "data_wait_fraction": (self.feed.waited_seconds - self.waited_before) / seconds,
        }

    def lap(self) -> dict[str, float]:
        """The rates, and the next lap begins."""
        rates = self.rates()
        self._restart()
        return rates


def build_optimizer(model: torch.nn.Module, args) -> torch.optim.AdamW:
    """AdamW with decoupled weight decay, on norms and biases too unless told otherwise."""
    decayed = [p for p in model.parameters() if args.decay_norms_and_biases or p.ndim > 1]
    others = [p for p in model.parameters() if not (args.decay_norms_and_biases or p.ndim > 1)]
    groups = [{"params": decayed, "weight_decay": args.weight_decay}]
    if others:
        groups.append({"params": others, "weight_decay": 0.0})
    betas = (args.adam_beta1, args.adam_beta2)
    return torch.optim.AdamW(groups, lr=args.learning_rate, betas=betas, eps=args.adam_epsilon, fused=True)


def seed_noise(seed: int, step: int, piece: int, device: torch.device) -> None:
    """Seed dropout and Gumbel noise of one micro-batch, alike on whichever rank it runs.

    `torch.manual_seed` does the same for every kind of device there could be, and formats the stack for each that is absent: half a millisecond.
    """
    number = int(positive(derive(seed, NOISE, step, piece)))
    torch.default_generator.manual_seed(number)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(number)


def accumulate(
    accelerator: Accelerator,
    model: torch.nn.Module,
    micro_batches: Iterable[PretrainBatch],
    settings: UpdateSettings,
    stop: StopRequest | None = None,
) -> tuple[Totals, float, Heard]:
    """Backward passes over this rank's micro-batches of one update. What `stop` noted on any rank all ranks learn with the totals.

    Returns: the totals over all ranks, the constant that the summed gradient was divided by, and what this rank heard.
    """
    mean_codes = None
    if settings.shared_diversity:
        micro_batches = list(micro_batches)
        mean_codes = _mean_codes(accelerator, model, micro_batches, settings)
    totals, heard, scale = Totals(), Heard(), 1.0
    for done, batch in enumerate(micro_batches, start=1):
        is_last = done == batch.plan.num_rounds
        # Any constant will do here, since the exact division comes with the clipping; this one keeps fp16 in range.
        scale = batch.plan.batch_samples / LATENT_STRIDE
        batch = batch.to(accelerator.device)
        heartbeat.at(f"update {settings.step + 1}, micro-batch {done} of {batch.plan.num_rounds}")
        seed_noise(settings.seed, settings.step, batch.plan.piece, accelerator.device)
        with sharding.sending(accelerator, model, now=is_last):
            sums = model(batch, settings.gumbel_temperature, settings.diversity_weight, mean_codes)
            # Ranks' gradients are averaged when they meet: times their number they are summed.
            accelerator.backward(sums.loss * (accelerator.num_processes / scale))
        totals.add(sums, batch)
        heard.add(sums, batch)
    totals.counts[-1] = float(stop is not None and stop.is_asked)
    return totals.reduced(accelerator), scale, heard


def _mean_codes(accelerator, model, micro_batches, settings) -> torch.Tensor:
    """(G, V) mean code distribution over the masked frames of the whole effective batch: a first pass without gradient."""
    bare: PretrainingModel = accelerator.unwrap_model(model)
    soft, num_masked = 0.0, 0.0
    for batch in micro_batches:
        seed_noise(settings.seed, settings.step, batch.plan.piece, accelerator.device)
        with accelerator.autocast():
            sums, masked = bare.code_sums(batch.to(accelerator.device))
        soft, num_masked = soft + sums, num_masked + masked
    soft = accelerator.reduce(soft, reduction="sum")
    return soft / accelerator.reduce(num_masked.to(soft.dtype), reduction="sum").clamp_min(1)


def step(
    accelerator: Accelerator,
    optimizer,
    gradient_factor: float,
    learning_rate: float,
    max_grad_norm: float,
    is_finite: bool = True,
) -> float:
    """Scale the gradient once, clip it, and take the optimizer's step if it is finite, and the loss is (`is_finite`).

    The norm is the whole gradient's and the loss that of all ranks, so all of them decide alike. Without the step weights and
    moments stay as they are; a loss scaler alone learns of the overflow.

    Returns: the gradient's norm before clipping.
    """
    accelerator.unscale_gradients(optimizer)
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm) * gradient_factor
    if is_finite and math.isfinite(norm):
        clip = min(1.0, max_grad_norm / (norm + 1e-6)) if max_grad_norm > 0 else 1.0
        torch._foreach_mul_(gradients, gradient_factor * clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
    elif accelerator.scaler is not None:
        accelerator.scaler.update()
    optimizer.zero_grad()
    return norm


def train_update(
    accelerator: Accelerator,
    model,
    optimizer,
    micro_batches: Iterable[PretrainBatch],
    settings: UpdateSettings,
    stop: StopRequest | None = None,
) -> tuple[dict[str, float], Totals, Heard]:
    """One update from one effective batch; none where `loss` or `grad_norm` is not finite.

    Returns: its metrics, its totals over all ranks, and what this rank heard.
    """
    totals, scale, heard = accumulate(accelerator, model, micro_batches, settings, stop)
    masked = float(totals.sums.num_masked)
    factor = scale / masked if masked else math.nan  # nothing could be read: no step
    is_finite = math.isfinite(totals.sums.loss)
    norm = step(accelerator, optimizer, factor, settings.learning_rate, settings.max_grad_norm, is_finite)
    metrics = totals.metrics() | {
        "gumbel_temperature": settings.gumbel_temperature,
        "learning_rate": settings.learning_rate,
        "grad_norm": norm,
    }
    return metrics, totals, heard


@torch.no_grad()
def validate(
    accelerator: Accelerator, model, micro_batches: Iterable[PretrainBatch], settings: UpdateSettings
) -> dict[str, float]:
    """Metrics of a validation set under `eval_`: fixed crops, masks and distractors, the most likely codes, no dropout.

    Raises `UserError` when none of it can be read.
    """
    model.eval()
    totals = Totals()
    for done, batch in enumerate(micro_batches, start=1):
        heartbeat.at(f"validation after update {settings.step + 1}, micro-batch {done} of {batch.plan.num_rounds}")
        batch = batch.to(accelerator.device)
        totals.add(model(batch, diversity_weight=0.0), batch)
    sharding.rest(model)
    model.train()
    totals = totals.reduced(accelerator).with_diversity(settings.diversity_weight)
    if not totals.sums.num_masked:
        raise UserError("none of the validation audio can be read any more: mend the paths in --validation_data")
    metrics = totals.metrics(prefix="eval_") | {"eval_skipped_audio": totals.num_skipped}
    return {
        name: value
        for name, value in metrics.items()
        if name not in ("eval_batch_hours", "eval_cropped_fraction", "eval_padded_fraction")
    }
