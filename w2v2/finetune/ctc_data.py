"""Transcribed speech for CTC: manifests → tables of utterances → decoded items → padded batches.

1. *Read.* `read_sets` reads the manifests, normalises transcripts, and leaves out and counts what lacks audio or text.
2. *Select.* `subsets.select_training` keeps what CTC can learn from, and of this the subset that the flags ask for.
3. *Decode.* `SpeechDataset` decodes an utterance when it is asked for; `collate_speech` pads a batch.

Shapes: B utterances, S samples, U units of a transcript.
"""

import json
import os
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import soxr
import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import Wav2Vec2FeatureExtractor

from w2v2.audio.crops import SAMPLING_RATE, AudioError, measure_length, read_crop
from w2v2.audio.inspection import measure_lengths
from w2v2.data.hashing import SPEED, below, derive
from w2v2.data.utterances import inspect_some, load_manifest
from w2v2.errors import UserError, refuse
from w2v2.evaluate.scores import CHARACTERS, TOKENS
from w2v2.finetune.arguments import CACHE_FOLDER, SKIPPED_FILE, FineTuningArguments
from w2v2.finetune.normalisation import TextRules, count_tags, describe_counts, find_case
from w2v2.finetune.text import SPECIAL, UNKNOWN, CTCArguments, case_of, count_units, encode
from w2v2.manifests.dataset_loading import DatasetSource, Manifest, name_sources
from w2v2.train.durable import read_lines

_IGNORED = -100  # what `Wav2Vec2ForCTC` takes for padding in labels


def read_utterances(paths: Sequence[Manifest], args: Any, columns: Sequence[str] = ()) -> tuple[Dataset, list[dict]]:
    """Utterances whose audio opens, with `columns`, and {id, audio, reason} of the others.

    Of `args`, `data_root`, `output_dir` and `max_skipped_fraction` count. Raises UserError where more are unreadable.
    """
    cache_dir = Path(args.output_dir, CACHE_FOLDER)
    table, skipped = load_manifest(
        paths, data_root=args.data_root, cache_dir=cache_dir, measure=measure_length, further=columns
    )
    found = measure_lengths(sorted(set(table["audio"])), measure_length, cache_dir)
    reasons = {audio: reason for audio, reason in found.items() if isinstance(reason, str)}
    rows, num_utterances = list(zip(table["id"], table["audio"], strict=True)), len(table) + len(skipped)
    skipped += [{"id": id, "audio": audio, "reason": reasons[audio]} for id, audio in rows if audio in reasons]
    if len(skipped) > args.max_skipped_fraction * num_utterances:
        raise UserError(
            f"{name_sources(paths)}: {len(skipped)} of {num_utterances} utterances have unreadable audio, the first "
            f"{skipped[0]['audio']}: {skipped[0]['reason']}; mend the paths (--data_root?) or raise "
            f"--max_skipped_fraction, now {args.max_skipped_fraction}"
        )
    return table.select([row for row, (_, audio) in enumerate(rows) if audio not in reasons]), skipped


def read_once(
    paths: Sequence[Manifest], args: FineTuningArguments, columns: Sequence[str] = ()
) -> tuple[Dataset, list[dict]]:
    """`read_utterances` of a run: the main process fills the cache, looks at a few files, lists what is unreadable."""
    with args.main_process_first(local=False):
        table, skipped = read_utterances(paths, args, columns)
    if args.process_index == 0:
        inspect_some(table)  # warns of stereo whose sides cancel out
        if skipped:
            log_skipped(Path(args.output_dir, SKIPPED_FILE), skipped)
    return table, skipped


def read_sets(
    args: FineTuningArguments, text_args: CTCArguments, known: dict[str, int] | None = None
) -> tuple[dict[str, Dataset], CTCArguments, dict[str, dict[str, int]]]:
    """Name → utterances: `train`, `validation`, and the test sets, which may be without transcripts.

    Also the flags, with the case that `auto` stands for: the training text's, or that of a `known` vocabulary which
    then spells it. And how many utterances of each set are left out, by reason.
    """
    column = text_args.text_column_name
    refuse((column and not args.dataset_name, "--text_column_name needs --dataset_name: manifests name it text"))
    train, validation, test = (args.list_sources(data, column) for data in args.split_flags)
    sets = {"train": train if args.do_train else [], "validation": validation}
    sets |= {name: [path] for name, path in name_sets(test).items()}
    sets = {name: paths for name, paths in sets.items() if paths}
    refuse((not sets, "--do_train false: nothing to evaluate: give --test_data or --validation_data"))
    tables, left_out = {}, {}
    for name, paths in sets.items():
        table, skipped = read_once(paths, args)
        written = [text for text in table["text"] if text] if "text" in table.column_names else []
        if text_args.text_case == "auto":  # the training text is the first
            followed = replace(text_args, text_case=case_of(known or {}))
            follows = known and count_units(map(followed.rules, written), text_args.target_unit).keys() <= known.keys()
            text_args = followed if follows else replace(text_args, text_case=find_case(written))
            if text_args.target_unit == CHARACTERS:
                args.print_once(f"   text case: {text_args.text_case}")
        needed = name in ("train", "validation")
        tables[name], num_dropped = prepare_texts(table, name_sources(paths), text_args.rules, needed=needed)
        left_out[name] = {"unreadable": len(skipped), "without text": num_dropped}
        without = f"{num_dropped} without text" if any(tables[name]["text"]) else "no text: to be transcribed"
        args.print_once(f"{name:>12}: {describe_table(tables[name])}, {len(skipped)} unreadable, {without}")
        if dropped := text_args.rules.count_dropped(written):
            args.print_once(f"     dropped: from the text of {name}: {describe_counts(dropped)}")
        if args.do_train and name != "train":
            warn_shared(tables["train"], tables[name], name, args.print_once)
        if text_args.target_unit == CHARACTERS and (tags := count_tags(written)):
            args.print_once(
                f"     warning: marks in the text of {name} are learnt as spoken letters: {describe_counts(tags, 10)}"
            )
    return tables, text_args, left_out


def warn_shared(train: Dataset, held: Dataset, name: str, tell: Callable[[str], None]) -> None:
    """Say how many utterances of a set to be scored are in training too."""
    place = [
        column
        for column in ("audio", "start", "channel")
        if column in train.column_names and column in held.column_names
    ]
    known = set(zip(*(train[column] for column in place), strict=True))
    if count := sum(map(known.__contains__, zip(*(held[column] for column in place), strict=True))):
        tell(
            f"     warning: {count} of {len(held)} utterances of {name} are training data too: their scores flatter the model"
        )


def num_hours(table: Dataset) -> float:
    return sum(table["num_samples"]) / SAMPLING_RATE / 3600


def describe_table(table: Dataset) -> str:
    return f"{len(table)} utterances, {num_hours(table):.2f} h"


def name_sets(sources: Sequence[Manifest]) -> dict[str, Manifest]:
    """Set name → manifest or split: the name of the split, or of the file without its ending; numbered for two."""
    named: dict[str, Manifest] = {}
    for path in sources:
        stem = "+".join(path.splits) if isinstance(path, DatasetSource) else Path(path).stem
        names = (stem + ending for ending in ("", *(f"_{n}" for n in range(2, len(sources) + 5))))
        named[next(name for name in names if name not in (*named, "train", "validation", "run"))] = path
    return named


def prepare_texts(table: Dataset, name: str, rules: TextRules, *, needed: bool = True) -> tuple[Dataset, int]:
    """The utterances that have a transcript, normalised, and how many have none.

    A set without any transcript comes back whole, with "" for text, or raises UserError where they are `needed`.
    """
    written = table["text"][:] if "text" in table.column_names else []
    table = table.remove_columns("text") if written else table
    if not needed and not any(written):
        return table.add_column("text", [""] * len(table)), 0
    texts = [rules(text or "") for text in written]
    kept = [row for row, text in enumerate(texts) if text]
    special = [row for row in kept if rules.unit == TOKENS and not set(SPECIAL).isdisjoint(texts[row].split())]
    refuse(
        (not written, f"{name}: no text in this manifest: CTC needs a column `text` (or wrd, transcript, sentence)"),
        (not kept, f"{name}: none of its {len(table)} utterances has a transcript: fill in its column `text`"),
        (special, f"{name}: {len(special)} utterances, such as {table['id'][special[0]] if special else ''}, have one of "
                  f"{' '.join(SPECIAL)} among their tokens: take them out of the text, or name them in --drop_tokens"),
    )  # fmt: skip
    return table.add_column("text", texts).select(kept), len(texts) - len(kept)


def longest_first(table: Dataset) -> Dataset:
    """By length, so that evaluation pads little and memory runs out at once, if it does."""
    return table.select(np.argsort(-np.array(table["num_samples"]), kind="stable"))


class SpeechDataset(torch.utils.data.Dataset):
    """Items {"input_values": (S,) float32, "labels": (U,) ids}, decoded when asked for. `lengths` are in samples.

    Audio that turns out to be unreadable is listed in `skip_log`. In its place comes the next utterance that reads
    where `substitute` (training), else a silence without labels, which is not scored (evaluation). `speeds`: each
    utterance is played at one of them, pitch and all, a pure function of (seed, epoch, utterance).
    """

    def __init__(
        self, table: Dataset, vocabulary: dict[str, int], feature_extractor: Wav2Vec2FeatureExtractor, *,
        min_samples: int, skip_log: str | os.PathLike, substitute: bool, speeds: Sequence[float] = (), seed: int = 0,
    ):  # fmt: skip
        self.table, self.vocabulary, self.feature_extractor = table, vocabulary, feature_extractor
        self.min_samples, self.skip_log, self.substitute = min_samples, skip_log, substitute
        self.speeds, self.seed = speeds, seed
        self.lengths, self.epoch = list(table["num_samples"]), 0

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, row: int) -> dict[str, Any]:
        for candidate in range(row, row + (len(self) if self.substitute else 1)):
            utterance = self.table[candidate % len(self)]
            try:
                samples = self._change_speed(self._decode(utterance), utterance["id"])
                return self._item(samples, self._labels(utterance))
            except AudioError as error:
                log_skipped(self.skip_log, [{"id": utterance["id"], "audio": error.path, "reason": error.reason}])
        if self.substitute:
            raise UserError(f"none of the {len(self)} training utterances can be decoded: see {self.skip_log}")
        return self._item(np.zeros(self.min_samples, np.float32), [])

    def _decode(self, utterance: dict[str, Any]) -> np.ndarray:
        start, channel = round(utterance["start"] * SAMPLING_RATE), utterance.get("channel")
        return read_crop(utterance["audio"], start, utterance["num_samples"], channel)

    def _change_speed(self, samples: np.ndarray, id: str) -> np.ndarray:
        if not self.speeds:
            return samples
        drawn = below(derive(self.seed, SPEED, self.epoch, zlib.crc32(id.encode())), len(self.speeds))
        return soxr.resample(samples, self.speeds[int(drawn)] * SAMPLING_RATE, SAMPLING_RATE)

    def _labels(self, utterance: dict[str, Any]) -> list[int]:
        """Of a text that is not known: a single unknown, to tell it from audio that cannot be read."""
        return encode(utterance["text"], self.vocabulary) or [self.vocabulary[UNKNOWN]]

    def _item(self, samples: np.ndarray, labels: list[int]) -> dict[str, Any]:
        samples = np.pad(samples, (0, max(0, self.min_samples - len(samples))))
        values = self.feature_extractor(samples, sampling_rate=SAMPLING_RATE).input_values[0]
        return {"input_values": np.asarray(values, np.float32), "labels": labels}


def log_skipped(path: str | os.PathLike, entries: Iterable[dict[str, str]]) -> None:
    """Append what `skipped_audio.jsonl` does not list yet; each line is one write, for several workers append."""
    known = read_skipped(path)
    with open(path, "a", encoding="utf-8", errors="surrogateescape", buffering=1) as file:
        for entry in entries:
            if (entry["id"], entry["audio"]) not in known:
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")


def read_skipped(path: str | os.PathLike) -> dict[tuple[str, str], dict[str, str]]:
    """Unreadable utterances met so far, by id and path; several workers may have met the same one."""
    return {(entry["id"], entry["audio"]): entry for entry in read_lines(path)}


def check_skipped(data: SpeechDataset, max_fraction: float) -> None:
    """Raises UserError where more of a set's utterances than allowed could not be decoded, or all of them."""
    if not (listed := read_skipped(data.skip_log)):  # this is looked at after every logged update
        return
    known = set(zip(data.table["id"], data.table["audio"], strict=True))
    skipped = [entry for key, entry in listed.items() if key in known]
    if skipped and (len(skipped) > max_fraction * len(known) or len(skipped) == len(known)):
        raise UserError(
            f"{len(skipped)} of {len(known)} utterances cannot be decoded, such as {skipped[0]['audio']}: "
            f"{skipped[0]['reason']}; mend or leave out what skipped_audio.jsonl lists, or raise --max_skipped_fraction"
        )


def collate_speech(items: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Items → input_values (B, S), labels (B, U) padded with -100, and attention_mask (B, S) where lengths differ."""
    values = [torch.from_numpy(item["input_values"]) for item in items]
    labels = [torch.tensor(item["labels"] or [_IGNORED]) for item in items]
    padded = pad_sequence(labels, batch_first=True, padding_value=_IGNORED)
    batch = {"input_values": pad_sequence(values, batch_first=True), "labels": padded}
    if len({len(value) for value in values}) > 1:
        batch["attention_mask"] = pad_sequence([torch.ones(len(v), dtype=torch.long) for v in values], batch_first=True)
    return batch
