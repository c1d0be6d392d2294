"""Batching by seconds: nothing lost, nothing twice, effective batches that no device changes, equal numbers for the
ranks.
"""

import math

import numpy as np
import pytest

from w2v2.finetune.batching import UpdateSampler, cut_padded

SECOND = 16_000
LENGTHS = (np.random.default_rng(0).uniform(1, 20, 400) * SECOND).astype(int)


def sampler(lengths=LENGTHS, batch=200, micro=60, seed=3, **ranks):
    return UpdateSampler(lengths, batch * SECOND, micro * SECOND, seed, **ranks)


@pytest.mark.parametrize("num_ranks", [1, 2, 5])
def test_an_epoch_hears_every_utterance_once(num_ranks):
    heard = []
    for rank in range(num_ranks):
        for update in sampler(rank=rank, num_ranks=num_ranks):
            heard += [row for micro in update if not micro.is_dummy for row in micro.rows]
    assert sorted(heard) == list(range(len(LENGTHS)))


def test_every_update_has_about_the_seconds_asked_for():
    drawn = sampler()
    seconds = [LENGTHS[rows].sum() / SECOND for rows in drawn.updates(epoch=5)]
    assert len(seconds) == len(drawn) == round(LENGTHS.sum() / SECOND / 200)
    mean = LENGTHS.sum() / SECOND / len(drawn)
    assert mean == pytest.approx(200, rel=0.05)
    assert all(abs(one - mean) <= 20 for one in seconds)  # one utterance at either end


def test_updates_are_a_function_of_seed_and_epoch_alone():
    def updates(epoch, **changes):
        return [sorted(rows.tolist()) for rows in sampler(**changes).updates(epoch)]

    assert updates(1) == updates(1, micro=25) == updates(1, rank=1, num_ranks=4)
    assert updates(1) != updates(2) and updates(1) != updates(1, seed=4)
    one = sampler()
    first = list(one)
    assert list(one) == first
    one.epoch = 1
    assert list(one) != first


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_ranks_have_as_many_micro_batches_within_the_budget(num_ranks):
    ranks = [list(sampler(rank=rank, num_ranks=num_ranks)) for rank in range(num_ranks)]
    for parts in zip(*ranks, strict=True):
        assert len({len(part) for part in parts}) == 1
        for micro in (micro for part in parts for micro in part):
            assert len(micro.rows) * LENGTHS[list(micro.rows)].max() <= 60 * SECOND
            assert not micro.is_dummy or len(micro.rows) == 1


def fewest_pieces(lengths, budget):
    """Over *all* partitions of at most seven utterances, by subsets: fewest groups with rows × longest ≤ budget."""
    n = len(lengths)
    fits = [mask for mask in range(1, 1 << n)
            if mask.bit_count() * max(lengths[i] for i in range(n) if mask >> i & 1) <= budget]  # fmt: skip
    best = [0] + [math.inf] * ((1 << n) - 1)
    for mask in range(1, 1 << n):
        best[mask] = min((best[mask ^ part] + 1 for part in fits if part & mask == part), default=math.inf)
    return best[-1]


@pytest.mark.parametrize("seed", range(12))
def test_the_cut_takes_fewest_rounds_then_smallest_budget(seed):
    rng = np.random.default_rng(seed)
    lengths = np.sort(rng.integers(5, 30, rng.integers(1, 8)))[::-1].copy()
    budget, num_ranks = int(rng.integers(lengths[0], 80)), int(rng.integers(1, 4))
    rounds, pieces = cut_padded(lengths, num_ranks, budget)
    assert rounds == math.ceil(fewest_pieces(lengths.tolist(), budget) / num_ranks)
    assert sorted(i for piece in pieces for i in range(len(lengths))[piece]) == list(range(len(lengths)))
    sizes = [len(lengths[piece]) * int(lengths[piece][0]) for piece in pieces]
    assert sizes == sorted(sizes, reverse=True)
    assert fewest_pieces(lengths.tolist(), sizes[0]) <= rounds * num_ranks
    assert fewest_pieces(lengths.tolist(), sizes[0] - 1) > rounds * num_ranks, "a smaller budget would have done"


def test_micro_batches_are_of_like_length():
    padded, heard = 0, 0
    for update in sampler(batch=1600, micro=100):
        for micro in update:
            lengths = LENGTHS[list(micro.rows)]
            padded, heard = padded + len(lengths) * lengths.max(), heard + lengths.sum()
    assert padded < 1.1 * heard


def test_few_are_one_update_and_a_giant_stands_alone():
    few = sampler(lengths=[3 * SECOND, 90 * SECOND, 2 * SECOND])
    assert len(few) == 1
    (update,) = few
    assert {micro.rows for micro in update} == {(1,), (0, 2)}


def test_no_update_is_empty_however_unequal_the_lengths():
    lengths = [1 * SECOND] * 6 + [500 * SECOND]
    for epoch in range(20):
        drawn = sampler(lengths=lengths, batch=100)
        updates = drawn.updates(epoch)
        assert len(updates) == len(drawn) and all(len(rows) for rows in updates)
        assert sorted(np.concatenate(updates)) == list(range(7))
