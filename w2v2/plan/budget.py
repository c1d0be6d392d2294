"""What hours of audio buy: word error rates of BASE by the hours that it heard, from a published study (study.json).

The study pretrained BASE on LibriSpeech with effective batches of 87.5 s to 80 min and fine-tuned it after every 50,000
updates on 100 h of labels. Nearly the same error rate followed from the same hours, whatever the batch. So each batch
size is a curve, read off between its rows (log hours, log rate). The answer is the range over these curves. It is
widened by how far such answers miss a batch size of the study whose own rows are left out. Batches of 87.5 s are no
curve: they needed a tenth of the next one's learning rate and did far worse at the same hours.

All of it is of BASE with fresh weights on read English. Of other models, and before and beyond its rows, the study says
nothing, and neither does this module.
"""

import functools
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from w2v2.errors import UserError
from w2v2.train.recipes import MOST_EPOCHS, Recipe, judge_epochs
from w2v2.train.schedule import num_warmup_steps

STUDY = Path(__file__).with_name("study.json")
CITATION = "arXiv 2402.13723: LibriSpeech, 100 h of labels, no language model"
LEAST_SECONDS = 150  # in an effective batch, from which on hours decide
FEWEST_UPDATES = 50_000  # of a row
PAPER_BATCH_HOURS = 1.6
COVERED = 0.9  # of the left-out rows lie within the range


class Row(NamedTuple):
    """One model of the study; its word error rates are in percent."""

    seconds: float  # in an effective batch
    updates: int
    test_clean: float
    test_other: float

    @property
    def hours(self) -> float:
        return self.seconds * self.updates / 3600


class Rates(NamedTuple):
    """Word error rates in percent: (least, greatest) to be expected."""

    test_clean: tuple[float, float]
    test_other: tuple[float, float]

    def widened(self, factor: float) -> "Rates":
        return Rates(*((low / factor, high * factor) for low, high in self))

    def __str__(self) -> str:
        return " and ".join(
            f"{low:.1f} to {high:.1f} % on {name}"
            for name, (low, high) in zip(("test-clean", "test-other"), self, strict=True)
        )


@functools.cache
def study_rows() -> tuple[Row, ...]:
    """The rows of the study that hours explain."""
    rows = (Row(*row) for row in json.loads(STUDY.read_text(encoding="utf-8"))["rows"])
    return tuple(row for row in rows if row.seconds >= LEAST_SECONDS)


def read_off(hours: float, rows: Sequence[Row]) -> dict[float, tuple[float, float]]:
    """Seconds in an effective batch → rates on test-clean and test-other, where that batch's rows enclose these hours."""
    curves, rates = defaultdict(list), {}
    for row in sorted(rows, key=lambda row: row.hours):
        curves[row.seconds].append(row)
    for seconds, curve in curves.items():
        heard = np.log([row.hours for row in curve])
        if heard[0] - 0.01 <= math.log(hours) <= heard[-1] + 0.01:  # within 1 % of its ends
            columns = ([row.test_clean for row in curve], [row.test_other for row in curve])
            rates[seconds] = tuple(math.exp(np.interp(math.log(hours), heard, np.log(column))) for column in columns)
    return rates


def span_rates(hours: float, rows: Sequence[Row]) -> Rates | None:
    """The range over the batch sizes; None where no batch's rows enclose these hours."""
    rates = read_off(hours, rows).values()
    return Rates(*((min(column), max(column)) for column in zip(*rates, strict=True))) if rates else None


def leave_out(what: str) -> list[tuple[Row, Rates]]:
    """Each row with its range from the rows of other `hours`, or from those of other batches (`seconds`), if enclosed."""
    rows, pairs = study_rows(), []
    for row in rows:
        others = [other for other in rows if not math.isclose(getattr(other, what), getattr(row, what))]
        pairs += [(row, rates)] if (rates := span_rates(row.hours, others)) else []
    return pairs


@functools.cache
def find_misses(what: str = "seconds") -> np.ndarray:
    """(2 · rows,) by what factor the middle of the range misses each left-out rate: 1 does not, 1.1 by 10 %."""
    ratios = [
        math.sqrt(low * high) / published
        for row, rates in leave_out(what)
        for published, (low, high) in zip((row.test_clean, row.test_other), rates, strict=True)
    ]
    return np.exp(np.abs(np.log(ratios)))


def expect_error_rates(hours_heard: float) -> Rates | None:
    """Word error rates of BASE after so many hours; None outside of the study's rows.

    They are as wide as the study's own rows are missed where their batch size is left out: what a new run may be off by.
    """
    rates = span_rates(hours_heard, study_rows())
    return rates and rates.widened(float(np.quantile(find_misses(), COVERED)))


def describe_certainty() -> str:
    misses = 100 * (find_misses() - 1)
    return f"predicted from the other batch sizes, the study's own word error rates are off by {median(misses):.0f} % in the median, {max(misses):.0f} % at worst"


def describe_hours(hours_heard: float) -> str:
    """What the study says of BASE after so many hours."""
    if rates := expect_error_rates(hours_heard):
        return f"{hours_heard:,.0f} h heard give BASE a word error rate of {rates} ({CITATION})"
    rows = sorted(study_rows(), key=lambda row: row.hours)
    is_early = hours_heard < rows[0].hours
    end, where = (rows[0], "begins after") if is_early else (rows[-1], "ends before")
    found = f"{end.test_clean:.1f} % on test-clean and {end.test_other:.1f} % on test-other"
    return f"the study {where} {hours_heard:,.0f} h: its {end.hours:,.0f} h gave BASE a word error rate of {found} ({CITATION})"


def why_unknown(args, config) -> str | None:
    """Why the study says nothing of a run, whatever it hears; None: it may."""
    what = "the study of word error rates by hours heard (arXiv 2402.13723)"
    if (config.hidden_size, config.num_hidden_layers) != (768, 12):
        return f"{what} is of BASE alone: it says nothing of this model"
    return f"{what} is of fresh weights: it says nothing of a run that continues" if args.model_name_or_path else None


def describe_budget(hours_heard: float, args, config) -> dict[str, Any]:
    """What the study says of a run, for plan.json: `hours`, `text`, and `test_clean`, `test_other` where it says any."""
    budget: dict[str, Any] = {"hours": hours_heard}
    if unknown := why_unknown(args, config):
        return budget | {"text": unknown}
    if 3600 * args.batch_hours < LEAST_SECONDS / 1.05:
        text = f"with batches under {LEAST_SECONDS} s BASE hardly learns: with 87.5 s, 9,722 h gave a word error rate of 44.7 % on test-clean"
        return budget | {"text": f"{text} and 70.4 % on test-other ({CITATION})"}
    text = describe_hours(hours_heard)
    if rates := expect_error_rates(hours_heard):
        budget |= {"test_clean": list(rates.test_clean), "test_other": list(rates.test_other)}
        if args.max_steps < FEWEST_UPDATES:
            text += f", heard in {FEWEST_UPDATES:,} updates or more (of {3600 * choose_batch(hours_heard):,.0f} s, say), never in {args.max_steps:,}"
        text += f"; {describe_certainty()}"
    return budget | {"text": text}


def choose_batch(hours_heard: float) -> float:
    """Hours in the effective batch that did best on test-other in the study after so many hours.

    Below its rows that is its smallest batch, beyond them the paper's.
    """
    if rates := read_off(hours_heard, study_rows()):
        return min(rates, key=lambda seconds: rates[seconds][1]) / 3600
    return LEAST_SECONDS / 3600 if hours_heard < min(row.hours for row in study_rows()) else PAPER_BATCH_HOURS


def propose_run(device_hours: float, plan: dict[str, Any], args, config) -> dict[str, Any]:
    """A run for so many device-hours in all, at the speed that the probe of `plan` found, for plan.json.

    Where the study speaks of the run, it chooses batch, learning rate and warm-up; elsewhere they stay as `args` has them,
    the warm-up as its share of the run. Raises `UserError` where the budget is less than one update.
    """
    probe, num_devices = plan["probe"], plan["num_processes"]
    speed = probe["audio_seconds_per_second"] / num_devices  # hours heard in a device-hour of updates
    if not speed:
        raise UserError("--gpu_hours: the probe could read none of the audio; mend the paths in --train_data")
    unknown, batch_hours = why_unknown(args, config), args.batch_hours
    if not unknown:  # smaller batches than fill a micro-batch on each device would be slower than was measured
        batch_hours = max(choose_batch(device_hours * speed), num_devices * plan["micro_batch_seconds"] / 3600)
    each = batch_hours + (plan["batch_hours"] - args.batch_hours)  # the last utterance of a batch is heard whole
    validation = num_devices * probe["validation_seconds"] / 3600 / args.eval_steps  # device-hours for each update
    share = validation * speed / each  # of the time of updates
    hours = device_hours * speed / (1 + share)
    max_steps = int(hours / each * (1 + 1e-9))
    if not max_steps:
        raise UserError(
            f"--gpu_hours {device_hours:g} ends before the first update of {batch_hours:.3g} h; give more than "
            f"{each / speed * (1 + share):.2g}"
        )
    recipe, heard = Recipe.of(config, batch_hours, max_steps), max_steps * each
    rate, warmup, rates = recipe.learning_rate, recipe.warmup_steps, expect_error_rates(hours)
    if unknown:
        warmup = round(num_warmup_steps(args.warmup_steps, args.max_steps) / args.max_steps * max_steps)
        rate, rates = args.learning_rate, None
    sure = f"how sure      {describe_certainty()}" if rates else "how sure      unknown: no study covers this run"
    if not unknown and hours < study_rows()[0].hours:
        sure += "; so few hours are for a smaller model, or for one that has learned already (--model_name_or_path)"
    lines = [
        f"budget        {device_hours:g} device-hours on {num_devices} device(s), {device_hours / num_devices:,.1f} h by the "
        f"clock; at {speed:,.0f} h of audio an hour on each, {hours:,.0f} h are heard"
        + (f", and validations take {share / (1 + share):.0%} of the time" if validation else ""),
        f"proposed      --max_steps {max_steps} --batch_hours {batch_hours:.4g} --learning_rate {rate:g} --warmup_steps {warmup}",
        f"expected      {unknown or describe_hours(hours)}",
        sure,
    ]
    epoch_hours = plan["updates_per_epoch"] * plan["batch_hours"]
    if found := judge_epochs(heard / epoch_hours, epoch_hours):
        most = f"{device_hours * MOST_EPOCHS * epoch_hours / heard:.2g}"
        lines.append(f"passes        {found}\n{'':14}give more speech, or a budget of {most} device-hours at most")
    flags = dict(max_steps=max_steps, batch_hours=batch_hours, learning_rate=rate, warmup_steps=warmup)
    return flags | {"hours_heard": heard, "rates": rates, "text": "\n".join(lines)}
