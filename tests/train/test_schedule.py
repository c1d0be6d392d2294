"""Schedules against their closed forms and the schedulers of `transformers`."""

import math

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from w2v2.train.schedule import SCHEDULES, gumbel_temperature, lr_factor, num_warmup_steps

TOTAL, WARMUP = 1_000, 80


def stock_factors(make):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = make(optimizer, WARMUP, TOTAL)
    factors = []
    for _ in range(TOTAL + 1):
        factors.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return factors


@pytest.mark.parametrize("kind", SCHEDULES)
def test_warmup_rises_linearly_to_the_peak(kind):
    factors = [lr_factor(step, TOTAL, WARMUP, kind) for step in range(WARMUP)]
    assert factors == pytest.approx([(step + 1) / WARMUP for step in range(WARMUP)])
    assert lr_factor(WARMUP, TOTAL, WARMUP, kind) == 1.0


@pytest.mark.parametrize(
    "kind, make", [("linear", get_linear_schedule_with_warmup), ("cosine", get_cosine_schedule_with_warmup)]
)
def test_decay_after_warmup_is_that_of_transformers(kind, make):
    steps = range(WARMUP, TOTAL + 1)
    assert [lr_factor(s, TOTAL, WARMUP, kind) for s in steps] == pytest.approx(stock_factors(make)[WARMUP:], abs=1e-12)


@pytest.mark.parametrize("kind, end", [("linear", 0.0), ("cosine", 0.0), ("constant", 1.0), ("tri_stage", 0.05)])
def test_the_end_and_beyond_stay_at_the_final_value(kind, end):
    for step in (TOTAL, TOTAL + 1, 3 * TOTAL):
        assert lr_factor(step, TOTAL, WARMUP, kind) == pytest.approx(end, abs=1e-12)


def test_tri_stage_holds_then_decays_exponentially():
    """fairseq: exp(−decay_factor · steps in the stage), decay_factor = −log(final scale) / decay steps."""
    factors = [lr_factor(step, TOTAL, 0.1, "tri_stage", hold=0.4, final_scale=0.05) for step in range(TOTAL + 1)]
    assert factors[:100] == pytest.approx([(step + 1) / 100 for step in range(100)])
    assert set(factors[100:500]) == {1.0}
    rate = -math.log(0.05) / 500
    assert factors[500:] == pytest.approx([math.exp(-rate * k) for k in range(501)])


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("total, warmup", [(1, 0), (1, 5), (10, 0), (10, 10), (10, 25), (7, 0.99), (50, 0.1)])
def test_factors_never_rise_after_warmup(kind, total, warmup):
    factors = [lr_factor(step, total, warmup, kind) for step in range(total + 2)]
    assert all(0.0 <= factor <= 1.0 for factor in factors) and factors[0] > 0.0
    after = factors[num_warmup_steps(warmup, total) :]
    assert after == sorted(after, reverse=True)


@pytest.mark.parametrize(
    "warmup, total, steps", [(0, 100, 0), (0.1, 400, 40), (0.29, 100, 29), (0.5, 7, 4), (1, 100, 1), (32_000.0, 400_000, 32_000)]
)  # fmt: skip
def test_warmup_is_a_fraction_of_the_run_when_under_one(warmup, total, steps):
    assert num_warmup_steps(warmup, total) == steps


def test_gumbel_temperature_decays_geometrically_to_its_floor():
    values = [gumbel_temperature(step, 2.0, 0.5, 0.999) for step in range(3_000)]
    exact = [2.0]
    while len(exact) < 3_000:
        exact.append(exact[-1] * 0.999)
    assert values == pytest.approx([max(0.5, value) for value in exact])
    assert values[0] == 2.0 and values[-1] == 0.5
