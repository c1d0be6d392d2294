"""Checks of a run's settings, judged by what is usual for a model of its size (`train.recipes`).

`run` is `preflight.Preflight`. A run that goes on from given weights is spared advice that is for fresh ones.
"""

import math
from collections.abc import Iterator

from w2v2.plan.budget import CITATION, LEAST_SECONDS, study_rows
from w2v2.train.collapse import MOST_RATE
from w2v2.train.recipes import MOST_EPOCHS, judge_epochs
from w2v2.train.schedule import PEAK_RATES, num_warmup_steps

Found = tuple[str, str, str]  # code, what was found, and what to do; "" where a note is all

LEAST_HOURS, CONTINUED_HOURS, LEAST_SMALL_HOURS = 1.6, 0.8, 0.004  # in an effective batch
# Shares of a run: the paper warms up for 8 %, SpeechBrain advises 10 %, configs/pretrain/small.yaml and demo.yaml take 7 and
# 14 %. 32,000 updates are enough for a run of any length (XLS-R's of a million).
WARMUP_SHARES = {"small": (0.005, 0.2), "BASE": (0.05, 0.15), "LARGE": (0.05, 0.15)}
ENOUGH_WARMUP = 32_000
SHORTEST_WARMUP = 10  # updates that would be usual: a run that is too short for them is a trial
LONGEST_CROP = 20.0  # seconds


def check_recipe(run) -> Iterator[Found]:
    yield from check_batch(run)
    if (per_epoch := run.plan["updates_per_epoch"]) < 1:
        found = f"an effective batch is {1 / per_epoch:,.1f} times the data: it holds utterances more than once"
        yield "batch_exceeds_epoch", found, "lower --batch_hours, or give more audio"
    yield from check_rate(run)
    yield from check_warmup(run)
    if (seconds := run.args.crop_seconds) > LONGEST_CROP:
        found = f"crop_seconds is {seconds:g}: beyond {LONGEST_CROP:g} s memory grows and nothing is gained"
        yield "long_crops", found, f"set --crop_seconds to {LONGEST_CROP:g} at most; 10 may do as well (SpeechBrain)"
    yield from check_epochs(run)


def check_batch(run) -> Iterator[Found]:
    """A small model gets a note: its batch is small by BASE's measure, which does not hold for it."""
    hours, usual = run.plan["batch_hours"], run.recipe
    code = "small_effective_batch"
    found = f"an effective batch holds {hours:.3g} h of speech (--batch_hours {run.args.batch_hours:g})"
    if usual.name == "small" and LEAST_SMALL_HOURS <= hours < LEAST_HOURS:
        judged = f"hidden_size {run.config.hidden_size}: judged by configs/pretrain/small.yaml (0.018 h), not by BASE's"
        yield code, f"{found}, enough for a small model ({judged}); BASE and larger ones need {LEAST_HOURS:g} h", ""
        return
    if usual.name == "small":
        least, why = usual.batch_hours, f"the small model of configs/pretrain learns with {usual.batch_hours:g}"
    elif run.is_continued:
        least, why = CONTINUED_HOURS, "runs that went on from weights took 0.83 (San et al. 2024, arXiv 2402.02302)"
    else:
        least, why = LEAST_HOURS, f"BASE was trained with {LEAST_HOURS:g}, and {describe_study(hours)}"
    remedy = f"raise --batch_hours to {least:g} (more micro-batches an update, no more memory)"
    if 3600 * hours >= LEAST_SECONDS / 1.05:
        remedy += ", or give more updates: word error rates follow the hours heard"
    elif least == LEAST_HOURS:
        remedy += ", or train a smaller model (configs/pretrain/small.yaml): more updates do not make up for it"
    if hours < least:
        yield code, f"{found}: {why}", remedy


def describe_study(batch_hours: float) -> str:
    """What the study of batch sizes found for about this one, after 400,000 updates."""
    rows = [row for row in study_rows() if row.updates == 400_000]
    nearest = min(rows, key=lambda row: abs(math.log(row.seconds / 3600 / batch_hours)))
    best = max(rows, key=lambda row: row.seconds)
    if 3600 * batch_hours < LEAST_SECONDS / 1.05:
        return f"the study found that BASE hardly learns with less than {LEAST_SECONDS} s ({CITATION})"
    gave = f"{nearest.seconds:g} s gave it a word error rate of {nearest.test_clean:.1f} % on test-clean and {nearest.test_other:.1f} % on test-other"
    more = f" where {best.seconds:g} s gave {best.test_clean:.1f} and {best.test_other:.1f}" if nearest != best else ""
    return f"in 400,000 updates {gave}{more} ({CITATION})"


def check_rate(run) -> Iterator[Found]:
    rate, usual, heard = run.args.learning_rate, run.recipe, 3600 * run.plan["batch_hours"]
    seconds, peak = PEAK_RATES[0]
    if rate <= MOST_RATE * usual.learning_rate:
        return
    said = f"--learning_rate is {rate:g} with batches of {heard:,.0f} s, and codes collapse when it is too high"
    if usual.name != "small" and heard < seconds / 1.05:
        said += f": the study's smallest batch, {seconds:g} s, had {peak:g} ({CITATION})"
        remedy = f"raise --batch_hours, or set --learning_rate {peak:g} at most"
    else:
        said += f": {usual.learning_rate:g} is usual for {usual.name.replace('small', 'a small model')}"
        remedy = f"set --learning_rate {usual.learning_rate:g}, or raise --batch_hours"
    yield "learning_rate_for_batch", said, remedy


def check_warmup(run) -> Iterator[Found]:
    """Below: the first updates, whose moments are of few gradients, are as large as the peak's. Above: a run that climbs
    for most of its time learns at its full rate only briefly.
    """
    steps, usual = run.args.max_steps, run.recipe
    updates = num_warmup_steps(run.args.warmup_steps, steps)
    least, most = WARMUP_SHARES[usual.name]
    is_short, is_long = updates < min(least * steps, ENOUGH_WARMUP), updates > most * steps
    said = f"warmup_steps {run.args.warmup_steps:g}"
    if updates >= steps:
        found = f"{said} of max_steps {steps}: the learning rate never reaches its peak"
        remedy = "set --warmup_steps to a fraction such as 0.08, which follows the run's length"
        yield "warmup_exceeds_run", found, remedy
    elif not run.is_continued and usual.warmup_steps >= SHORTEST_WARMUP and (is_short or is_long):
        early = "the rate is high while gradients are still large and noisy"
        bad = early if is_short else "little of the run is left at its peak"
        advice = "0.015 to 0.1" if usual.name == "small" else "0.08 (the paper) to 0.1 (SpeechBrain)"
        found = f"{said} is {updates / steps:.1%} of the run, where {least:.1%} to {most:.0%} is usual: {bad}"
        yield "warmup_share", found, f"set --warmup_steps to a fraction of the run, {advice}"


def check_epochs(run) -> Iterator[Found]:
    args, epochs = run.args, run.plan["epochs"]
    if not (found := judge_epochs(epochs, run.plan["updates_per_epoch"] * run.plan["batch_hours"])):
        return
    most = int(args.max_steps * MOST_EPOCHS / epochs)
    shorter = f"lower --max_steps to {most}" if most else "lower --batch_hours"
    if most and args.warmup_steps >= 1 and args.warmup_steps > WARMUP_SHARES[run.recipe.name][1] * most:
        shorter += f" with --warmup_steps 0.08 (a warm-up of {args.warmup_steps:,.0f} updates would not fit)"
    remedy = f"give more audio, {shorter}, or start from trained weights (configs/pretrain/continue_language.yaml)"
    yield "many_epochs", found, remedy
