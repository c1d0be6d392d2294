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
from w2v2.errors import UserError, flag, refuse
from w2v2.finetune.arguments import FineTuningArguments
from w2v2.finetune.ctc_data import SpeechDataset, collate_speech, read_once
from w2v2.finetune.subsets import describe_table

LEAST_FOLDS = 3  # one to train on, one to validate, one to test


@dataclass
class LabelArguments:
    """Which labels the utterances have."""

    label_column: str = flag("label", "The manifests' column that holds the label: label, speaker or any other.")
    label_map: list[str] = flag([], "Labels to rename or merge, as OLD=NEW: exc=hap counts excited as happy.")
    labels: list[str] = flag([], "Only these labels (after --label_map), in this order; other utterances are left out.")
    class_weights: str = flag("none", "`balanced` weights rare classes' loss more.", choices=["none", "balanced"])


def read_labelled(
    name: str, paths: Sequence[str], label_args: LabelArguments, args: FineTuningArguments, columns: Sequence[str] = ()
) -> Dataset:
    """Utterances of one set that have one of the labels, in the column `target`, and audio that opens."""
    column = label_args.label_column
    table, skipped = read_once(paths, args, [column, *columns])
    table, num_others = with_targets(table, ", ".join(paths), column, label_args.label_map, label_args.labels)
    found = f"{describe_table(table)}, {len(set(table['target']))} labels, {len(skipped)} unreadable"
    args.print_once(f"{name:>12}: {found}" + (f", {num_others} with other labels" if num_others else ""))
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
        old, _, new = (part.strip() for part in entry.partition("="))
        refuse((not (old and new), f"--label_map {entry!r}: write OLD=NEW, such as exc=hap"))
        mapping[old] = new
    return mapping


def with_targets(
    table: Dataset, source: str, column: str, label_map: Sequence[str] = (), labels: Sequence[str] = ()
) -> tuple[Dataset, int]:
    """The utterances with their label in the column `target`, and how many have a label that `labels` does not name.

    Raises UserError where the column or an utterance's label is missing, or nothing is left.
    """
    mapping = parse_label_map(label_map)
    values = [mapping.get(value, value) for value in table[column_of(table, column, "label_column", source)]]
    if "" in values:
        raise UserError(f"{source}: utterance {table['id'][values.index('')]} has an empty {column}, of "
                        f"{values.count('')} in all: fill it in, or remove the row")  # fmt: skip
    kept = [row for row, value in enumerate(values) if not labels or value in labels]
    found = ", ".join(sorted(set(values))[:10])
    refuse(
        (not kept, f"{source}: no utterance is left with one of --labels {' '.join(labels)}; {column} holds {found}")
    )
    return table.add_column("target", values).select(kept), len(values) - len(kept)


def known_labels(train: Sequence[str], wanted: Sequence[str] = ()) -> list[str]:
    """The labels of the training utterances, sorted, or as ordered in `wanted`.

    Raises UserError for fewer than two, and for absent ones.
    """
    found = sorted(set(train))
    absent = ", ".join(label for label in wanted if label not in found)
    refuse(
        (absent, f"--labels {absent}: no utterance of --train_data has this label: leave it out, or mend --label_map"),
        (
            len(found) < 2,
            f"--train_data: holds a single class ({', '.join(found)}); two are needed: see --label_column",
        ),
    )
    return list(wanted) or found


def check_known(labels: Sequence[str], targets: Sequence[str], source: str) -> None:
    """Raises UserError where an utterance to be scored has a label that training never shows."""
    if unseen := Counter(target for target in targets if target not in labels).most_common():
        (label, count), more = unseen[0], f" and {len(unseen) - 1} more labels" if len(unseen) > 1 else ""
        raise UserError(f"{source}: {count} utterances have the label {label!r}{more}, which no training utterance has: "
                        "mend them (--label_map), or leave them out (--labels)")  # fmt: skip


class LabelledDataset(SpeechDataset):
    """As `SpeechDataset`, with one label: `labels` of length 1.

    Where `crop_seconds` is not 0, a longer utterance gives a piece of that length, a pure function of (seed, epoch,
    utterance).
    """

    def __init__(self, table: Dataset, labels: Sequence[str], *args, crop_seconds: float = 0.0, seed=0, **kwargs):
        super().__init__(table, {label: i for i, label in enumerate(labels)}, *args, **kwargs)
        self.crop, self.seed = round(crop_seconds * SAMPLING_RATE), seed
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

    Fold k tests, the next one validates, and the rest trains: the test fold has no say in what is measured on it.
    """

    name: str
    train: list[int]
    validation: list[int]
    test: list[int]


def group_splits(groups: Sequence[str], column: str, num_folds: int | None = None) -> list[Split]:
    """One split a fold. A fold is one group, or, with `num_folds`, several groups; folds are then about even.

    Raises UserError where an utterance has no group, or there are too few groups.
    """
    from sklearn.model_selection import GroupKFold, LeaveOneGroupOut

    num_groups = len(set(groups))
    num_folds = num_folds or num_groups
    refuse(
        ("" in groups, f"--folds {column}: utterance {[*groups, ''].index('') + 1} has no {column}: fill it in, or leave "
                       "it out"),
        (num_folds < LEAST_FOLDS, f"--folds {column} makes {num_folds} folds; {LEAST_FOLDS} are needed, to train, "
                                  "validate and test"),
        (num_folds > num_groups, f"--num_folds {num_folds} is more than there are in {column}, {num_groups}: lower it"),
    )  # fmt: skip
    splitter = LeaveOneGroupOut() if num_folds == num_groups else GroupKFold(num_folds)
    folds = [sorted(rows.tolist()) for _, rows in splitter.split(groups, groups=groups)]
    splits = []
    for k, (test, validation) in enumerate(zip(folds, folds[1:] + folds[:1], strict=True), start=1):
        train = sorted(set(range(len(groups))) - {*test, *validation})
        splits.append(Split(f"fold-{k}", train, validation, test))
    return splits


def shared_groups(splits: Sequence[Split], groups: Sequence[str]) -> list[str]:
    """Groups that both train and are tested in some split, such as speakers where folds are sessions."""
    shared = set()
    for split in splits:
        shared |= {groups[row] for row in split.train + split.validation} & {groups[row] for row in split.test}
    return sorted(shared - {""})
