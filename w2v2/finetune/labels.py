"""Labelled utterances: which column is the label, which labels count, and what `Trainer` draws from.

Shapes: B utterances, S samples.
"""

import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from w2v2.data.audio import SAMPLING_RATE, probe, read_crop
from w2v2.data.hashing import CROP, below, derive
from w2v2.data.manifest import COLUMNS, EXTRAS, load_manifest
from w2v2.errors import UserError
from w2v2.finetune import ctc_data


def read_utterances(
    paths: Sequence[str], columns: Sequence[str], *, data_root: str | None, cache_dir: Path, max_skipped_fraction: float
) -> tuple[Dataset, list[dict[str, str]]]:
    """Utterances whose audio opens, with these columns beside the usual ones, and a list of {id, audio, reason} of the others.

    Raises UserError where more than `max_skipped_fraction` of them are unreadable.
    """
    table, skipped = load_manifest(list(paths), data_root=data_root, cache_dir=cache_dir, probe=probe, further=columns)
    num_utterances = len(table) + len(skipped)
    table, unopened = ctc_data.drop_unreadable(table)
    skipped += unopened
    if len(skipped) > max_skipped_fraction * num_utterances:
        first = skipped[0]
        raise UserError(
            f"{', '.join(paths)}: {len(skipped)} of {num_utterances} utterances have unreadable audio, the first "
            f"{first['audio']}: {first['reason']}; mend the paths (--data_root?) or raise --max_skipped_fraction, now "
            f"{max_skipped_fraction}"
        )
    return table, skipped


def column_of(table: Dataset, name: str, flag: str, source: str) -> str:
    """The table's own name of a column that a flag asks for; `emotion` finds `label` where the manifest's reader renamed it."""
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
    """The utterances with their label in the column `target`, and how many were left out because `labels` does not name theirs.

    Raises UserError where the column or an utterance's label is missing, or nothing is left.
    """
    values = table[column_of(table, column, "label_column", source)]
    mapping = parse_label_map(label_map)
    values = [mapping.get(value, value) for value in values]
    if "" in values:
        raise UserError(
            f"{source}: utterance {table['id'][values.index('')]} has an empty {column}, of {values.count('')} in all: fill "
            "it in, or remove the row"
        )
    kept = [row for row, value in enumerate(values) if not labels or value in labels]
    if not kept:
        raise UserError(f"{source}: no utterance is left with one of --labels {' '.join(labels)}; {column} holds "
                        f"{', '.join(sorted(set(values))[:10])}")  # fmt: skip
    return table.add_column("target", values).select(kept), len(values) - len(kept)


def known_labels(train: Sequence[str], wanted: Sequence[str] = (), source: str = "--train_data") -> list[str]:
    """The labels of the training utterances, sorted, or as ordered in `wanted`. UserError for fewer than two, and for absent ones."""
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
        raise UserError(f"{source}: {count} utterances have the label {label!r}{more}, which no training utterance has: mend "
                        "them (--label_map), or leave them out (--labels)")  # fmt: skip


def balanced_weights(targets: Sequence[str], labels: Sequence[str]) -> list[float]:
    """A weight a class, inverse to its frequency; their mean over the utterances is 1."""
    counts = Counter(targets)
    return [len(targets) / (len(labels) * counts[label]) for label in labels]


class LabelledDataset(ctc_data.SpeechDataset):
    """Utterances decoded when they are asked for, with one label: items as in `ctc_data.SpeechDataset`, `labels` of length 1.

    Where `crop_seconds` is not 0, of a longer utterance only a piece of that length is read, which one is a pure function of (seed,
    epoch, utterance).
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

    def _read(self, utterance: dict[str, Any]) -> np.ndarray:
        start, length = round(utterance["start"] * SAMPLING_RATE), utterance["num_samples"]
        if self.crop and length > self.crop:
            drawn = derive(self.seed, CROP, self.epoch, zlib.crc32(utterance["id"].encode()))
            start, length = start + int(below(drawn, length - self.crop + 1)), self.crop
        return read_crop(utterance["audio"], start, length)


def collate_labelled(items: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Items → input_values (B, S), labels (B,), -100 where the audio was unreadable, attention_mask (B, S) if lengths differ."""
    batch = ctc_data.collate_ctc(items)
    return batch | {"labels": batch["labels"][:, 0]}


def select_lengths(table: Dataset, min_seconds: float, max_seconds: float | None) -> tuple[Dataset, int]:
    """The utterances within these lengths, and how many are not."""
    longest = float("inf") if max_seconds is None else max_seconds
    kept = [i for i, n in enumerate(table["num_samples"]) if min_seconds <= n / SAMPLING_RATE <= longest]
    if not kept:
        raise UserError("--train_data: every utterance was dropped by its length: see --min_seconds and --max_seconds")
    return table.select(kept), len(table) - len(kept)


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
