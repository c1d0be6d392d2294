"""Cross-validation by groups (speakers, sessions, …): no group is in two parts of a split.

Fold k tests, the next one validates (it chooses the checkpoint or the regularisation), and the rest trains, so the test fold has
no say in anything that is measured on it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from w2v2.errors import UserError

LEAST_FOLDS = 3  # one to train on, one to validate, one to test


@dataclass(frozen=True)
class Split:
    """Rows of a table, by what they are for."""

    name: str
    train: list[int]
    validation: list[int]
    test: list[int]


def group_splits(groups: Sequence[str], column: str, num_folds: int | None = None) -> list[Split]:
    """One split a fold. A fold is one group, or, where `num_folds` is given, several, as even in utterances as they come.

    Raises UserError where an utterance has no group, or there are too few groups.
    """
    from sklearn.model_selection import GroupKFold

    names = sorted(set(groups))
    if "" in names:
        raise UserError(
            f"--folds {column}: utterance {groups.index('') + 1} has no {column}: fill it in, or leave it out"
        )
    num_folds = num_folds or len(names)
    if num_folds < LEAST_FOLDS:
        raise UserError(
            f"--folds {column} makes {num_folds} folds; {LEAST_FOLDS} are needed, to train, validate and test"
        )
    if num_folds > len(names):
        raise UserError(f"--num_folds {num_folds} is more than there are in {column}, {len(names)}: lower it")
    if num_folds == len(names):
        test_rows = [np.flatnonzero(np.array(groups) == name) for name in names]
    else:
        test_rows = [rows for _, rows in GroupKFold(num_folds).split(groups, groups=groups)]
    folds = [sorted(map(int, rows)) for rows in test_rows]
    return [_split(k, folds) for k in range(num_folds)]


def _split(k: int, folds: list[list[int]]) -> Split:
    validation = (k + 1) % len(folds)
    rest = sorted(row for fold, rows in enumerate(folds) if fold not in (k, validation) for row in rows)
    return Split(f"fold-{k + 1}", rest, folds[validation], folds[k])


def shared_groups(splits: Sequence[Split], groups: Sequence[str]) -> list[str]:
    """Groups (such as speakers, where folds are sessions) that both train and are tested in some split, the nameless one aside."""
    shared: set[str] = set()
    for split in splits:
        heard = {groups[row] for row in split.train + split.validation}
        shared |= {groups[row] for row in split.test} & heard
    return sorted(shared - {""})
