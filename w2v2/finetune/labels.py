"""Labelled utterances: the label's column, the labels that count, what `Trainer` draws from, folds of whole groups.

Shapes: B utterances, S samples.
"""

import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from w2v2.data.audio import SAMPLING_RATE, read_crop
from w2v2.data.hashing import CROP, below, derive
from w2v2.data.manifest import COLUMNS, EXTRAS
from w2v2.errors import UserError
from w2v2.finetune.arguments import FineTuningArguments
from w2v2.finetune.ctc_data import SpeechDataset, collate_speech, read_once
from w2v2.finetune.subsets import describe_table
from w2v2.finetune.task_arguments import LabelArguments

LEAST_FOLDS = 3  # one to train on, one to validate, one to test


def read_labelled(
    name: str, paths: Sequence[str], label_args: LabelArguments, args: FineTuningArguments, columns: Sequence[str] = ()
) -> Dataset:
    """Utterances of one set that have one of the labels, in the column `target`, and audio that opens."""
    table, skipped = read_once(paths, args, [label_args.label_column, *columns])
    table, num_others = with_targets(
        table, ", ".join(paths), label_args.label_column, label_args.label_map, label_args.labels
    )
    left_out = f", {num_others} with other labels" if num_others else ""
    args.print_once(
        f"{name:>12}: {describe_table(table)}, {len(set(table['target']))} labels, {len(skipped)} unreadable{left_out}"
    )
    return table


def column_of(table: Dataset, name: str, flag: str, source: str) -> str:
    """The table's name of a column that a flag asks for: the manifest's reader renames `emotion` to `label`."""
    for known in (name, name.lower(), *(extra for extra in EXTRAS if name.lower() in COLUMNS[extra])):
        if known in table.column_names:
            return known
    there = [column for column in table.column_names if column not in ("id", "audio", "start", "num_samples", "target")]
    raise UserError(f"{source}: has no column {name!r}, which --{flag} asks for (it has {', '.join(there) or 'none'}): "
                    f"add it, or set --{flag}")  # fmt: skip


def parse_label_map(entries: Sequence[str]) -> dict[str, str]:
    """`["exc=hap"]` → {"exc": "hap"}."""
    mapping = {}
    for entry in entries:
        old, equals, new = (part.strip() for part in entry.partition("="))
        if not (old and equals and new):
            raise UserError(
                f"--label_map {entry!r}: write OLD=NEW, such as exc=hap; what is to be left out, with --labels"
            )
        mapping[old] = new
    return mapping


def with_targets(
    table: Dataset, source: str, column: str, label_map: Sequence[str] = (), labels: Sequence[str] = ()
) -> tuple[Dataset, int]:
    """The utterances with their label in the column `target`, and how many have a label that `labels` does not name.

    Raises UserError where the column or an utterance's label is missing, or nothing is left.
    """
    values = table[column_of(table, column, "label_column", source)]
    mapping = parse_label_map(label_map)
    values = [mapping.get(value, value) for value in values]
    if "" in values:
        raise UserError(
            f"{source}: utterance {table['id'][values.index('')]} has an empty {column}, of {values.count('')} in all: "
            "fill it in, or remove the row"
        )
    kept = [row for row, value in enumerate(values) if not labels or value in labels]
    if not kept:
        raise UserError(f"{source}: no utterance is left with one of --labels {' '.join(labels)}; {column} holds "
                        f"{', '.join(sorted(set(values))[:10])}")  # fmt: skip
    return table.add_column("target", values).select(kept), len(values) - len(kept)


def known_labels(train: Sequence[str], wanted: Sequence[str] = (), source: str = "--train_data") -> list[str]:
    """The labels of the training utterances, sorted, or as ordered in `wanted`.

    Raises UserError for fewer than two, and for absent ones.
    """
    found = set(train)
    if absent := [label for label in wanted if label not in found]:
        raise UserError(
            f"--labels {absent[0]}: no utterance of {source} has this label: leave it out, or mend --label_map"
        )
    if len(found) < 2:
        only = ", ".join(sorted(found)) or "none"
        raise UserError(f"{source}: holds a single class ({only}); a classifier needs two or more: see --label_column")
    return list(wanted) or sorted(found)


def check_known(labels: Sequence[str], targets: Sequence[str], source: str) -> None:
    """Raises UserError where an utterance to be scored has a label that training never shows."""
    unseen = Counter(target for target in targets if target not in set(labels))
    if unseen:
        label, count = unseen.most_common(1)[0]
        more = f" and {len(unseen) - 1} more labels" if len(unseen) > 1 else ""
        raise UserError(
            f"{source}: {count} utterances have the label {label!r}{more}, which no training utterance has: mend them "
            "(--label_map), or leave them out (--labels)"
        )


def balanced_weights(targets: Sequence[str], labels: Sequence[str]) -> list[float]:
    """A weight a class, inverse to its frequency; their mean over the utterances is 1."""
    counts = Counter(targets)
    return [len(targets) / (len(labels) * counts[label]) for label in labels]


class LabelledDataset(SpeechDataset):
    """Utterances decoded when they are asked for, with one label: items as in `SpeechDataset`, `labels` of length 1.

    Where `crop_seconds` is not 0, of a longer utterance only a piece of that length is read, which one is a pure
    function of (seed, epoch, utterance).
    """

    def __init__(
        self, table: Dataset, labels: Sequence[str], *args, crop_seconds: float = 0.0, seed: int = 0, **kwargs
    ):
        super().__init__(table, {label: i for i, label in enumerate(labels)}, *args, **kwargs)
        self.crop = round(crop_seconds * SAMPLING_RATE)
        self.seed, self.epoch = seed, 0
        if self.crop:
            self.lengths = [min(length, self.crop) for length in self.lengths]

    def _labels(self, utterance: dict[str, Any]) -> list[int]:
        return [self.vocabulary[utterance["target"]]]

    def _decode(self, utterance: dict[str, Any]) -> np.ndarray:
        start, length = round(utterance["start"] * SAMPLING_RATE), utterance["num_samples"]
        if self.crop and length > self.crop:
            drawn = derive(self.seed, CROP, self.epoch, zlib.crc32(utterance["id"].encode()))
            start, length = start + int(below(drawn, length - self.crop + 1)), self.crop
        return read_crop(utterance["audio"], start, length)


def collate_labelled(items: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Items → input_values (B, S), labels (B,), -100 for unreadable audio, attention_mask (B, S) if lengths differ."""
    batch = collate_speech(items)
    return batch | {"labels": batch["labels"][:, 0]}


@dataclass(frozen=True)
class Split:
    """Rows of a table, by what they are for.

    Fold k tests, the next one validates (it chooses the checkpoint or the regularisation), and the rest trains: the
    test fold has no say in anything that is measured on it.
    """

    name: str
    train: list[int]
    validation: list[int]
    test: list[int]


def group_splits(groups: Sequence[str], column: str, num_folds: int | None = None) -> list[Split]:
    """One split a fold. A fold is one group, or, with `num_folds`, several groups; folds are then about even.

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
    splits = []
    for k, test in enumerate(folds):
        validation = folds[(k + 1) % num_folds]
        train = sorted(set(range(len(groups))) - {*test, *validation})
        splits.append(Split(f"fold-{k + 1}", train, validation, test))
    return splits


def shared_groups(splits: Sequence[Split], groups: Sequence[str]) -> list[str]:
    """Groups that both train and are tested in some split, such as speakers where folds are sessions."""
    shared: set[str] = set()
    for split in splits:
        heard = {groups[row] for row in split.train + split.validation}
        shared |= {groups[row] for row in split.test} & heard
    return sorted(shared - {""})
