"""Which settings of a run are known for a collapse: those alone that are unlike what is usual.

Usual is the paper's and fairseq's recipe for BASE and LARGE, and configs/pretrain/small.yaml for models below 512 wide.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from w2v2.train.schedule import num_warmup_steps, ramp

FEW_CODES, NO_LEARNING = {"codes", "distractors"}, {"accuracy", "loss"}  # the criteria of `collapse.py`

# (seconds in an effective batch, peak learning rate) of BASE, where batches are smaller than the paper's: arXiv 2402.13723
RATES = ((87.5, 7.3e-6), (150, 7.9e-5), (300, 1.1e-4), (600, 1.6e-4), (1200, 2.2e-4), (2400, 5e-4))


class Usual(NamedTuple):
    """What is usual for a model of a size."""

    batch_hours: float
    learning_rate: float
    warmup_steps: int
    feature_grad_mult: float
    gumbel_temperature: float  # the least

    @classmethod
    def of(cls, config, batch_hours: float, max_steps: int) -> "Usual":
        """For the configuration's size, such an effective batch and a run of that length."""
        mult, coldest = (1.0, 0.1) if config.do_stable_layer_norm else (0.1, 0.5)
        if config.hidden_size < 512:
            return cls(0.0045, 1e-3, min(round(0.015 * max_steps), 60), mult, coldest)
        peak = 3e-4 if config.hidden_size >= 1024 else 5e-4
        fitting = [rate for seconds, rate in RATES if seconds <= 1.05 * 3600 * batch_hours] or [RATES[0][1]]
        return cls(1.6, min(peak, fitting[-1]), min(round(0.08 * max_steps), 32_000), mult, coldest)


def likely_causes(criteria: frozenset[str], since: int, record: Mapping[str, Any], args, config) -> list[str]:
    """The settings of this run that are known for what was found, with what is usual; empty where all are as usual.

    Args:
        criteria: those that were met, `since` that update.
        record: the newest.
    """
    batch_hours, temperature = min(args.batch_hours, record["batch_hours"]), record["gumbel_temperature"]
    usual = Usual.of(config, batch_hours, args.max_steps)
    few_codes, no_learning = bool(criteria & FEW_CODES), bool(criteria & NO_LEARNING)
    weight, delay, delay_end = config.diversity_loss_weight, args.diversity_delay_steps, args.diversity_warmup_steps
    share, warmup = ramp(since, delay, delay_end), num_warmup_steps(args.warmup_steps, args.max_steps)
    entries = config.num_codevector_groups * config.num_codevectors_per_group
    # A small model whose codes are all used alike: nothing is left for the contrastive loss to learn from.
    is_blurred = no_learning and config.hidden_size < 512 and weight > 0
    is_blurred &= record["codebook_perplexity_hard"] > entries / 2

    rate = f"--learning_rate {args.learning_rate:g}, where {usual.learning_rate:g} is usual"
    diversity = f"--diversity_loss_weight {weight:g}, where 0.1 is usual"
    mult, gumbel = f"--feature_grad_mult {args.feature_grad_mult:g}", f"a Gumbel temperature of {temperature:.3g}"
    causes = [
        (
            batch_hours < 0.9 * usual.batch_hours,
            f"an effective batch of {batch_hours:.4g} h (--batch_hours {args.batch_hours:g}), where {usual.batch_hours:g} h "
            "are usual",
        ),
        (args.learning_rate > 1.5 * usual.learning_rate, f"{rate} for such a model and batch"),
        (
            usual.warmup_steps >= 10 and warmup < 0.9 * usual.warmup_steps and since <= 4 * usual.warmup_steps,
            f"a warm-up of {warmup:,} updates (--warmup_steps), where {usual.warmup_steps:,} are usual",
        ),
        (args.feature_grad_mult > 2 * usual.feature_grad_mult, f"{mult}, where {usual.feature_grad_mult:g} is usual"),
        (few_codes and weight < 0.05, f"{diversity}: little keeps the codes apart"),
        (
            few_codes and weight >= 0.05 and share < 1,
            f"the diversity loss, of whose weight only {share:.0%} was there (--diversity_delay_steps {delay}, "
            f"--diversity_warmup_steps {delay_end})",
        ),
        (
            few_codes and temperature < 0.99 * usual.gumbel_temperature,
            f"{gumbel} (--min_gumbel_temperature), where {usual.gumbel_temperature:g} is the least that is usual",
        ),
        (no_learning and args.learning_rate < usual.learning_rate / 20, rate),
        (no_learning and weight > 0.5, f"{diversity}: it outweighs the contrastive loss"),
        (no_learning and args.feature_grad_mult == 0, f"{mult}: the convs do not learn"),
        (
            is_blurred and not delay,
            "the diversity loss from the first update on in so small a model (--diversity_delay_steps)",
        ),
        (is_blurred and temperature > 1, f"{gumbel} in so small a model (--max_gumbel_temperature 0.5)"),
    ]
    return [text for applies, text in causes if applies]
