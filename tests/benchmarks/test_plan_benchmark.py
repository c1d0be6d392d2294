"""`benchmarks/plan.py`: the rivals are what they are said to be, and the figures are those of a sum done by hand."""

import json
import subprocess
import sys

import numpy as np
import pytest
from common import ROOT, speech_lengths
from ways_to_batch import (
    effective_batches,
    fixed_counts,
    measure,
    measure_size,
    packed_size,
    padded_size,
    quantile_buckets,
)

from w2v2.data.batching import EffectiveBatches, PieceSize

SECOND = 16_000
BATCH, BUDGET = 3600 * SECOND // 5, 100 * SECOND
# Each length once, so that a length stands for its utterance.
LENGTHS = np.random.default_rng(0).permutation(np.arange(2 * SECOND, 12 * SECOND, 40, dtype=np.int32))


def steps_of(way, ranks):
    if way == "ours":
        recipe = dict(batch_samples=BATCH, crop_samples=20 * SECOND, grid_samples=0, seed=0)
        return effective_batches(EffectiveBatches(LENGTHS, **recipe), ranks, BUDGET, 4)
    if way == "buckets":
        return quantile_buckets(LENGTHS, ranks, BUDGET, BATCH)
    return fixed_counts(LENGTHS, ranks, BUDGET, BATCH, grouped=way == "grouped")


@pytest.mark.parametrize("num_ranks", [1, 4])
@pytest.mark.parametrize("way", ["ours", "random", "grouped", "buckets"])
def test_every_way_keeps_the_budget_and_repeats_nothing(way, num_ranks):
    steps, cost = list(steps_of(way, num_ranks)), packed_size if way == "ours" else padded_size
    assert len(steps) >= 4
    heard = np.concatenate([rows for step in steps for rows in step if rows[0] > 0])
    assert np.isin(heard, LENGTHS).all() and len(np.unique(heard)) == len(heard)
    for step in steps:
        assert len(step) % num_ranks == 0
        assert all(cost(rows) <= BUDGET for rows in step)
    hours = np.mean([sum(int(rows.sum()) for rows in step) for step in steps])
    assert hours == pytest.approx(BATCH, rel=0.12)


def test_the_figures_are_those_of_a_sum_by_hand():
    """Two ranks, two updates; the second has one round that ends in a dummy of 1 s."""
    seconds = [[[4, 2], [6], [3], [5]], [[8, 8], [-1]]]
    found = measure(iter([[np.array(rows) * SECOND for rows in step] for step in seconds]), 2)
    assert found["padded_fraction"] == pytest.approx(1 - (20 + 16) / (22 + 16))
    assert found["rank_imbalance"] == pytest.approx(np.mean([0, 1 - 8.5 / 16]))  # ranks 8 + 3 and 6 + 5, then 16 and 1
    assert found["round_imbalance"] == pytest.approx(np.mean([np.mean([1 - 7 / 8, 1 - 4 / 5]), 1 - 8.5 / 16]))
    assert found["idle_or_padding"] == pytest.approx(np.mean([1 - 20 / 22, 1 - 16 / 32]))
    assert found["hours_spread"] == pytest.approx(4 / 3600) and found["batch_hours"] == pytest.approx(18 / 3600)
    everything = np.array([4, 2, 6, 3, 5, 8, 8])
    assert found["alikeness"] == pytest.approx(np.var([4, 8]) / (everything.var() * np.mean([1 / 5, 1 / 2])))


def test_the_figures_of_one_size_are_those_of_a_sum_by_hand():
    """Two ranks, two updates of one round; slots 150 and 101, then 90 and a dummy of 50. The size holds 128, in 2 rows."""
    seconds = [[[2, 1], [2, 0.001]], [[1.8], [-1]]]
    steps = [[np.array(rows) * SECOND for rows in step] for step in seconds]
    found = measure_size(iter([[rows.astype(int) for rows in step] for step in steps]), 2, PieceSize(128, 2))
    assert (found["micro_batches"], found["seconds"], found["rows"]) == (1, 2.56, 2)
    assert found["filler_fraction"] == pytest.approx(1 - (5.001 + 1.8) / (4 * 2.56))
    assert found["idle_fraction"] == pytest.approx(np.mean([1 - 125.5 / 150, 1 - 70 / 90]))
    assert found["larger_fraction"] == 0.5


def test_the_lengths_are_like_librispeechs():
    assert speech_lengths(281_241).sum() / SECOND / 3600 == pytest.approx(960.9, rel=0.002)


def test_the_last_line_is_json():
    command = [sys.executable, "benchmarks/plan.py", "--scales", "3000", "20000", "--trials", "1", "--updates", "2"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    keys = "machine versions command date seconds_3000 cropped_fraction cropped_fraction_from_paper padded_fraction"
    keys += " rank_imbalance rank_imbalance_64 alikeness hours_spread bytes_per_utterance"
    assert {*keys.split()} <= found.keys()
    spreads = "first_update identity make_plan cursor_ms cursor_ms_worst update_ms_1 update_ms_8 update_ms_64".split()
    assert found["scales"].keys() == {"3000", "20000"}
    for scale in found["scales"].values():
        assert scale.keys() == {*spreads, "peak_bytes", "steady_bytes", "arrays_bytes"}
        assert all(scale[name].keys() == {"median", "min", "max"} for name in spreads)
        assert scale["arrays_bytes"] == 4
    ways = ("ours", "random padding", "length grouping", "quantile buckets")
    assert found["ways"].keys() == {f"{way}, {ranks} ranks" for way in ways for ranks in (1, 8, 64)}
    assert found["sizes"].keys() >= {"1 ranks, 800 s", "64 ranks, 100 s"}
    assert all(0 < size["filler_fraction"] < 1 for size in found["sizes"].values())


def test_the_start_with_many_rows_is_measured():
    command = [sys.executable, "benchmarks/plan.py", "--rows", "70000", "--format", "csv", "--trials", "1"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert {"machine", "versions", "command", "date", "read", "first_plan", "identity", "make_plan"} <= found.keys()
    assert 69_900 < found["rows"]["median"] <= 70_000  # a few are shorter than a second
    assert all(found[f"private_{when}"]["median"] <= found[f"resident_{when}"]["median"] for when in ("peak", "after"))
