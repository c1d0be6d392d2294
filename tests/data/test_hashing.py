"""Hashes against splitmix64 in exact Python integers, and against its published sequence."""

import numpy as np
import pytest
import torch

from w2v2.data import hashing
from w2v2.data.hashing import below, derive, positive, uniform

WORD = (1 << 64) - 1


def splitmix_finaliser(x):
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & WORD
    return x ^ (x >> 31)


def exact_derive(key, *parts):
    h = key & WORD
    for part in parts:
        h = splitmix_finaliser((splitmix_finaliser(h) + ((part + 1) * 0x9E3779B97F4A7C15)) & WORD)
    return h


def unsigned(h):
    return [int(x) & WORD for x in h.flatten()]


def many_hashes(n=200_000):
    return derive(7, torch.arange(n))


def test_seed_0_gives_the_published_sequence_of_splitmix64():
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert unsigned(derive(0, torch.arange(3))) == published


def test_derive_is_splitmix_in_exact_integers():
    rng = np.random.default_rng(0)
    extremes = [0, 1, -1, 2**63 - 1, -(2**63), 2**31, -7]
    for _ in range(300):
        values = [int(x) for x in rng.integers(-(2**63), 2**63 - 1, 4)]
        values[rng.integers(4)] = extremes[rng.integers(len(extremes))]
        key, *parts = values[: rng.integers(2, 5)]
        assert unsigned(derive(key, *parts)) == [exact_derive(key, *parts)]


def test_keys_and_parts_broadcast():
    keys, parts = torch.tensor([3, -5]), torch.tensor([0, 1, 8])
    expected = [exact_derive(key, 4, part) for key in keys.tolist() for part in parts.tolist()]
    h = derive(keys[:, None], 4, parts)
    assert h.shape == (2, 3) and unsigned(h) == expected


def test_below_uniform_and_positive_take_the_upper_bits():
    h = many_hashes(1000)
    for n in (1, 2, 10, 2**31 - 1):
        assert below(h, n).tolist() == [(x >> 33) * n >> 31 for x in unsigned(h)]
    assert uniform(h).tolist() == [(x >> 11) / 2**53 for x in unsigned(h)]
    assert positive(h).tolist() == [x >> 1 for x in unsigned(h)]


def test_ranges_hold_for_the_extreme_hashes():
    extremes = torch.tensor([0, -1, 2**63 - 1, -(2**63)])
    assert 0 <= below(extremes, 2**31 - 1).min() and below(extremes, 2**31 - 1).max() < 2**31 - 1
    assert 0.0 <= uniform(extremes).min() and uniform(extremes).max() < 1.0
    assert positive(extremes).min() >= 0


@pytest.mark.parametrize("n", [2, 7, 100])
def test_below_is_uniform(n):
    counts = torch.bincount(below(many_hashes(), n), minlength=n).double()
    expected = counts.sum() / n
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert len(counts) == n and chi_square < (n - 1) + 5 * (2 * (n - 1)) ** 0.5


def test_streams_are_distinct_and_no_counters():
    names = ("ORDER", "CROP", "MASK", "DISTRACTOR", "LAYERDROP", "NOISE")
    streams = {getattr(hashing, name) for name in names}
    assert len(streams) == len(names) and max(streams) < 0
