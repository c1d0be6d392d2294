"""Which utterances a run learns from: within some lengths, so many hours drawn, or those that a list names.

A draw is a pure function of the seed and of the utterances' ids, lengths and speakers, whatever the order of rows.
Draws nest: with one seed, the 10 minutes are part of the 1 hour.
"""

import hashlib
import os
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from datasets import Dataset
from transformers import Wav2Vec2Config

from w2v2.audio.crops import AUDIO_SUFFIXES, SAMPLING_RATE
from w2v2.errors import UserError, refuse
from w2v2.finetune.arguments import FineTuningArguments
from w2v2.finetune.ctc_data import describe_table, num_hours
from w2v2.finetune.text import CTCArguments, frames_needed, split_units
from w2v2.model.feature_encoder import num_frames


def select_training(
    train: Dataset, config: Wav2Vec2Config, args: FineTuningArguments, text_args: CTCArguments
) -> tuple[Dataset, dict[str, int]]:
    """What a run learns from: the utterances listed, of fitting length, and so many hours; and what is left out, and why.

    CTC's loss is infinite where an utterance, at its highest speed, has fewer latent frames than its text needs.
    """
    if text_args.train_list:
        train = take_listed(train, text_args.train_list)
    kept, num_others = select_lengths(train, args.min_seconds, args.max_seconds)
    needed = [frames_needed(split_units(text, text_args.target_unit)) for text in kept["text"]]
    fastest = max(args.speed_perturbation, default=1)
    fits = [num_frames(config, int(n / fastest)) >= least for n, least in zip(kept["num_samples"], needed, strict=True)]
    kept = kept.select(np.flatnonzero(fits))
    dropped = {"by their length": num_others, "with a text longer than their audio": len(fits) - len(kept)}
    counts = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
    if not len(kept):
        raise UserError(
            f"--train_data: every utterance was dropped ({counts}): lower --min_seconds or raise --max_seconds"
        )
    if len(kept) < len(train):
        args.print_once(f"     dropped: {counts} (training)")
    if text_args.train_hours is not None:
        kept = draw_hours(kept, text_args.train_hours, text_args.subset_seed)
    if text_args.train_list or text_args.train_hours is not None:
        args.print_once(f"  learn from: {describe_table(kept)}")
    return kept, dropped


def select_lengths(table: Dataset, min_seconds: float, max_seconds: float | None) -> tuple[Dataset, int]:
    """The utterances within these lengths, and how many are not."""
    seconds = np.array(table["num_samples"]) / SAMPLING_RATE
    kept = np.flatnonzero((seconds >= min_seconds) & (seconds <= (np.inf if max_seconds is None else max_seconds)))
    if not len(kept):
        raise UserError(
            "--train_data: every utterance was dropped by its length: lower --min_seconds or raise --max_seconds"
        )
    return table.select(kept), len(table) - len(kept)


def draw_hours(table: Dataset, hours: float, seed: int) -> Dataset:
    """At most `hours` of the utterances, less by under one utterance, in the table's order; speakers share evenly.

    Raises UserError where the table holds less than `hours`.
    """
    there = num_hours(table)
    if hours > there:
        raise UserError(f"--train_hours {hours:g}: the training data hold {there:.2f} h that can be used: ask for less")
    order = draw_order(table, seed)
    heard = np.cumsum(np.array(table["num_samples"])[order])
    num_drawn = int(np.searchsorted(heard, round(hours * 3600 * SAMPLING_RATE), side="right"))
    refuse((num_drawn == 0, f"--train_hours {hours:g} is shorter than one utterance: ask for more"))
    return table.select(sorted(order[:num_drawn]))


def draw_order(table: Dataset, seed: int) -> list[int]:
    """All rows in the order in which draws take them: by the time that their speaker had before, ties by hash."""
    ids, lengths = table["id"][:], table["num_samples"][:]
    speakers = table["speaker"][:] if "speaker" in table.column_names else [""] * len(ids)
    hashes = [_hash(seed, id) for id in ids]
    heard: Counter[str] = Counter()
    keys = {}
    for row in sorted(range(len(ids)), key=hashes.__getitem__):
        speaker = speakers[row] or ids[row]  # an utterance without a speaker is one of its own
        keys[row] = (heard[speakers[row]] if speakers[row] else 0, _hash(seed, speaker), hashes[row])
        heard[speakers[row]] += lengths[row]
    return sorted(keys, key=keys.__getitem__)


def _hash(seed: int, name: str) -> bytes:
    return hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=16).digest()


def take_listed(table: Dataset, path: str) -> Dataset:
    """The utterances that a list names, in the table's order.

    `path` is a folder of audio, as Libri-Light's `librispeech_finetuning/1h`, or a text file: wav2letter's lists,
    fairseq's manifests, `.trans.txt`. The first field of a line counts, an id or the path of an audio file. An
    utterance is known by its id, by the last part of its id, or by its audio file's name. Raises UserError where the
    list is missing, empty, ambiguous, or names what the table lacks.
    """
    rows_of = defaultdict(set)
    for row, (id, audio) in enumerate(zip(table["id"], table["audio"], strict=True)):
        for name in (id, _stem(id), _stem(audio)):
            rows_of[name].add(row)
    found = {name: rows_of.get(name) or rows_of.get(_stem(name), set()) for name in _read_list(Path(path))}
    missing = [name for name, rows in found.items() if not rows]
    twins = [name for name, rows in found.items() if len(rows) > 1]
    refuse(
        (not found, f"--train_list {path} names no utterance: write an id or an audio file's path in each line"),
        (missing, f"--train_list {path}: {len(missing)} of its {len(found)} utterances are not in --train_data, the "
                  f"first {', '.join(missing[:1])}: give the manifests that hold them all"),
        (twins, f"--train_list {path}: {', '.join(twins[:1])} stands for several utterances of --train_data: use ids"),
    )  # fmt: skip
    return table.select(sorted(set().union(*found.values())))


def _stem(name: str) -> str:
    stem, ending = os.path.splitext(name.rsplit("/", 1)[-1])
    return stem if ending.lower() in AUDIO_SUFFIXES else stem + ending


def _read_list(path: Path) -> list[str]:
    """The names in a list, in order; those of the audio files where `path` is a folder."""
    if path.is_dir():
        return sorted(_stem(file.name) for file in path.rglob("*") if file.suffix.lower() in AUDIO_SUFFIXES)
    try:
        lines = [line.rstrip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--train_list {path} cannot be read: {error}") from None
    # fairseq's manifests name their root first, then `path <tab> samples`.
    if len(lines) > 1 and "\t" not in lines[0] and lines[1].count("\t") == 1 and lines[1].split("\t")[1].isdigit():
        lines = lines[1:]
    return [line.split("\t" if "\t" in line else None)[0] for line in lines]
