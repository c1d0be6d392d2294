"""The budget against the study that it reads: its own rows left out, and the figures that the paper prints."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from w2v2.errors import UserError
from w2v2.plan.budget import (
    COVERED,
    describe_budget,
    expect_error_rates,
    find_misses,
    leave_out,
    propose_run,
    study_rows,
)
from w2v2.train.schedule import PEAK_RATES

BASE = SimpleNamespace(hidden_size=768, num_hidden_layers=12, do_stable_layer_norm=False)
SMALL = SimpleNamespace(hidden_size=144, num_hidden_layers=4, do_stable_layer_norm=False)


def flags(**changes):
    values = dict(batch_hours=1.6, max_steps=400_000, learning_rate=5e-4, warmup_steps=0.08, eval_steps=1)
    return SimpleNamespace(**values | dict(model_name_or_path=None) | changes)


def propose(device_hours, num_devices, speed, args, config, overshoot=0.0, least_hours=0.0, validation=0.0, epoch=1e9):
    """A proposal at `speed` hours heard in a device-hour; an update's validations cost `validation` device-hours."""
    plan = dict(num_processes=num_devices, batch_hours=args.batch_hours + overshoot)
    plan |= dict(micro_batch_seconds=3600 * least_hours / num_devices, updates_per_epoch=epoch / plan["batch_hours"])
    probe = dict(audio_seconds_per_second=speed * num_devices, validation_seconds=3600 * validation / num_devices)
    return SimpleNamespace(**propose_run(device_hours, plan | {"probe": probe}, args, config))


@pytest.mark.parametrize("what, num_rows, usual, worst", [("hours", 46, 1.02, 1.15), ("seconds", 43, 1.03, 1.15)])
def test_rows_left_out_are_nearly_predicted(what, num_rows, usual, worst):
    factors = find_misses(what)
    assert len(factors) == 2 * num_rows  # of 48: the others have nothing on one side
    assert np.median(factors) < usual and factors.max() < worst


def test_range_holds_nine_of_ten_left_out():
    factor, held = float(np.quantile(find_misses(), COVERED)), []
    for row, rates in leave_out("seconds"):
        ends = rates.widened(factor)
        held += [low <= rate <= high for rate, (low, high) in zip((row.test_clean, row.test_other), ends, strict=True)]
    assert np.mean(held) >= COVERED


@pytest.mark.parametrize(
    "hours, clean, other",
    [
        (4_170, 29.79, 57.52), (8_330, 22.98, 50.57), (16_700, 16.83, 40.63), (33_300, 10.94, 27.53),
        (66_700, 9.07, 23.06), (133_000, 7.31, 18.32), (267_000, 6.26, 15.10), (267_000, 6.27, 15.85),
    ],
)  # fmt: skip
def test_printed_table_lies_within(hours, clean, other):
    rates = expect_error_rates(hours)
    assert rates.test_clean[0] < clean < rates.test_clean[1]
    assert rates.test_other[0] < other < rates.test_other[1]


def test_between_two_rows_lies_their_geometric_mean():
    first, second = [row for row in study_rows() if row.seconds == 4_800][5:7]  # hours that no other batch reached
    rates = expect_error_rates(math.sqrt(first.hours * second.hours))
    assert math.sqrt(math.prod(rates.test_other)) == pytest.approx(math.sqrt(first.test_other * second.test_other))


@pytest.mark.parametrize("hours, end", [(2_000, "2,083 h"), (540_000, "533,333 h")])
def test_nothing_is_said_outside_of_the_rows(hours, end):
    assert expect_error_rates(hours) is None
    budget = describe_budget(hours, flags(), BASE)
    assert set(budget) == {"hours", "text"}
    assert end in budget["text"]


@pytest.mark.parametrize(
    "config, changes, said",
    [
        (SMALL, {}, "BASE alone"),
        (BASE, dict(model_name_or_path="x"), "fresh weights"),
        (BASE, dict(batch_hours=0.02), "hardly learns"),
    ],
)
def test_no_rates_for_runs_unlike_the_study(config, changes, said):
    budget = describe_budget(20_000, flags(**changes), config)
    assert "test_clean" not in budget
    assert said in budget["text"]


def test_few_large_updates_are_pointed_out():
    assert "never in 10,000" in describe_budget(16_000, flags(max_steps=10_000), BASE)["text"]
    assert "never in" not in describe_budget(16_000, flags(max_steps=60_000), BASE)["text"]


@pytest.mark.parametrize("hours", [2_500, 9_000, 26_880, 90_000, 376_320])
def test_proposal_spends_the_budget_as_the_study_did(hours):
    run = propose(24, 2, hours / 24, flags(), BASE)
    assert 0 <= hours - run.hours_heard <= run.batch_hours
    assert run.max_steps >= 50_000  # fewer the study has never tried
    near = [peak for seconds, peak in PEAK_RATES if seconds <= 3600 * run.batch_hours + 1]
    assert run.learning_rate == near[-1]
    assert run.warmup_steps == pytest.approx(0.08 * run.max_steps, abs=1)
    assert run.rates == expect_error_rates(hours)
    assert f"--max_steps {run.max_steps} " in run.text and "12.0 h by the clock" in run.text


def test_proposal_for_another_model_keeps_its_batch():
    args = flags(batch_hours=0.5, learning_rate=1e-3, max_steps=1_000, warmup_steps=250)
    run = propose(1, 1, 100, args, SMALL)
    assert (run.max_steps, run.batch_hours, run.learning_rate, run.rates) == (200, 0.5, 1e-3, None)
    assert run.warmup_steps == 50  # a quarter, as of the thousand
    assert "no study covers this run" in run.text


def test_each_device_has_a_micro_batch():
    """Smaller batches than were measured would be slower; the learning rate is that of the batch."""
    few, many = (propose(24, 8, 200, flags(), BASE, least_hours=least) for least in (0, 0.5))
    assert few.batch_hours < 0.5 == many.batch_hours and many.learning_rate > few.learning_rate
    assert many.hours_heard == pytest.approx(24 * 200, rel=0.01)


def test_validations_are_paid_for():
    run = propose(1, 1, 100, flags(batch_hours=0.5), SMALL, validation=0.005)
    assert (run.max_steps, run.hours_heard) == (100, 50) and "validations take 50% of the time" in run.text
    with pytest.raises(UserError, match="more than 0.01"):
        propose(0.009, 1, 100, flags(batch_hours=0.5), SMALL, validation=0.005)


def test_a_probe_that_heard_nothing_is_refused():
    with pytest.raises(UserError, match="none of the audio"):
        propose(1, 1, 0, flags(), BASE)


def test_budget_below_one_update_is_refused():
    said = r"--gpu_hours 0.0001 ends before the first update of 0.0417 h; give more than 0.00042"
    with pytest.raises(UserError, match=said):
        propose(0.0001, 1, 100, flags(), BASE)


def test_batches_that_hold_more_than_was_asked_for_are_fewer():
    run = propose(1, 1, 100, flags(batch_hours=0.5), SMALL, overshoot=0.125)
    assert (run.max_steps, run.batch_hours, run.hours_heard) == (160, 0.5, 100)


def test_a_proposal_of_too_many_passes_says_so():
    """A thousand times 0.01 h are a tenth of what is heard, and of the budget."""
    few, many = (propose(1, 1, 100, flags(), SMALL, epoch=hours) for hours in (0.1, 0.01))
    assert "passes" not in few.text
    assert "heard 9,920 times, where 1,000 passes are the limit" in many.text  # 62 updates of 1.6 h
    assert "give more speech, or a budget of 0.1 device-hours" in many.text
    assert many.max_steps == few.max_steps
