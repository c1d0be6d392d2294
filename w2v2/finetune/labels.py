"""Labelled utterances: the label's column, the labels that count, what `Trainer` draws from, folds of whole groups.

Shapes: B utterances, S samples.
"""

import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from w2v2.audio.crops import SAMPLING_RATE, read_crop
from w2v2.data.hashing import CROP, below, derive
from w2v2.errors import UserError, flag, refuse
from w2v2.finetune.arguments import FineTuningArguments
from w2v2.finetune.ctc_data import SpeechDataset, collate_speech, describe_table, read_once
from w2v2.manifests.dataset_loading import Manifest, name_sources
from w2v2.manifests.manifest import COLUMNS, EXTRAS

UNLABELLED = -1
LABEL_FLAGS = ("label_column", "label_map", "labels")  # that a model's folder tells
LEAST_FOLDS = 3  # one to train on, one to validate, one to test


@dataclass
class LabelArguments:
    """Which labels the utterances have."""

    label_column: str = flag("label", "The manifests' column that holds the label: label, speaker, …", heading="Labels")
    label_column_name: str | None = flag(None, "The same as label_column, as the examples of transformers call it.")
    label_map: list[str] = flag([], "Labels to rename or merge, as OLD=NEW: exc=hap counts excited as happy.")
    labels: list[str] = flag([], "Only these labels (after --label_map), in this order; other utterances are left out.")
    class_weights: str = flag("none", "`balanced` weights rare classes' loss more.", choices=["none", "balanced"])

    def __post_init__(self):
        if self.label_column_name:
            self.label_column, self.label_column_name = self.label_column_name, None


def read_labelled(
    name: str,
    paths: Sequence[Manifest],
    label_args: LabelArguments,
    args: FineTuningArguments,
    columns: Sequence[str] = (),
) -> tuple[Dataset, dict[str, int]]:
    """Utterances of one set that have one of the labels, in the column `target`, and audio that opens.

    Where nothing is trained they need no label: `target` is then "". Also how many are left out, by reason.
    """
    column = label_args.label_column
    table, skipped = read_once(paths, args, [column, *columns])
    if args.do_train and name in ("train", "all"):
        warn_unmapped(table, name_sources(paths), column, label_args.label_map, args.print_once)
    options = dict(label_map=label_args.label_map, labels=label_args.labels, needed=args.do_train)
    table, num_others = with_targets(table, name_sources(paths), column, **options)
    num_labels, num_without = len({*table["target"]} - {""}), table["target"][:].count("")
    dropped = {"unreadable": len(skipped), "with other labels": num_others}
    found = f"{describe_table(table)}, {num_labels} labels, {len(skipped)} unreadable"
    for number, what in ((num_others, "with other labels"), (num_without, f"without {column}")):
        found += f", {number} {what}" if number else ""
    args.print_once(f"{name:>12}: {found}")
    return table, dropped


def values_of(table: Dataset, name: str, flag: str, source: str) -> list[str]:
    """The column of texts that a flag asks for, in Unicode's NFC; the manifest's reader renames `emotion` to `label`.

    Raises UserError where there is none.
    """
    numbers_and_ids = ("id", "audio", "start", "num_samples", "channel", "target")
    there = [column for column in table.column_names if column not in numbers_and_ids]
    for known in (name, name.lower(), *(extra for extra in EXTRAS if name.lower() in COLUMNS[extra])):
        if known in there:
            return list(map(nfc, table[known]))
    raise UserError(f"{source}: has no column {name!r}, which --{flag} asks for (it has {', '.join(there) or 'none'}): "
                    f"add it, or set --{flag}")  # fmt: skip


def parse_label_map(entries: Sequence[str]) -> dict[str, str]:
    """`["exc=hap"]` → {"exc": "hap"}."""
    mapping = {}
    for entry in entries:
        old, _, new = (nfc(part.strip()) for part in entry.partition("="))
        refuse((not (old and new), f"--label_map {entry!r}: write OLD=NEW, such as exc=hap"))
        mapping[old] = new
    return mapping


def warn_unmapped(
    table: Dataset, source: str, column: str, label_map: Sequence[str], tell: Callable[[str], None]
) -> None:
    """Name the entries of the map that change no training utterance."""
    written = set(values_of(table, column, "label_column", source))
    if unused := ", ".join(old for old in parse_label_map(label_map) if old not in written):
        tell(f"     warning: --label_map: no training utterance has the label {unused}")


def with_targets(
    table: Dataset, source: str, column: str, label_map: Sequence[str] = (), labels: Sequence[str] = (), *, needed=True
) -> tuple[Dataset, int]:
    """The utterances with their label in the column `target`, and how many have a label that `labels` does not name.

    Raises UserError where nothing is left, or the column or an utterance's label is missing though `needed`.
    """
    mapping, wanted = parse_label_map(label_map), list(map(nfc, labels))
    try:
        written = values_of(table, column, "label_column", source)
    except UserError:
        if needed:
            raise
        written = [""] * len(table)
    values = [mapping.get(value, value) for value in written]
    if needed and "" in values:
        raise UserError(f"{source}: utterance {table['id'][values.index('')]} has an empty {column}, of "
                        f"{values.count('')} in all: fill it in, or remove the row")  # fmt: skip
    kept = [row for row, value in enumerate(values) if not wanted or value in ("", *wanted)]
    found = ", ".join(sort_labels(set(values))[:10])
    refuse(
        (not kept, f"{source}: no utterance is left with one of --labels {' '.join(labels)}; {column} holds {found}")
    )
    table = table.remove_columns("target") if "target" in table.column_names else table
    return table.add_column("target", values).select(kept), len(values) - len(kept)


def nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def sort_labels(labels: Iterable[str]) -> list[str]:
    """By their numbers, and by their letters where they have others: 9, 10; spk9, spk10."""
    labels = sorted(labels)
    if all(re.fullmatch(r"-?\d+(\.\d+)?", label) for label in labels):
        return sorted(labels, key=float)
    # Text and numbers take turns, so that like is compared with like.
    return sorted(labels, key=lambda label: [int(p) if i % 2 else p for i, p in enumerate(re.split(r"(\d+)", label))])


def known_labels(train: Sequence[str], wanted: Sequence[str] = (), folder: Sequence[str] = ()) -> list[str]:
    """The labels of the training utterances: as a `folder` to go on from has them, as `wanted`, or sorted.

    Raises UserError for fewer than two, and for absent ones.
    """
    found, wanted = sort_labels(set(train)), list(dict.fromkeys(map(nfc, wanted)))
    absent = ", ".join(label for label in wanted if label not in found)
    refuse(
        (absent, f"--labels {absent}: no utterance of --train_data has this label: leave it out, or mend --label_map"),
        (
            len(found) < 2,
            f"--train_data: holds a single class ({', '.join(found)}); two are needed: see --label_column",
        ),
    )
    return list(folder) if set(folder) == set(wanted or found) else wanted or found


def check_known(labels: Sequence[str], targets: Sequence[str], source: str) -> None:
    """Raises UserError where an utterance to be scored has a label that the model has not."""
    if unseen := Counter(target for target in targets if target not in ("", *labels)).most_common():
        (label, count), more = unseen[0], f" and {len(unseen) - 1} more labels" if len(unseen) > 1 else ""
        raise UserError(f"{source}: {count} utterances have the label {label!r}{more}, which no training utterance has: "
                        "mend them (--label_map), or leave them out (--labels)")  # fmt: skip


class LabelledDataset(SpeechDataset):
    """As `SpeechDataset`, with one label: `labels` of length 1.

    Where `crop_seconds` is not 0, a longer utterance gives a piece of that length, a pure function of (seed, epoch,
    utterance).
    """

    def __init__(self, table: Dataset, labels: Sequence[str], *args, crop_seconds: float = 0.0, **kwargs):
        super().__init__(table, {label: i for i, label in enumerate(labels)}, *args, **kwargs)
        self.crop = round(crop_seconds * SAMPLING_RATE)
        if self.crop:
            self.lengths = [min(length, self.crop) for length in self.lengths]

    def _labels(self, utterance: dict[str, Any]) -> list[int]:
        return [self.vocabulary[utterance["target"]] if utterance["target"] else UNLABELLED]

    def _decode(self, utterance: dict[str, Any]) -> np.ndarray:
        start, length = round(utterance["start"] * SAMPLING_RATE), utterance["num_samples"]
        if self.crop and length > self.crop:
            drawn = derive(self.seed, CROP, self.epoch, zlib.crc32(utterance["id"].encode()))
            start, length = start + int(below(drawn, length - self.crop + 1)), self.crop
        return read_crop(utterance["audio"], start, length, utterance.get("channel"))


def collate_labelled(items: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Items → input_values (B, S), labels (B,), attention_mask (B, S) if lengths differ.

    A label is -100 for unreadable audio, `UNLABELLED` where it is not known.
    """
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


def check_trained(splits: Sequence[Split], targets: Sequence[str], column: str) -> None:
    """Raises UserError where a fold would train without a label that occurs."""
    for split in splits:
        if absent := sort_labels(set(targets) - {targets[row] for row in split.train}):
            raise UserError(f"--folds {column}: {split.name} would train without the label {absent[0]!r}: give a "
                            "smaller --num_folds, leave the label out (--labels), or fold by another column")  # fmt: skip


def shared_groups(splits: Sequence[Split], groups: Sequence[str]) -> list[str]:
    """Groups that both train and are tested in some split, such as speakers where folds are sessions."""
    shared = set()
    for split in splits:
        shared |= {groups[row] for row in split.train + split.validation} & {groups[row] for row in split.test}
    return sorted(shared - {""})
