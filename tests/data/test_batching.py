"""Order, draw, crop and cut: nothing lost, nothing twice, the same for every number of ranks and workers."""

import itertools
import math

import numpy as np
import pytest
import torch

from w2v2.data.batching import (
    Cursor,
    EffectiveBatches,
    EpochOrder,
    PlanStream,
    crop_length,
    plan_update,
    plan_validation,
)
from w2v2.data.hashing import ORDER, derive
from w2v2.data.masking import latent_lengths
from w2v2.errors import UserError

SECOND = 16_000
GRID = 5_120  # 0.32 s
START = Cursor()


def speech_lengths(n, seed=0):
    """Like LibriSpeech: most between 11 and 17 s, a tail of short ones, none under 2 s."""
    rng = np.random.default_rng(seed)
    long = rng.normal(14, 1.5, n)
    short = rng.uniform(2, 13, n)
    return (np.where(rng.random(n) < 0.7, long, short).clip(2, 35) * SECOND).astype(np.int64)


def make_batches(n=60, seed=0, batch_seconds=100, crop_seconds=10.0, grid=GRID, lengths=None):
    lengths = speech_lengths(n, seed) if lengths is None else np.asarray(lengths)
    return EffectiveBatches(lengths, batch_samples=round(batch_seconds * SECOND), crop_samples=round(crop_seconds * SECOND),
                            grid_samples=grid, seed=seed)  # fmt: skip


def plans_of(batches, updates, num_ranks, cursor=START, budget=30 * SECOND):
    """For each rank, its plans of `updates`."""
    cut_arguments = dict(num_ranks=num_ranks, micro_batch_samples=budget)
    return [list(PlanStream(batches, cursor, updates, rank=rank, **cut_arguments)) for rank in range(num_ranks)]


def rows(crops):
    """A multiset of (utterance, passage, start, samples), comparable."""
    return sorted(zip(*(column.tolist() for column in crops), strict=True))


def heard(plans):
    return sorted(row for plan in plans if not plan.dummy for row in rows(plan.crops))


# -- order


def test_order_of_any_small_n_is_a_permutation():
    for n in range(1, 260):
        for epoch in (0, 5):
            assert sorted(EpochOrder(n, seed=n)(epoch, torch.arange(n))[0].tolist()) == list(range(n))


@pytest.mark.parametrize("n", [1023, 1024, 1025, 2500, 4096, 4097, 20_001])
def test_each_epoch_and_seed_has_another_permutation(n):
    orders = [EpochOrder(n, seed)(epoch, torch.arange(n))[0] for seed, epoch in [(0, 0), (0, 1), (0, 7), (1, 0)]]
    for order in orders:
        assert np.array_equal(np.sort(order), np.arange(n))
    for a, b in itertools.combinations([*orders, np.arange(n)], 2):
        assert (a == b).sum() < 12  # two random permutations agree in about one place


@pytest.mark.parametrize("n", [1, 2, 777, 1025, 100_000_000])
def test_the_order_is_a_feistel_network_of_hashes(n):
    """One position at a time. Runs that are under way rely on these very orders."""
    bits = max(1, math.ceil(math.log2(max(n, 2)) / 2))
    for seed, epoch in ((0, 0), (7, 3)):
        keys = [derive(seed, ORDER, epoch, number) for number in range(6)]
        positions, expected = [place * n // 40 for place in range(40)], []
        for x in positions:
            while True:
                left, right = x >> bits, x % 2**bits
                for key in keys:
                    left, right = right, left ^ (int(derive(key, right)) >> 1) % 2**bits
                x = left * 2**bits + right
                if x < n:
                    break
            expected.append(x)
        utterance, passage = EpochOrder(n, seed)(epoch, torch.tensor(positions))
        assert utterance.tolist() == expected and set(passage.tolist()) == {epoch}


# -- crops


def test_crop_lengths_are_the_longest_on_the_grid():
    rng = np.random.default_rng(0)
    lengths = np.concatenate([np.arange(1, 12_000, 13), rng.integers(1, 40 * SECOND, 3_000)])
    for crop in (3 * SECOND, 250_000):
        cropped = crop_length(lengths, crop, GRID)
        longest = np.minimum(lengths, crop)
        assert (cropped <= longest).all() and (cropped > longest - GRID).all()
        on_grid = longest >= 320 + GRID
        assert ((cropped[on_grid] - 320) % GRID == 0).all()
        assert (cropped[~on_grid] == longest[~on_grid]).all()
        assert np.array_equal(crop_length(lengths, crop, 0), longest)
    frames = latent_lengths(torch.from_numpy(cropped[on_grid]), (10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2))
    assert (frames % 16 == 0).all()


def test_crops_reach_both_ends_of_an_utterance():
    batches = make_batches(n=400)
    fractions = []
    for epoch in range(5):
        crops = batches.crops(np.arange(400), passage=epoch)
        spare = batches.num_samples - crops.num_samples
        assert (crops.start >= 0).all() and (crops.start <= spare).all()
        fractions.append(crops.start[spare > 1000] / spare[spare > 1000])
    fractions = np.concatenate(fractions)
    assert fractions.min() < 0.01 and fractions.max() > 0.99
    assert abs(fractions.mean() - 0.5) < 5 * (1 / 12 / len(fractions)) ** 0.5


def test_a_crop_depends_on_seed_passage_and_utterance_alone():
    batches = make_batches(n=50)
    whole = batches.crops(np.arange(50), passage=3)
    some = np.array([41, 7, 7, 0])
    assert all(np.array_equal(a, b[some]) for a, b in zip(batches.crops(some, passage=3), whole, strict=True))
    mixed = batches.crops(some, passage=np.array([3, 3, 4, 5]))  # as a repeated utterance has
    assert mixed.start[:2].tolist() == whole.start[some[:2]].tolist() and mixed.start[1] != mixed.start[2]
    other_seed = make_batches(n=50, lengths=batches.num_samples, seed=1)
    for other in (batches.crops(np.arange(50), passage=4), other_seed.crops(np.arange(50), 3)):
        assert np.array_equal(other.num_samples, whole.num_samples)  # hours a batch do not depend on the epoch
        assert (other.start != whole.start).mean() > 0.9


# -- draw


@pytest.mark.parametrize("n, batch_seconds", [(60, 100), (60, 11), (3, 100), (1, 35), (500, 300)])
def test_a_draw_is_the_order_until_the_batch_is_full(n, batch_seconds):
    """Against one utterance at a time; batches larger than an epoch too."""
    batches = make_batches(n=n, batch_seconds=batch_seconds)

    def one_by_one():
        for epoch in itertools.count():
            for utterance in batches.order(epoch, torch.arange(n))[0].tolist():
                yield rows(batches.crops(np.array([utterance]), epoch))[0]

    utterances, cursor = one_by_one(), START
    for _ in range(12):
        expected = []
        while sum(row[3] for row in expected) < batches.batch_samples:
            expected.append(next(utterances))
        crops, cursor = batches.draw(cursor)
        assert list(zip(*(column.tolist() for column in crops), strict=True)) == expected
        assert 0 <= cursor.position < n


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_an_epoch_hears_every_utterance_exactly_once(num_ranks):
    n = 43
    batches = make_batches(n=n)
    everything = [row for plans in plans_of(batches, range(15), num_ranks) for row in heard(plans)]
    last = max(row[1] for row in everything)
    assert last >= 3
    for epoch in range(last):  # the last one is unfinished
        assert sorted(row[0] for row in everything if row[1] == epoch) == list(range(n))


def test_the_batches_are_the_same_for_1_2_and_8_ranks():
    batches, cursor = make_batches(n=70), START
    for update in range(12):
        drawn, cursor = batches.draw(cursor)
        for num_ranks in (1, 2, 8):
            plans = [p for rank in range(num_ranks) for p in plan_update(
                drawn, update, cursor, rank=rank, num_ranks=num_ranks, micro_batch_samples=30 * SECOND)]  # fmt: skip
            assert heard(plans) == rows(drawn)  # nothing lost, nothing twice, no crop moved
            assert {p.batch_samples for p in plans} == {drawn.num_samples.sum()}
            assert {p.following for p in plans} == {cursor}


@pytest.mark.parametrize("num_ranks, resumed_ranks", [(1, 1), (2, 2), (1, 8), (8, 3)])
def test_resuming_gives_the_very_same_batches(num_ranks, resumed_ranks):
    batches = make_batches(n=40)
    straight = plans_of(batches, range(8), num_ranks)
    for done in (1, 2, 4, 5, 7):
        cursor = next(p.following for p in straight[0] if p.update == done - 1)
        resumed = plans_of(make_batches(n=40), range(done, 8), resumed_ranks, cursor)
        for update in range(done, 8):
            before, after = ([p for plans in run for p in plans if p.update == update] for run in (straight, resumed))
            assert heard(before) == heard(after) and before[0].following == after[0].following
            if num_ranks == resumed_ranks:
                sides = ([(rows(p.crops), p.piece, p.dummy) for p in plans] for plans in (before, after))
                assert next(sides) == next(sides)


# -- cut


@pytest.mark.parametrize("num_ranks", [1, 2, 8, 30])
def test_every_rank_runs_the_same_number_of_micro_batches(num_ranks):
    batches = make_batches(n=70)
    for update in range(0, 6, 2):
        ranks = plans_of(batches, range(update, update + 1), num_ranks, Cursor(0, 5 * update))
        assert {len(plans) for plans in ranks} == {p.num_rounds for plans in ranks for p in plans}
        pieces = sorted(p.piece for plans in ranks for p in plans)
        assert pieces == list(range(num_ranks * ranks[0][0].num_rounds)), "each number seeds noise of its own"


def test_dummies_are_single_rows_and_few():
    drawn, cursor = make_batches(n=70).draw(START)
    for num_ranks in (2, 7, 50):
        plans = [p for rank in range(num_ranks) for p in plan_update(
            drawn, 0, cursor, rank=rank, num_ranks=num_ranks, micro_batch_samples=30 * SECOND)]  # fmt: skip
        dummies = [p for p in plans if p.dummy]
        assert all(len(p.crops.utterance) == 1 and rows(p.crops)[0] in rows(drawn) for p in dummies)
        assert len(plans) - len(dummies) > num_ranks * (plans[0].num_rounds - 1), "no round of dummies alone"


# -- validation and slips


@pytest.mark.parametrize("num_ranks", [1, 2, 8])
def test_validation_hears_every_utterance_once(num_ranks):
    batches = make_batches(n=45)
    cut_arguments = dict(num_ranks=num_ranks, micro_batch_samples=30 * SECOND)
    ranks = [plan_validation(batches, rank=rank, **cut_arguments) for rank in range(num_ranks)]
    assert len({len(plans) for plans in ranks}) == 1
    assert sorted(row for plans in ranks for row in heard(plans)) == rows(batches.crops(np.arange(45), passage=0))


def test_a_batch_smaller_than_one_utterance_is_refused():
    with pytest.raises(UserError, match="--batch_hours 0.001 is smaller than one utterance"):
        make_batches(batch_seconds=3.6)
    lengths = [30 * SECOND, 40 * SECOND]
    longest = make_batches(lengths=lengths).longest  # one utterance, once it is cropped, may fill a batch
    assert longest <= 10 * SECOND
    drawn, _ = make_batches(lengths=lengths, batch_seconds=longest / SECOND).draw(START)
    assert len(drawn.utterance) == 1


def test_a_micro_batch_below_the_longest_crop_is_refused():
    batches = make_batches(lengths=[9 * SECOND] * 30)
    with pytest.raises(UserError, match=r"--micro_batch_seconds 4 is less than the longest crop \(8.98 s\)"):
        plan_validation(batches, rank=0, num_ranks=1, micro_batch_samples=4 * SECOND)
    batches.check_budget(batches.longest)
