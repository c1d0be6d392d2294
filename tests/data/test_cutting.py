"""The cut of an effective batch into pieces, and their deal to the ranks: even, within budget, against brute force."""

import itertools
import math

import numpy as np
import pytest
from test_batching import SECOND, START, make_batches, plans_of, rows

from w2v2.data import cutting
from w2v2.data.batching import SLOT_STEP, Crops, Cursor, count_slots, cut, find_size, plan_update, plan_validation
from w2v2.data.cutting import deal, exchange, pack


def random_sizes(seed, n=None):
    """In a shape of its own for each seed, largest first."""
    rng = np.random.default_rng(seed)
    n = n or int(rng.choice([3, 40, 300]))
    sizes = [rng.integers(50, 1_000, n), rng.integers(4, 50, n) * 16 + 1, rng.geometric(0.01, n), np.full(n, 769)]
    return np.sort(sizes[seed % 4])[::-1].copy()


def draw_slots(batches, num_updates):
    """Of each update, largest first."""
    cursor = START
    for _ in range(num_updates):
        crops, cursor = batches.draw(cursor)
        yield np.sort(count_slots(crops.num_samples))[::-1]


def speech():
    return make_batches(n=3_000, batch_seconds=1.6 * 3600, crop_seconds=15.38)


# -- pieces


@pytest.mark.parametrize("seed", range(24))
def test_tiny_sets_are_packed_within_grahams_bound(seed):
    """Against the best of all ways to share them out; the bound is that of longest processing time first."""
    sizes, P = random_sizes(seed, n=7), 2 + seed % 2
    best = min(np.bincount(piece, sizes, P).max() for piece in itertools.product(range(P), repeat=7))
    table, load = pack(sizes, P)
    assert sorted(table[table < 7].tolist()) == list(range(7))
    assert load.tolist() == np.append(sizes, 0)[table].sum(1).tolist()
    assert load.max() <= (4 / 3 - 1 / (3 * P)) * best


@pytest.mark.parametrize("seed", range(24))
def test_pieces_hold_every_utterance_once_within_budget(seed):
    rng, sizes = np.random.default_rng(seed), random_sizes(seed)
    budget, num_ranks = int(sizes[0] * rng.uniform(1, 12)), int(rng.choice([1, 2, 8, 64]))
    rounds, pieces = cut(sizes, num_ranks, budget)
    assert sorted(np.concatenate(pieces).tolist()) == list(range(len(sizes)))
    assert all((np.diff(piece) > 0).all() for piece in pieces), "longest first"
    sums = [int(sizes[piece].sum()) for piece in pieces]
    assert sums == sorted(sums, reverse=True) and sums[0] <= budget and sums[-1] > 0
    assert num_ranks * (rounds - 1) < len(pieces) <= num_ranks * rounds
    if rounds > 1:  # one round fewer holds too little, or `pack` does not get them in
        fewer = num_ranks * (rounds - 1)
        assert sizes.sum() > fewer * budget or pack(sizes, fewer)[1].max() > budget


def test_few_utterances_are_a_piece_each_and_a_giant_stands_alone():
    assert [piece.tolist() for piece in cut(np.array([9, 5, 5]), 4, 10)[1]] == [[0], [1], [2]]
    rounds, pieces = cut(np.array([90, 3, 2]), 1, 10)
    assert rounds == 2 and [piece.tolist() for piece in pieces] == [[0], [1, 2]]


def test_pieces_with_giants_get_none_of_the_short():
    """Ten giants for eight pieces: two pieces have two each, and the others share the rest."""
    _, load = pack(np.array([700] * 10 + [5] * 400), 8)
    assert sorted(load.tolist()) == [1030] * 2 + [1035] * 4 + [1400] * 2


@pytest.mark.parametrize("seed", range(24))
def test_exchanges_lose_nothing_and_lower_the_fullest(seed):
    """From pieces that were filled in turn; what they bring is near the mean where there is a choice."""
    sizes, P = random_sizes(seed, n=120), 2 + seed % 9
    width = -(-120 // P) + 1
    table = np.full((P, width), 120)
    table[np.arange(120) % P, np.arange(120) // P] = np.arange(120)
    before = np.append(sizes, 0)[table].sum(1)
    load = exchange(table, np.append(sizes, 0))
    assert sorted(table[table < 120].tolist()) == list(range(120))
    assert load.tolist() == np.append(sizes, 0)[table].sum(1).tolist() and load.sum() == sizes.sum()
    assert load.max() <= before.max() and np.ptp(load) <= np.ptp(before)
    assert load.max() - load.mean() < max(0.01 * load.mean(), sizes[0] if seed % 4 == 3 else 0)


@pytest.mark.parametrize("num_ranks, seconds, most", [(1, 200, 29), (8, 200, 4), (64, 100, 1), (64, 200, 1)])
def test_pieces_are_even_at_1_6_hours(num_ranks, seconds, most):
    for slots in draw_slots(speech(), 4):
        rounds, pieces = cut(slots, num_ranks, seconds * 50)
        sums = np.array([slots[piece].sum() for piece in pieces])
        assert rounds == most and len(sums) == rounds * num_ranks
        assert 1 - sums.mean() / sums.max() < 0.005


@pytest.mark.parametrize("seconds", [16, 200])
def test_a_hundred_thousand_are_packed_a_few_times(monkeypatch, seconds):
    tried = []
    monkeypatch.setattr(cutting, "pack", lambda *given: (tried.append(0), pack(*given))[1])
    sizes = np.sort(count_slots(np.arange(100_000) * 2 + 2 * SECOND))[::-1]
    for num_ranks in (1, 64):
        rounds, pieces = cut(sizes, num_ranks, seconds * 50)
        assert sum(map(len, pieces)) == 100_000
        assert rounds <= 1.01 * math.ceil(sizes.sum() / (num_ranks * seconds * 50))
    assert len(tried) < 30


# -- ranks


@pytest.mark.parametrize("num_ranks, rounds", [(1, 5), (2, 1), (3, 4), (8, 4), (64, 2)])
def test_every_piece_is_dealt_once_round_by_round(num_ranks, rounds):
    dealt = np.array([deal(rounds, num_ranks, rank) for rank in range(num_ranks)])  # (ranks, m)
    assert (np.sort(dealt, axis=0).T.ravel() == np.arange(num_ranks * rounds)).all()
    if rounds % 2 == 0:  # pieces that shrink evenly are dealt evenly
        assert len(set(dealt.sum(1).tolist())) == 1


def test_64_ranks_are_idle_for_less_than_1_percent():
    ranks, idle = plans_of(speech(), range(4), 64, budget=200 * SECOND), []
    for update in range(4):
        load = [sum(p.crops.num_samples.sum() for p in plans if p.update == update) for plans in ranks]
        idle.append(1 - np.mean(load) / max(load))
    assert np.mean(idle) < 0.01


@pytest.mark.parametrize("num_ranks", [1, 2, 8])
def test_the_budget_is_kept_to_the_slot(num_ranks):
    rng = np.random.default_rng(4)
    for _ in range(40):
        lengths = rng.integers(2 * SECOND, 16 * SECOND, rng.integers(1, 80))
        budget = int(rng.integers(lengths.max(), 60 * SECOND))
        crops = Crops(np.arange(len(lengths)), np.zeros_like(lengths), np.zeros_like(lengths), lengths)
        for rank in range(num_ranks):
            for plan in plan_update(crops, 0, START, rank=rank, num_ranks=num_ranks, micro_batch_samples=budget):
                assert sum(-(-n // 320) for n in plan.crops.num_samples.tolist()) <= -(-budget // 320)


def test_the_order_of_the_draw_plays_no_part():
    crops, cursor = make_batches(n=200, batch_seconds=900).draw(START)
    mixed = crops.take(np.random.default_rng(0).permutation(len(crops.utterance)))
    cut_arguments = dict(rank=1, num_ranks=3, micro_batch_samples=40 * SECOND)
    plans, others = (plan_update(one, 0, cursor, **cut_arguments) for one in (crops, mixed))
    for plan, other in zip(plans, others, strict=True):
        assert rows(plan.crops) == rows(other.crops) and (plan.piece, plan.dummy) == (other.piece, other.dummy)
        assert (np.diff(plan.crops.num_samples) <= 0).all()


# -- one size for a run


@pytest.mark.parametrize("num_ranks, seconds", [(1, 800), (8, 200), (64, 100)])
def test_nearly_all_updates_fit_the_size_and_fill_it(num_ranks, seconds):
    batches = make_batches(n=5_000, batch_seconds=1.6 * 3600, crop_seconds=15.38)
    size, larger, heard = find_size(batches, num_ranks, seconds * SECOND), 0, []
    assert size.slots % SLOT_STEP == 0 and size.slots <= -(-seconds * 50 // SLOT_STEP) * SLOT_STEP
    for slots in draw_slots(batches, 100):
        _, pieces = cut(slots, num_ranks, seconds * 50)
        larger += max(slots[piece].sum() for piece in pieces) > size.slots or max(map(len, pieces)) > size.rows
        heard.append(slots.sum() / len(pieces))
    assert larger <= 4 and 1 - np.mean(heard) / size.slots < 0.01
    assert size == find_size(batches, num_ranks, seconds * SECOND)


def test_the_size_of_one_update_is_its_own():
    """Of three utterances, all of them in each update: 769, 401 and 101 slots."""
    batches = make_batches(lengths=[769 * 320, 401 * 320, 101 * 320], batch_seconds=25.4, crop_seconds=20, grid=0)
    assert find_size(batches, 1, 20 * SECOND) == (832, 2)
    assert find_size(batches, 1, 30 * SECOND) == (1_280, 3)
    assert find_size(batches, 8, 20 * SECOND) == (832, 1)
    plans = plan_validation(batches, rank=0, num_ranks=1, micro_batch_samples=20 * SECOND)
    assert [plan.crops.num_samples.tolist() for plan in plans] == [[769 * 320], [401 * 320, 101 * 320]]
    assert plans[0].following == Cursor()
