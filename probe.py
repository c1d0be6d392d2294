"""What is in each layer of a frozen wav2vec 2.0? Linear probes, in minutes on a CPU, without fine-tuning anything.

    python probe.py --checkpoints runs/a/checkpoint-* --train_data emotion.csv --folds speaker --output_dir runs/b

For a label (emotion, speaker, …) a linear classifier reads the mean over time of each layer; for `--target characters`
a linear CTC head reads its frames. Features are computed once. Beside several checkpoints stand random weights, and
the hours that each had heard.
"""

import w2v2  # noqa: F401  # isort: skip  # before torch: sets how OpenMP's threads wait

import json
import shutil
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets

from w2v2.audio.crops import SAMPLING_RATE
from w2v2.cli import parse_command_line, run_script
from w2v2.errors import UserError
from w2v2.evaluate.scores import CHARACTERS
from w2v2.finetune import ctc_data, labels, text
from w2v2.finetune.labels import Split, group_splits
from w2v2.finetune.normalisation import TextRules, find_case
from w2v2.finetune.subsets import select_lengths
from w2v2.manifests.dataset_loading import Manifest, name_sources
from w2v2.model.feature_encoder import num_frames
from w2v2.probe.arguments import ProbingArguments
from w2v2.probe.features import FrozenModel, read_table, save_frames
from w2v2.probe.linear import CharacterProbe, best_layer, format_table, heard_hours, hold_out, probe_layers
from w2v2.report.page import report_run
from w2v2.train.events import EVENTS_FILE, note_finish, note_start

RESULTS_FILE = "probe.json"
COLUMNS = {"id", "audio", "start", "num_samples", "channel", "target"}


def main(argv: list[str] | None = None) -> None:
    (args,) = parse_command_line((ProbingArguments,), argv)
    folder = args.prepare_output_dir(RESULTS_FILE)
    is_text = args.target == CHARACTERS
    measure = "cer" if is_text else args.measure

    # 1. Data: one table, and the rows that train, validate and test.
    table, splits, dropped = gather_texts(args) if is_text else gather_labels(args)
    targets, tested = table["target"][:], [row for split in splits for row in split.test]
    hours, first = sum(table["num_samples"]) / SAMPLING_RATE / 3600, splits[0]
    counts = f"{len(first.train)}, {len(first.validation)}, {len(first.test)} (train, validation, test)"
    what = f"{len(splits)} folds by {args.folds}, the first of" if args.folds else "split into"
    print(f"{args.target}: {len(table)} utterances, {hours:.2f} h, {what} {counts}", flush=True)
    if dropped := +dropped:
        print(f"     dropped: {', '.join(f'{number} {reason}' for reason, number in dropped.items())}", flush=True)

    (folder / EVENTS_FILE).unlink(missing_ok=True)  # of the results that are replaced
    note_start(args)

    # 2. Probes: features of all utterances once a model, then every layer by itself.
    models = list_models(args)
    for found in models:
        config_name = None if found["source"] else args.config_name or args.checkpoints[0]
        model = FrozenModel(found["source"], config_name, seed=args.seed, device=args.device)
        if is_text:
            layers = probe_texts(model, table, first, args)
        else:
            layers = probe_layers(args.classifier, model.means(table), targets, splits, measure)
        best = best_layer(layers, lower_is_better=is_text)
        found |= {"best_layer": best["layer"], measure: best[measure], "layers": layers}
        heard = f", {found['hours']:.2f} h heard" if found["hours"] is not None else ""
        print(f"{found['name']}: best layer {best['layer']}, {measure} {best[measure]:.1%}{heard}", flush=True)

    # 3. Results: a table, pictures, and all figures in a file.
    counted = Counter(targets[row] for row in tested)  # a constant answer earns 1 / labels, or the commonest's share
    chance = {"uar": 1 / len(counted), "accuracy": max(counted.values()) / len(tested)}.get(measure)
    print(f"\n{measure}, test; * the layer that validated best" + (f"; chance {chance:.1%}" if chance else ""))
    print(format_table(models, measure))
    run = {"target": args.target, "folds": args.folds, "num_folds": len(splits) if args.folds else None,
           "seed": args.seed, "classifier": None if is_text else args.classifier, "utterances": len(table),
           "tested": len(tested), "dropped": dropped}  # fmt: skip
    whole = {"measure": measure, "chance": chance, "models": models, "run": run}
    (folder / RESULTS_FILE).write_text(json.dumps(whole, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    note_finish(args)
    report_run(args)


def list_models(args: ProbingArguments) -> list[dict[str, Any]]:
    """Name, source and hours heard of each model, by these hours where all are known; random weights last."""
    names = [Path(source).name for source in args.checkpoints]
    models = [
        {"name": name if names.count(name) == 1 else source, "source": source, "hours": heard_hours(source)}
        for name, source in zip(names, args.checkpoints, strict=True)
    ]
    if all(model["hours"] is not None for model in models):
        models.sort(key=lambda model: model["hours"])
    return models + [{"name": "random weights", "source": None, "hours": None}] * args.random_weights


def gather_labels(args: ProbingArguments) -> tuple[Dataset, list[Split], Counter[str]]:
    """All utterances with their label in `target`, the splits of their rows, and how many are left out, by reason."""
    dropped = Counter()

    def read(paths: list[Manifest], further: list[str]) -> Dataset:
        table = read_table(paths, [args.target, *further], args)
        if paths is training:
            labels.warn_unmapped(table, name_sources(paths), args.target, args.label_map, print)
        table, num_others = labels.with_targets(table, name_sources(paths), args.target, args.label_map, args.labels)
        dropped["with other labels"] += num_others
        return table

    training, *held_out = (args.list_sources(data) for data in args.split_flags)
    whole = read(training, [args.folds] if args.folds else [])
    train, dropped["by their length (training)"] = select_lengths(whole, args.min_seconds, args.max_seconds)
    classes = labels.known_labels(train["target"], args.labels)
    if args.folds:
        groups, ids, fit = labels.values_of(whole, args.folds, "folds", "--train_data"), whole["id"][:], {*train["id"]}
        splits = group_splits(groups, args.folds, args.num_folds)
        splits = [replace(split, train=[row for row in split.train if ids[row] in fit]) for split in splits]
        labels.check_trained(splits, whole["target"][:], args.folds)
        return whole, splits, dropped
    held = [read(paths, []) for paths in held_out if paths]
    for paths, table in zip(filter(None, held_out), held, strict=True):
        labels.check_known(classes, table["target"], name_sources(paths))
    return *join_tables([train, *held], train["target"]), dropped


def gather_texts(args: ProbingArguments) -> tuple[Dataset, list[Split], Counter[str]]:
    """All transcribed utterances with their normalised text in `target`, the splits, and how many are left out."""
    dropped, rules = Counter(), None

    def read(paths: list[Manifest]) -> Dataset:
        nonlocal rules
        table = read_table(paths, [], args)
        written = table["text"][:] if "text" in table.column_names else []
        rules = rules or TextRules(case=find_case(filter(None, written)))  # the training text is the first
        table, num_dropped = ctc_data.prepare_texts(table, name_sources(paths), rules)
        dropped["without text"] += num_dropped
        return table.add_column("target", table["text"])

    training, *held_out = (args.list_sources(data) for data in args.split_flags)
    train = read(training)
    train, dropped["by their length (training)"] = select_lengths(train, args.min_seconds, args.max_seconds)
    held = [read(paths) for paths in held_out if paths]
    return *join_tables([train, *held], [""] * len(train)), dropped


def join_tables(tables: list[Dataset], classes: list[str]) -> tuple[Dataset, list[Split]]:
    """Training, validation (else a fifth of each class in training) and test tables as one, and the rows of each."""
    for name, held in zip(("test", "validation"), reversed(tables[1:])):  # noqa: B905
        ctc_data.warn_shared(tables[0], held, name, print)
    table = concatenate_datasets(
        [table.select_columns(list(COLUMNS.intersection(table.column_names))) for table in tables]
    )
    ends = np.cumsum([0, *map(len, tables)]).tolist()
    train, *held = (list(range(first, last)) for first, last in pairwise(ends))
    if len(held) == 1:
        train, validation = hold_out(table["id"][:], classes, train)
        if not validation:
            raise UserError(
                "--train_data: too few utterances to hold a fifth out for validation: give --validation_data"
            )
        held = [validation, *held]
    return table, [Split("test", train, *held)]


def probe_texts(model: FrozenModel, table: Dataset, split: Split, args: ProbingArguments) -> list[dict[str, Any]]:
    """Error rates at every layer; the frames lie in files meanwhile."""
    texts, lengths, cache = table["target"][:], table["num_samples"][:], Path(args.output_dir, "_frames")
    vocabulary = text.build_vocabulary(texts[row] for row in split.train)
    needed = {row: text.frames_needed(text.encode(texts[row], vocabulary)) for row in split.train}
    train = [row for row in split.train if num_frames(model.config, lengths[row]) >= needed[row]]
    if len(train) < len(split.train):
        print(
            f"     dropped: {len(split.train) - len(train)} with a text longer than their audio (training)", flush=True
        )
    probe = CharacterProbe(texts, vocabulary, args.ctc_updates, args.seed)
    try:
        layers, starts = save_frames(model, table, cache)
        return probe.probe_layers(layers, starts, replace(split, train=train))
    finally:
        shutil.rmtree(cache, ignore_errors=True)


if __name__ == "__main__":
    run_script(main)
