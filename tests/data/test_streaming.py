"""Streaming: every utterance once an epoch from a few shards at a time, and a place in it is all that has to be known."""

import numpy as np
import pytest
import torch

from w2v2.data.batching import Cursor, EffectiveBatches, PlanStream
from w2v2.data.streaming import ShardOrder

CASES = [
    ([3], 1),
    ([1, 0, 0, 4], 2),
    ([7] * 9, 4),
    ([0, 1, 2, 13, 5, 5, 0, 2], 3),
    ([40, 3, 17] * 5, 16),
    ([2] * 5, 99),
]


def hear(order: ShardOrder, epoch: int) -> np.ndarray:
    return order(epoch, torch.arange(order.n))[0]


@pytest.mark.parametrize(("num_rows", "window_shards"), CASES)
@pytest.mark.parametrize("seed", [0, 7])
def test_an_epoch_holds_each_utterance_once_window_by_window(num_rows, window_shards, seed):
    order = ShardOrder(num_rows, window_shards, seed)
    shard_of = np.repeat(np.arange(len(num_rows)), num_rows)
    for epoch in range(3):
        heard, passage = order(epoch, torch.arange(order.n))
        assert sorted(heard) == list(range(sum(num_rows))) and set(passage) == {epoch}
        # Each position alone, and where it stands.
        rng = np.random.default_rng(seed)
        some = rng.integers(0, order.n, 20)
        np.testing.assert_array_equal(order(epoch, torch.from_numpy(some))[0], heard[some])
        windows = np.array([order.find_window(Cursor(epoch, position))[1] for position in range(order.n)])
        assert (np.diff(windows) >= 0).all()
        # The shards of a window are those that are said to be fetched for it, and no shard is in two windows.
        seen = []
        for (of_epoch, window), shards in order.windows(Cursor(epoch, 0)):
            if of_epoch > epoch:
                break
            assert len(shards) <= window_shards
            assert set(shard_of[heard[windows == window]]) <= set(shards)
            seen += shards
        assert len(seen) == len(set(seen)) and set(shard_of) <= set(seen)


def test_epochs_and_seeds_give_other_orders_and_other_windows():
    num_rows = [20] * 12
    first, again, other = ShardOrder(num_rows, 4, 1), ShardOrder(num_rows, 4, 1), ShardOrder(num_rows, 4, 2)
    np.testing.assert_array_equal(hear(first, 5), hear(again, 5))
    for heard in (hear(first, 6), hear(other, 5), hear(ShardOrder(num_rows, 3, 1), 5)):
        assert (hear(first, 5) != heard).mean() > 0.9
    shards = [next(order.windows(Cursor(epoch, 0)))[1] for order in (first, other) for epoch in range(6)]
    assert len({frozenset(window) for window in shards}) > 6
    # Utterances of all shards of a window are mixed: in each quarter of it, each shard has about its share.
    counts = np.array([np.bincount(hear(first, e)[:20] // 20, minlength=12) for e in range(200)])
    assert np.sort(counts, axis=1)[:, -4:].sum() == 200 * 20
    assert abs(np.sort(counts, axis=1)[:, -4:].mean() - 5) < 1e-9 and counts.max() <= 15


def batches(seed: int = 3) -> EffectiveBatches:
    rng = np.random.default_rng(0)
    num_rows = rng.integers(0, 12, 14)
    lengths = rng.integers(16_000, 80_000, num_rows.sum())
    order = ShardOrder(num_rows, 3, seed)
    sizes = dict(batch_samples=300_000, crop_samples=60_000, grid_samples=0)
    return EffectiveBatches(lengths, **sizes, seed=seed, order=order)


def heard_by_update(cursor: Cursor, updates: range, num_ranks: int) -> list[list[tuple[int, int, int]]]:
    """(utterance, passage, start) of every update, over all ranks."""
    found = {update: [] for update in updates}
    for rank in range(num_ranks):
        cut = dict(rank=rank, num_ranks=num_ranks, micro_batch_samples=120_000)
        for plan in PlanStream(batches(), cursor, updates, **cut):
            rows = zip(*(column.tolist() for column in plan.crops[:3]), strict=True)
            found[plan.update] += [] if plan.dummy else rows
    return [sorted(rows) for rows in found.values()]


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_three_resumes_in_an_epoch_change_nothing(num_ranks):
    """Each time everything is made anew but the cursor; the places lie in the middle of a window and of an epoch."""
    whole, cursor = heard_by_update(Cursor(), range(40), 1), Cursor()
    assert {passage for rows in whole for _, passage, _ in rows} >= {0, 1, 2}
    found = []
    for stops in ([0, 2], [2, 5], [5, 6], [6, 40]):
        found += heard_by_update(cursor, range(*stops), num_ranks)
        for _ in range(*stops):
            _, cursor = batches().draw(cursor)
    assert found == whole
