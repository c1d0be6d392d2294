"""The sets of utterances of a recognition run: read, checked, and, for training, cut down to what it may learn from."""

from functools import partial
from pathlib import Path

from datasets import Dataset
from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor

from w2v2.data.audio import SAMPLING_RATE, probe
from w2v2.data.manifest import load_manifest
from w2v2.errors import UserError
from w2v2.finetune import ctc
from w2v2.finetune.arguments import SKIPPED_FILE, FineTuningArguments
from w2v2.finetune.ctc_arguments import CTCArguments
from w2v2.finetune.subsets import draw_hours, take_listed
from w2v2.model.backbone import min_samples, num_frames

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
    table, unopened = ctc.drop_unreadable(table)
    skipped += unopened
    if skipped and args.process_index == 0:
        ctc.log_skipped(Path(args.output_dir, SKIPPED_FILE), skipped)
    if len(skipped) > args.max_skipped_fraction * num_utterances:
        first = skipped[0]
        raise UserError(
            f"{label}: {len(skipped)} of {num_utterances} utterances have unreadable audio, the first {first['audio']}: "
            f"{first['reason']}; mend the paths (--data_root?) or raise --max_skipped_fraction, now {args.max_skipped_fraction}"
        )
    table, dropped = ctc.prepare_texts(table, label, text_args.rules, needed=name in ("train", "validation"))
    without = f"{dropped['no_text']} without text" if has_texts(table) else "no text: to be transcribed"
    say(args, f"{name:>12}: {describe_table(table)}, {len(skipped)} unreadable, {without}")
    return table


def select_training(
    train: Dataset, config: Wav2Vec2Config, args: FineTuningArguments, text_args: CTCArguments
) -> Dataset:
    """What a run learns from: the utterances listed, within the lengths and long enough for their text, and of these so many hours."""
    if text_args.train_list:
        train = take_listed(train, text_args.train_list)
    kept, dropped = ctc.select_trainable(
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
) -> ctc.SpeechDataset:  # fmt: skip
    """A table as a data set that decodes; for evaluation the longest utterances come first."""
    return ctc.SpeechDataset(
        table if train else ctc.longest_first(table),
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
