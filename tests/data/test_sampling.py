"""Sources in a mixed order: their due shares in every batch, each through all of its utterances before one repeats."""

import hashlib
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from w2v2.data.batching import Cursor, EffectiveBatches, EpochOrder, plan_update
from w2v2.data.hashing import MIX, derive
from w2v2.data.sampling import BLOCK, MixedOrder, build_order, count_draws, find_shares
from w2v2.data.utterances import Utterances
from w2v2.errors import UserError
from w2v2.manifests.sources import Source

SECOND = 16_000


def make_sources(sizes, languages=None, weights=None, seed=0):
    """Sources with so many utterances of 2 to 15 s, nothing of which is cropped; and their lengths."""
    rng, sources, lengths = np.random.default_rng(seed), [], []
    for number, size in enumerate(sizes):
        own = rng.uniform(2 + number % 3, 15 - number % 5, size) * SECOND
        total = int(own.astype(np.int32).sum())
        language, weight = (languages or [""] * len(sizes))[number], (weights or [1.0] * len(sizes))[number]
        counts = dict(num_rows=size, num_utterances=size, num_samples=total, heard_samples=total)
        sources.append(Source(f"corpus{number}", [], language=language, weight=weight, **counts))
        lengths.append(own.astype(np.int32))
    return sources, np.concatenate(lengths)


def make_order(sources, alpha_corpus=1.0, alpha_language=1.0, seed=5):
    flags = dict(sampling_alpha_corpus=alpha_corpus, sampling_alpha_language=alpha_language)
    args = SimpleNamespace(seed=seed, train_data=["mixed.yaml"], **flags)
    return build_order(Utterances(None, None, {}, sources=sources), args)


def draw_all(order, epochs):
    """Pairs of (utterance, passage), position by position."""
    drawn = [order(epoch, torch.arange(order.n)) for epoch in range(epochs)]
    return [pair for columns in drawn for pair in zip(*(column.tolist() for column in columns), strict=True)]


# Sizes, and draws an epoch: one source, one utterance, far more draws than utterances, fewer draws than blocks, …
MIXTURES = {
    "one": ([37], [37]),
    "fewer than a block": ([3, 2], [3, 2]),
    "one utterance each": ([1, 1, 1], [50, 1, 7]),
    "rare": ([200, 5, 1], [400, 1, 1]),
    "repeated": ([3, 150, 40], [500, 75, 41]),
    "many": (list(range(1, 40)), [(7 * size) % 31 + 1 for size in range(1, 40)]),
    "unequal": ([600, 10], [600, 30]),
}


def reference(sources, draws, seed, epoch):
    """The mixed order, one draw after another, in Python's integers."""
    num_blocks, n = max(1, sum(draws) // BLOCK), sum(draws)
    names = [int.from_bytes(hashlib.sha256(source.name.encode()).digest()[:7]) for source in sources]
    keys = [int(derive(seed, MIX, name)) for name in names]
    phases = [((key % 2**64) >> 33) * num_blocks >> 31 for key in keys]
    first = [sum(source.num_utterances for source in sources[:number]) for number in range(len(sources))]
    expected, done = [], [0] * len(sources)
    for block in range(num_blocks):
        due = [(count * (block + 1) + phase) // num_blocks for count, phase in zip(draws, phases, strict=True)]
        slots = [number for number in range(len(sources)) for _ in range(due[number] - done[number])]
        hashes = [(int(derive(seed, MIX, epoch, sum(done) + slot)) % 2**64) >> 1 for slot in range(len(slots))]
        nth = list(done)
        for slot in sorted(range(len(slots)), key=hashes.__getitem__):
            number = slots[slot]
            passage, place = divmod(epoch * draws[number] + nth[number], sources[number].num_utterances)
            own = EpochOrder(sources[number].num_utterances, keys[number])(passage, torch.tensor([place]))[0]
            expected.append((first[number] + int(own[0]), passage))
            nth[number] += 1
        done = due
    assert done == list(draws) and len(expected) == n
    return expected


@pytest.mark.parametrize("mixture", MIXTURES)
def test_the_order_is_what_one_draw_after_another_gives(mixture):
    sizes, draws = MIXTURES[mixture]
    sources, _ = make_sources(sizes)
    order = MixedOrder(sources, np.array(draws), seed=5)
    rng = np.random.default_rng(0)
    for epoch in (0, 3):
        expected = reference(sources, draws, 5, epoch)
        assert order.n == len(expected)
        for positions in [np.arange(order.n), rng.permutation(order.n), *rng.integers(0, order.n, (20, 1))]:
            found = order(epoch, torch.from_numpy(positions))
            assert list(zip(*(column.tolist() for column in found), strict=True)) == [expected[p] for p in positions]


@pytest.mark.parametrize("mixture", MIXTURES)
def test_a_source_hears_all_its_utterances_before_it_repeats_one(mixture):
    sizes, draws = MIXTURES[mixture]
    sources, _ = make_sources(sizes)
    drawn = draw_all(MixedOrder(sources, np.array(draws), seed=5), epochs=3)
    assert len(set(drawn)) == len(drawn), "an utterance has a crop of its own whenever it is heard"
    for number, size in enumerate(sizes):
        rows = range(sum(sizes[:number]), sum(sizes[: number + 1]))
        heard = [(passage, utterance) for utterance, passage in drawn if utterance in rows]
        assert len(heard) == 3 * draws[number]
        assert [passage for passage, _ in heard] == [place // size for place in range(len(heard))]
        for passage in range(len(heard) // size):
            assert sorted(utterance for other, utterance in heard if other == passage) == list(rows)


@pytest.mark.parametrize("mixture", MIXTURES)
def test_every_stretch_holds_the_due_shares(mixture):
    """Up to a block's share at either end, and a draw: |count − share · length| ≤ 2 (share · (n / m + k) + 1)."""
    sizes, draws = MIXTURES[mixture]
    sources, _ = make_sources(sizes)
    order, shares = MixedOrder(sources, np.array(draws), seed=5), np.array(draws) / sum(draws)
    utterance, _ = zip(*draw_all(order, epochs=3), strict=True)
    source = np.searchsorted(np.cumsum(sizes), utterance, side="right")
    counted = np.cumsum(source[:, None] == np.arange(len(sizes)), axis=0)  # (3 n, k)
    bound = shares * (order.n / order.num_blocks + len(sizes)) + 1
    assert (abs(counted - shares * np.arange(1, len(source) + 1)[:, None]) <= bound).all()


@pytest.mark.parametrize("alpha_corpus, alpha_language", [(1.0, 1.0), (0.5, 0.5), (0.0, 1.0), (0.3, 0.0)])
def test_drawn_hours_follow_the_temperature(alpha_corpus, alpha_language):
    """Over three epochs, drawn as effective batches, within one per cent of every source's share."""
    languages, weights = ["en", "en", "sw", "fi"], [1.0, 1.0, 1.0, 2.0]
    sources, lengths = make_sources([4000, 1500, 800, 1200], languages, weights)
    order = make_order(sources, alpha_corpus, alpha_language)
    batches = EffectiveBatches(
        lengths, batch_samples=600 * SECOND, crop_samples=20 * SECOND, grid_samples=0, seed=5, order=order
    )
    cursor, heard = Cursor(), np.zeros(len(sources))
    owner = np.repeat(np.arange(4), [4000, 1500, 800, 1200])
    while cursor.epoch < 3:
        crops, cursor = batches.draw(cursor)
        heard += np.bincount(owner[crops.utterance], crops.num_samples, minlength=4)
    # The definition, in plain numbers.
    hours = [source.heard_samples / SECOND / 3600 for source in sources]
    by_language = {name: sum(h for h, own in zip(hours, languages, strict=True) if own == name) for name in languages}
    within = {n: sum(h**alpha_corpus for h, own in zip(hours, languages, strict=True) if own == n) for n in languages}
    due = [
        by_language[name] ** alpha_language * hour**alpha_corpus / within[name] * weight
        for hour, name, weight in zip(hours, languages, weights, strict=True)
    ]
    due = np.array(due) / sum(due)
    assert find_shares(sources, alpha_corpus, alpha_language) == pytest.approx(due)
    assert heard / heard.sum() == pytest.approx(due, rel=0.01)
    assert heard.sum() == pytest.approx(3 * sum(hours) * 3600 * SECOND, rel=0.01), "an epoch is as long as the data"


def test_natural_shares_hear_every_utterance_once_an_epoch():
    sources, lengths = make_sources([300, 7, 1, 55])
    order = make_order(sources)
    assert sorted(draw_all(order, epochs=2)) == sorted(itertools.product(range(len(lengths)), range(2)))
    assert order.identity == {"draws": {"corpus0": 300, "corpus1": 7, "corpus2": 1, "corpus3": 55}}


def test_a_source_of_hardly_any_weight_is_heard_once_an_epoch():
    sources, _ = make_sources([100, 100], weights=[1e-9, 1.0])
    draws = count_draws(sources, find_shares(sources, 1.0, 1.0))
    assert draws[0] == 1 and draws[1] > 100


@pytest.mark.parametrize("sizes", [[900, 60, 1], [3, 2]])
def test_from_any_place_the_batches_are_the_same(sizes):
    """Smaller and larger than an epoch."""
    sources, lengths = make_sources(sizes)
    recipe = dict(batch_samples=90 * SECOND, crop_samples=6 * SECOND, grid_samples=5120, seed=5)
    batches = EffectiveBatches(lengths, **recipe, order=make_order(sources, alpha_corpus=0.5))
    straight, cursors, cursor = [], [], Cursor()
    for _ in range(60):
        cursors.append(cursor)
        crops, cursor = batches.draw(cursor)
        straight.append(crops)
    assert cursor.epoch >= 1
    for number in range(0, 60, 7):
        again = EffectiveBatches(lengths, **recipe, order=make_order(sources, alpha_corpus=0.5))
        resumed = cursors[number]
        for expected in straight[number : number + 3]:
            crops, resumed = again.draw(resumed)
            assert all(np.array_equal(a, b) for a, b in zip(crops, expected, strict=True))
            rows = sorted(zip(crops.utterance.tolist(), crops.passage.tolist(), strict=True))
            for num_ranks in (1, 2):
                cut = dict(num_ranks=num_ranks, micro_batch_samples=20 * SECOND)
                plans = [p for rank in range(num_ranks) for p in plan_update(crops, 0, resumed, rank=rank, **cut)]
                pairs = [zip(*(c.tolist() for c in p.crops[:2]), strict=True) for p in plans if not p.dummy]
                assert sorted(itertools.chain(*pairs)) == rows


def test_a_source_added_at_the_end_leaves_the_others_orders():
    """The order of a source follows its name."""
    sources, _ = make_sources([40, 40, 30])
    before, after = MixedOrder(sources[:2], np.array([40, 40]), 5), MixedOrder(sources, np.array([40, 40, 90]), 5)
    own = [[u for u, _ in draw_all(order, epochs=2) if u < 40] for order in (before, after)]
    assert own[0] == own[1]
    other = [u - 40 for u, _ in draw_all(before, epochs=2) if 40 <= u]
    assert sum(a == b for a, b in zip(own[0], other, strict=True)) < 10


def test_temperature_over_languages_needs_them():
    sources, _ = make_sources([3, 4])
    with pytest.raises(UserError, match=r"--sampling_alpha_language 0.5: no source of mixed.yaml names its language"):
        make_order(sources, alpha_language=0.5)
