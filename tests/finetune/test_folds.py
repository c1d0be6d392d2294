"""Splits: every utterance is tested once, and no group is in two parts of a split."""

import numpy as np
import pytest

from w2v2.errors import UserError
from w2v2.finetune.labels import group_splits, shared_groups


def draw_groups(seed):
    random = np.random.default_rng(seed)
    return [f"s{i}" for i in random.integers(0, random.integers(4, 15), 120)]


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("num_folds", [None, 3, 4])
def test_groups_are_disjoint_and_every_utterance_is_tested_once(seed, num_folds):
    groups = draw_groups(seed)
    splits = group_splits(groups, "speaker", num_folds)
    assert len(splits) == (num_folds or len(set(groups)))
    assert sorted(row for split in splits for row in split.test) == list(range(len(groups)))
    for split in splits:
        parts = [{groups[row] for row in rows} for rows in (split.train, split.validation, split.test)]
        assert all(parts) and not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
        assert sorted(split.train + split.validation + split.test) == list(range(len(groups)))
    assert shared_groups(splits, groups) == []


def test_folds_of_several_groups_are_even():
    groups = [f"s{i}" for i in range(12) for _ in range(10)]
    assert {len(split.test) for split in group_splits(groups, "speaker", 4)} == {30}


def test_the_order_of_the_rows_does_not_matter_to_who_is_tested_together():
    groups = draw_groups(3)
    shuffled = list(np.random.default_rng(0).permutation(groups))
    tested = [
        {frozenset(rows[row] for row in split.test) for split in group_splits(list(rows), "speaker", 4)}
        for rows in (groups, shuffled)
    ]
    assert tested[0] == tested[1]


def test_a_speaker_in_two_sessions_is_found():
    sessions, speakers = list("112233"), ["a", "b", "c", "d", "e", "a"]
    assert shared_groups(group_splits(sessions, "session"), speakers) == ["a"]
    assert shared_groups(group_splits(sessions, "session"), ["a", "b", "c", "d", "", ""]) == []


@pytest.mark.parametrize(
    ("groups", "num_folds", "message"),
    [
        (["a", "", "b", "c"], None, "utterance 2 has no speaker"),
        (["a", "b", "a", "b"], None, "2 folds; 3 are needed"),
        (["a", "b", "c", "d"], 2, "2 folds; 3 are needed"),
        (["a", "b", "c", "d"], 5, "--num_folds 5"),
    ],
)
def test_groups_that_cannot_be_folded_are_refused(groups, num_folds, message):
    with pytest.raises(UserError, match=message):
        group_splits(groups, "speaker", num_folds)
