"""Which settings of a run are known for what the collapse watch found: those alone that are unlike what is usual.

Usual is the paper's and fairseq's recipe for BASE and LARGE, and configs/pretrain/small.yaml for models below 512 wide.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from w2v2.train.collapse import Finding
from w2v2.train.schedule import num_warmup_steps, ramp


class Recipe(NamedTuple):
    """What is usual for a model of a size (the paper's, fairseq's; small: configs/pretrain/small.yaml)."""

    batch_hours: float
    learning_rate: float
    warmup: tuple[float, int]  # the smaller of this fraction of the run and these updates
    feature_grad_mult: float
    gumbel_temperature: float  # the least
    is_small: bool


# (seconds in an effective batch, peak learning rate) of BASE, where batches are smaller than the paper's: arXiv 2402.13723
RATES = ((87.5, 7.3e-6), (150, 7.9e-5), (300, 1.1e-4), (600, 1.6e-4), (1200, 2.2e-4), (2400, 5e-4))


def recipe(config, batch_hours: float) -> Recipe:
    """What is usual for the configuration's size and for such a batch."""
    mult, coldest = (1.0, 0.1) if config.do_stable_layer_norm else (0.1, 0.5)
    if config.hidden_size < 512:
        return Recipe(0.0045, 1e-3, (0.015, 60), mult, coldest, True)
    usual = 3e-4 if config.hidden_size >= 1024 else 5e-4
    fitting = [rate for seconds, rate in RATES if seconds <= 1.05 * 3600 * batch_hours] or [RATES[0][1]]
    return Recipe(1.6, min(usual, fitting[-1]), (0.08, 32_000), mult, coldest, False)


def likely_causes(
    finding: Finding, record: Mapping[str, Any], args, config, precision: str = "no", silent_share: float = 0.0
) -> list[str]:
    """The settings of this run that are known for what was found, with what is usual; empty where all of them are as usual.

    Args:
        record: the newest.
        precision: Accelerate's `mixed_precision`.
        silent_share: share of the training data that is silence.
    """
    batch_hours = min(args.batch_hours, record["batch_hours"])
    usual = recipe(config, batch_hours)
    causes = _general_causes(finding, record, args, usual, batch_hours, precision)
    if finding.criteria & {"codes", "distractors"}:
        causes += _causes_of_few_codes(finding, record, args, config, usual)
    if finding.criteria & {"accuracy", "loss"}:
        causes += _causes_of_no_learning(finding, record, args, config, usual)
    if silent_share >= 0.25:
        causes.append(f"{silent_share:.0%} of the utterances looked at are silence")
    return causes


def _general_causes(finding, record, args, usual: Recipe, batch_hours: float, precision: str) -> list[str]:
    causes, warmup = [], num_warmup_steps(args.warmup_steps, args.max_steps)
    usual_warmup = min(round(usual.warmup[0] * args.max_steps), usual.warmup[1])
    if batch_hours < 0.9 * usual.batch_hours:
        causes.append(
            f"an effective batch of {batch_hours:.4g} h (--batch_hours {args.batch_hours:g}), where {usual.batch_hours:g} h are usual"
        )
    if args.learning_rate > 1.5 * usual.learning_rate:
        causes.append(
            f"--learning_rate {args.learning_rate:g}, where {usual.learning_rate:g} is usual for such a model and batch"
        )
    if usual_warmup >= 10 and warmup < 0.9 * usual_warmup and finding.since <= 4 * usual_warmup:
        causes.append(f"a warm-up of {warmup:,} updates (--warmup_steps), where {usual_warmup:,} are usual")
    if args.feature_grad_mult > 2 * usual.feature_grad_mult:
        causes.append(f"--feature_grad_mult {args.feature_grad_mult:g}, where {usual.feature_grad_mult:g} is usual")
    if precision == "fp16":
        causes.append(f"fp16, with {record.get('skipped_updates', 0)} updates skipped (bf16 and fp32 do not overflow)")
    return causes


def _causes_of_few_codes(finding, record, args, config, usual: Recipe) -> list[str]:
    causes, weight = [], config.diversity_loss_weight
    if weight < 0.05:
        causes.append(f"--diversity_loss_weight {weight:g}, where 0.1 is usual: little keeps the codes apart")
    elif (share := ramp(finding.since, args.diversity_delay_steps, args.diversity_warmup_steps)) < 1:
        causes.append(
            f"the diversity loss, of whose weight only {share:.0%} was there (--diversity_delay_steps {args.diversity_delay_steps}, "
            f"--diversity_warmup_steps {args.diversity_warmup_steps})"
        )
    if record["gumbel_temperature"] < 0.99 * usual.gumbel_temperature:
        causes.append(
            f"a Gumbel temperature of {record['gumbel_temperature']:.3g} (--min_gumbel_temperature), where {usual.gumbel_temperature:g} "
            "is the least that is usual"
        )
    return causes


def _causes_of_no_learning(finding, record, args, config, usual: Recipe) -> list[str]:
    causes, weight = [], config.diversity_loss_weight
    if args.learning_rate < usual.learning_rate / 20:
        causes.append(f"--learning_rate {args.learning_rate:g}, where {usual.learning_rate:g} is usual")
    if weight > 0.5:
        causes.append(f"--diversity_loss_weight {weight:g}, where 0.1 is usual: it outweighs the contrastive loss")
    if args.feature_grad_mult == 0:
        causes.append("--feature_grad_mult 0: the convs do not learn")
    entries = config.num_codevector_groups * config.num_codevectors_per_group
    if usual.is_small and weight > 0 and record["codebook_perplexity_hard"] > entries / 2:
        if not args.diversity_delay_steps:
            causes.append("the diversity loss from the first update on in so small a model (--diversity_delay_steps)")
        if record["gumbel_temperature"] > 1:
            causes.append(
                f"a Gumbel temperature of {record['gumbel_temperature']:.3g} in so small a model (--max_gumbel_temperature 0.5)"
            )
    return causes
