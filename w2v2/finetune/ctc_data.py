"""Transcribed speech for CTC: tables of utterances, the data set that decodes them, and its collator.

Shapes: B utterances, S samples, U units of a transcript.
"""

import contextlib
import errno
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor

from w2v2.data.audio import SAMPLING_RATE, AudioError, probe, read_crop
from w2v2.data.manifest import load_manifest
from w2v2.errors import UserError
from w2v2.finetune.arguments import SKIPPED_FILE, FineTuningArguments
from w2v2.finetune.subsets import draw_hours, take_listed
from w2v2.finetune.task_arguments import CTCArguments
from w2v2.finetune.text import UNKNOWN, encode, frames_needed, split_units
from w2v2.model.feature_encoder import min_samples, num_frames

logger = logging.getLogger(__name__)

_IGNORED = -100  # what `Wav2Vec2ForCTC` takes for padding in labels


def prepare_texts(
    table: Dataset, name: str, normalize: Callable[[str], str], *, needed: bool = True
) -> tuple[Dataset, dict[str, int]]:
    """The utterances that have a transcript, normalised, and how many were dropped by reason.

    A set without a single transcript raises UserError where they are `needed`; otherwise all of it comes back, with "" for text.
    """
    written = table["text"][:] if "text" in table.column_names else []
    if not needed and not any(written):
        table = table.remove_columns("text") if written else table
        return table.add_column("text", [""] * len(table)), {"no_text": 0}
    if not written:
        raise UserError(f"{name}: no text in this manifest: CTC needs a column `text` (or wrd, transcript, sentence)")
    texts = [normalize(text or "") for text in written]
    kept = [row for row, text in enumerate(texts) if text]
    if not kept:
        raise UserError(f"{name}: none of its {len(table)} utterances has a transcript: fill in its column `text`")
    table = table.remove_columns("text").add_column("text", texts).select(kept)
    return table, {"no_text": len(texts) - len(kept)}


def select_trainable(
    table: Dataset,
    unit: str,
    num_frames: Callable[[int], int],
    min_seconds: float,
    max_seconds: float | None,
) -> tuple[Dataset, dict[str, int]]:
    """Utterances within the lengths, and long enough for their transcript (CTC's loss is infinite otherwise).

    Returns them and how many were dropped by reason. `num_frames` gives latent frames from samples.
    """
    longest = float("inf") if max_seconds is None else max_seconds
    reasons: Counter[str] = Counter()
    kept = []
    for row, (samples, text) in enumerate(zip(table["num_samples"], table["text"], strict=True)):
        seconds = samples / SAMPLING_RATE
        if seconds < min_seconds:
            reasons["too_short"] += 1
        elif seconds > longest:
            reasons["too_long"] += 1
        elif num_frames(samples) < frames_needed(split_units(text, unit)):
            reasons["text_longer_than_audio"] += 1
        else:
            kept.append(row)
    return table.select(kept), dict(reasons)


def longest_first(table: Dataset) -> Dataset:
    """By length, so that evaluation pads little and memory runs out at once, if it does."""
    lengths = table["num_samples"]
    return table.select(sorted(range(len(table)), key=lambda row: -lengths[row]))


def drop_unreadable(table: Dataset, num_threads: int = 16) -> tuple[Dataset, list[dict[str, str]]]:
    """The utterances whose file opens as audio, by its header, and a list of {id, audio, reason} of the others."""
    paths = sorted(set(table["audio"]))
    with ThreadPoolExecutor(num_threads) as threads:
        reasons = dict(zip(paths, threads.map(_why_unreadable, paths), strict=True))
    rows = list(zip(table["id"], table["audio"], strict=True))
    skipped = [{"id": id, "audio": audio, "reason": reasons[audio]} for id, audio in rows if reasons[audio]]
    return table.select([row for row, (_, audio) in enumerate(rows) if not reasons[audio]]), skipped


def _why_unreadable(path: str) -> str | None:
    try:
        probe(path)
    except AudioError as error:
        return error.reason
    return None


class SpeechDataset(torch.utils.data.Dataset):
    """Utterances decoded when they are asked for; nothing is cached.

    An item is {"input_values": (S,) float32, "labels": (U,) ids}. Audio that turns out to be unreadable is appended to
    `skip_log` by whichever worker meets it, one JSON line; in its place comes the next utterance that reads where `substitute`
    (training), else a silence without labels (evaluation: whoever scores leaves out items without labels).
    """

    def __init__(
        self,
        table: Dataset,
        vocabulary: dict[str, int],
        feature_extractor: Wav2Vec2FeatureExtractor,
        *,
        min_samples: int,
        skip_log: str | os.PathLike,
        substitute: bool,
    ):
        self.table, self.vocabulary, self.feature_extractor = table, vocabulary, feature_extractor
        self.min_samples, self.skip_log, self.substitute = min_samples, skip_log, substitute
        self.lengths = list(table["num_samples"])

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, row: int) -> dict[str, Any]:
        for candidate in range(row, row + (len(self) if self.substitute else 1)):
            utterance = self.table[candidate % len(self)]
            try:
                return self._item(self._read(utterance), self._labels(utterance))
            except AudioError as error:
                log_skipped(self.skip_log, [{"id": utterance["id"], "audio": error.path, "reason": error.reason}])
        if self.substitute:
            raise UserError(f"none of the {len(self)} training utterances can be decoded: see {self.skip_log}")
        return self._item(np.zeros(self.min_samples, np.float32), [])

    def _read(self, utterance: dict[str, Any]) -> np.ndarray:
        return read_crop(utterance["audio"], round(utterance["start"] * SAMPLING_RATE), utterance["num_samples"])

    def _labels(self, utterance: dict[str, Any]) -> list[int]:
        """Of a text that is not known: a single unknown, to tell it from audio that cannot be read."""
        return encode(utterance["text"], self.vocabulary) or [self.vocabulary[UNKNOWN]]

    def _item(self, samples: np.ndarray, labels: list[int]) -> dict[str, Any]:
        samples = np.pad(samples, (0, max(0, self.min_samples - len(samples))))
        values = self.feature_extractor(samples, sampling_rate=SAMPLING_RATE).input_values[0]
        return {"input_values": np.asarray(values, np.float32), "labels": labels}


def log_skipped(path: str | os.PathLike, entries: Iterable[dict[str, str]]) -> None:
    """Append what is new to `skipped_audio.jsonl`; each line is one write, so that processes do not tear one another's.

    What a full disk refuses is warned of, and written when the file is met again, in the next epoch.
    """
    known = read_skipped(path)
    lines = [json.dumps(e, ensure_ascii=False) + "\n" for e in entries if (e["id"], e["audio"]) not in known]
    try:
        with open(path, "ab", buffering=0) as file:
            for line in lines:
                if _is_torn(path):
                    line = "\n" + line
                data = line.encode("utf-8", "surrogateescape")
                if file.write(data) < len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    except OSError as error:
        logger.warning(
            "%s cannot be written (%s): %d files that were skipped may not be in it", path, error.strerror, len(lines)
        )


def _is_torn(path: str | os.PathLike) -> bool:
    """Whether the last line of a file is not a whole one."""
    with open(path, "rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 1))
        return end > 0 and file.read(1) != b"\n"


def read_skipped(path: str | os.PathLike) -> dict[tuple[str, str], dict[str, str]]:
    """Unreadable utterances met so far, by id and path; several workers may have met the same one."""
    if not os.path.exists(path):
        return {}
    entries = {}
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            with contextlib.suppress(ValueError):  # a line that a kill cut short
                entry = json.loads(line)
                entries[entry["id"], entry["audio"]] = entry
    return entries


def collate_ctc(items: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Items → input_values (B, S) padded with zeros, labels (B, U) padded with -100, attention_mask (B, S) if lengths differ."""
    lengths = torch.tensor([len(item["input_values"]) for item in items])
    input_values = torch.zeros(len(items), int(lengths.max()))
    labels = torch.full((len(items), max(1, *(len(item["labels"]) for item in items))), _IGNORED)
    for row, item in enumerate(items):
        input_values[row, : lengths[row]] = torch.from_numpy(item["input_values"])
        labels[row, : len(item["labels"])] = torch.tensor(item["labels"], dtype=torch.long)
    batch = {"input_values": input_values, "labels": labels}
    if int(lengths.min()) < int(lengths.max()):
        batch["attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    return batch


CACHE_FOLDER = "_cache"  # in the output folder


def read_sets(args: FineTuningArguments, text_args: CTCArguments) -> dict[str, Dataset]:
    """Name → utterances: `train` and `validation` where they are given, and the test sets.

    A test set may have no transcripts at all; it is then transcribed and not scored.
    """
    sets = {name: paths for name, paths in (("train", args.train_data), ("validation", args.validation_data)) if paths}
    if not args.do_train:
        sets.pop("train", None)
    sets |= {name: [path] for name, path in name_sets(args.test_data).items()}
    if not sets:
        raise UserError("--do_train false: nothing to evaluate: give --test_data or --validation_data")
    return {name: read_set(name, paths, args, text_args) for name, paths in sets.items()}


def name_sets(paths: list[str]) -> dict[str, str]:
    """Set name → manifest: the file's name without its ending, numbered where that would name two."""
    named: dict[str, str] = {}
    for path in paths:
        name = stem = Path(path).stem
        number = 2
        while name in named or name in ("train", "validation", "run"):
            name, number = f"{stem}_{number}", number + 1
        named[name] = path
    return named


def read_set(name: str, paths: list[str], args: FineTuningArguments, text_args: CTCArguments) -> Dataset:
    """Utterances of one set that have a transcript and audio that opens; the others are counted, and listed if unreadable.

    Raises UserError where more than `max_skipped_fraction` of them are unreadable.
    """
    with args.main_process_first(local=False):
        cache_dir = Path(args.output_dir, CACHE_FOLDER)
        table, skipped = load_manifest(paths, data_root=args.data_root, cache_dir=cache_dir, probe=probe)
    label = ", ".join(paths)
    num_utterances = len(table) + len(skipped)
    table, unopened = drop_unreadable(table)
    skipped += unopened
    if skipped and args.process_index == 0:
        log_skipped(Path(args.output_dir, SKIPPED_FILE), skipped)
    if len(skipped) > args.max_skipped_fraction * num_utterances:
        first = skipped[0]
        raise UserError(
            f"{label}: {len(skipped)} of {num_utterances} utterances have unreadable audio, the first {first['audio']}: "
            f"{first['reason']}; mend the paths (--data_root?) or raise --max_skipped_fraction, now {args.max_skipped_fraction}"
        )
    table, dropped = prepare_texts(table, label, text_args.rules, needed=name in ("train", "validation"))
    without = f"{dropped['no_text']} without text" if has_texts(table) else "no text: to be transcribed"
    say(args, f"{name:>12}: {describe_table(table)}, {len(skipped)} unreadable, {without}")
    return table


def select_training(
    train: Dataset, config: Wav2Vec2Config, args: FineTuningArguments, text_args: CTCArguments
) -> Dataset:
    """What a run learns from: the utterances listed, within the lengths and long enough for their text, and of these so many hours."""
    if text_args.train_list:
        train = take_listed(train, text_args.train_list)
    kept, dropped = select_trainable(
        train, text_args.target_unit, partial(num_frames, config), args.min_seconds, args.max_seconds
    )
    listed = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
    if not len(kept):
        raise UserError(f"--train_data: every utterance was dropped ({listed}): see --min_seconds and --max_seconds")
    if dropped:
        say(args, f"     dropped: {listed} (training)")
    if text_args.train_hours is not None:
        kept = draw_hours(kept, text_args.train_hours, text_args.subset_seed)
    if text_args.train_list or text_args.train_hours is not None:
        say(args, f"  learn from: {describe_table(kept)}")
    return kept


def as_audio(
    table: Dataset, vocabulary: dict[str, int], extractor: Wav2Vec2FeatureExtractor, config: Wav2Vec2Config,
    args: FineTuningArguments, *, train: bool = False,
) -> SpeechDataset:  # fmt: skip
    """A table as a data set that decodes; for evaluation the longest utterances come first."""
    return SpeechDataset(
        table if train else longest_first(table),
        vocabulary,
        extractor,
        min_samples=min_samples(config),
        skip_log=Path(args.output_dir, SKIPPED_FILE),
        substitute=train,
    )


def has_texts(table: Dataset) -> bool:
    return any(table["text"])


def num_hours(table: Dataset) -> float:
    return sum(table["num_samples"]) / SAMPLING_RATE / 3600


def describe_table(table: Dataset) -> str:
    return f"{len(table)} utterances, {num_hours(table):.2f} h"


def say(args: FineTuningArguments, line: str) -> None:
    """A line on the console, once."""
    if args.process_index == 0:
        print(line, flush=True)
