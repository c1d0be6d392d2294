"""Learning rate and Gumbel temperature as pure functions of the update: nothing to save, nothing to restore."""

import math
from dataclasses import dataclass

SCHEDULES = ("linear", "cosine", "constant", "tri_stage")
# (seconds in an effective batch, peak learning rate) of BASE with smaller batches than the paper's: arXiv 2402.13723
PEAK_RATES = ((87.5, 7.3e-6), (150, 7.9e-5), (300, 1.1e-4), (600, 1.6e-4), (1200, 2.2e-4), (2400, 5e-4))


def num_warmup_steps(warmup_steps: float, total_steps: int) -> int:
    """Updates of warm-up: a number of updates, or a fraction of the run when under 1 (as `TrainingArguments` has it)."""
    return round(warmup_steps * total_steps) if warmup_steps < 1 else int(warmup_steps)


def peak_rate(batch_hours: float) -> float:
    """The peak learning rate of BASE in `PEAK_RATES` with the largest batch that is not above this one (by over 5 %)."""
    fitting = [peak for seconds, peak in PEAK_RATES if seconds <= 1.05 * 3600 * batch_hours]
    return fitting[-1] if fitting else PEAK_RATES[0][1]


def lr_factor(
    step: int, total_steps: int, warmup_steps: float, kind: str = "linear", hold: float = 0.4, final_scale: float = 0.05
) -> float:
    """Multiplier of the peak learning rate for the update that follows `step` finished ones.

    All kinds warm up linearly. Then `linear` and `cosine` decay to zero at `total_steps`, `constant` stays, and
    `tri_stage` (fairseq's, for fine-tuning) holds the peak for the fraction `hold` of the run and decays exponentially
    to `final_scale`.
    """
    warmup = num_warmup_steps(warmup_steps, total_steps)
    if step < warmup:
        return (step + 1) / warmup
    if kind == "constant":
        return 1.0
    if kind == "tri_stage":
        hold_until = warmup + int(hold * total_steps)
        if step < hold_until:
            return 1.0
        progress = min(1.0, (step - hold_until) / max(1, total_steps - hold_until))
        return final_scale**progress
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    return 1.0 - progress if kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))


def gumbel_temperature(step: int, maximum: float, minimum: float, decay: float) -> float:
    """Temperature of the Gumbel softmax, annealed geometrically once an update: max(maximum · decay^step, minimum)."""
    return max(maximum * decay**step, minimum)


def ramp(step: int, delay_steps: int, warmup_steps: int) -> float:
    """0 before `delay_steps` updates, then linearly up to 1 over `warmup_steps`."""
    return min(1.0, max(0.0, (step - delay_steps + 1) / max(1, warmup_steps)))


@dataclass
class UpdateSettings:
    """What one update depends on, besides its batch."""

    step: int  # updates finished before this one
    seed: int
    learning_rate: float
    gumbel_temperature: float
    diversity_weight: float
    shared_diversity: bool  # diversity_scope: effective_batch
    max_grad_norm: float  # 0: no clipping

    @classmethod
    def at(cls, step: int, args, diversity_weight: float) -> "UpdateSettings":
        """What the schedules give for the update that follows `step` finished ones."""
        rate = lr_factor(step, args.max_steps, args.warmup_steps, args.lr_scheduler_type)
        highest, lowest, decay = args.max_gumbel_temperature, args.min_gumbel_temperature, args.gumbel_temperature_decay
        return cls(
            step=step,
            seed=args.seed,
            learning_rate=args.learning_rate * rate,
            gumbel_temperature=gumbel_temperature(step, highest, lowest, decay),
            diversity_weight=diversity_weight * ramp(step, args.diversity_delay_steps, args.diversity_warmup_steps),
            shared_diversity=args.diversity_scope == "effective_batch",
            max_grad_norm=args.max_grad_norm,
        )
