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

from w2v2.cli import parse_command_line, run_script
from w2v2.data.audio import SAMPLING_RATE
from w2v2.errors import UserError
from w2v2.evaluate.error_rates import CHARACTERS
from w2v2.evaluate.plots import draw_hours, draw_layers
from w2v2.finetune import ctc_data, labels, text
from w2v2.finetune.labels import Split, group_splits
from w2v2.finetune.subsets import select_lengths
from w2v2.model.feature_encoder import num_frames
from w2v2.probe.arguments import ProbingArguments
from w2v2.probe.characters import CharacterProbe
from w2v2.probe.features import FrozenModel, read_table, save_frames
from w2v2.probe.linear import best_layer, format_table, heard_hours, hold_out, probe_layers

RESULTS_FILE = "probe.json"
COLUMNS = ["id", "audio", "start", "num_samples", "target"]


def main(argv: list[str] | None = None) -> None:
    (args,) = parse_command_line((ProbingArguments,), argv)
    folder = args.prepare_output_dir(RESULTS_FILE)

    # Data: one table, and the rows that train, validate and test.
    is_text = args.target == CHARACTERS
    table, splits = gather_texts(args) if is_text else gather_labels(args)
    measure = "cer" if is_text else args.measure
    describe(table, splits, args)

    # Probes: features of all utterances once a model, then every layer by itself.
    results = []
    for name, source in list_models(args):
        config_name = None if source else args.config_name or args.checkpoints[0]
        model = FrozenModel(source, config_name, seed=args.seed, device=args.device)
        if is_text:
            layers = probe_texts(model, table, splits[0], args)
        else:
            layers = probe_layers(args.classifier, model.means(table), table["target"][:], splits, measure)
        best = best_layer(layers, lower_is_better=is_text)
        hours = heard_hours(source) if source else None
        found = {"name": name, "source": source, "hours": hours, "best_layer": best["layer"], measure: best[measure]}
        results.append(found | {"layers": layers})
        heard = f", {hours:.2f} h heard" if hours is not None else ""
        print(f"{name}: best layer {best['layer']}, {measure} {best[measure]:.1%}{heard}", flush=True)

    # Results: a table, pictures, and all figures in a file.
    chance = (
        None if is_text else chance_level(measure, [table["target"][row] for split in splits for row in split.test])
    )
    print(f"\n{measure}, test; * the layer that validated best" + (f"; chance {chance:.1%}" if chance else ""))
    print(format_table(results, measure))
    run = {"target": args.target, "folds": args.folds, "num_folds": len(splits) if args.folds else None,
           "seed": args.seed, "classifier": None if is_text else args.classifier, "utterances": len(table),
           "tested": sum(len(split.test) for split in splits)}  # fmt: skip
    whole = {"measure": measure, "chance": chance, "models": results, "run": run}
    (folder / RESULTS_FILE).write_text(json.dumps(whole, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    draw(folder / "plots", results, measure, chance)


def list_models(args: ProbingArguments) -> list[tuple[str, str | None]]:
    """Names and sources, by hours heard where they are known; random weights (None) last."""
    names = [Path(source).name for source in args.checkpoints]
    named = [
        (name if names.count(name) == 1 else path, path) for name, path in zip(names, args.checkpoints, strict=True)
    ]
    hours = {source: heard_hours(source) for source in args.checkpoints}
    if None not in hours.values():
        named.sort(key=lambda entry: hours[entry[1]])
    return named + [("random weights", None)] * args.random_weights


def gather_labels(args: ProbingArguments) -> tuple[Dataset, list[Split]]:
    """All utterances with their label in `target`, and the splits of their rows."""

    def read(paths: list[str], further: list[str]) -> Dataset:
        table = read_table(paths, [args.target, *further], args)
        return labels.with_targets(table, ", ".join(paths), args.target, args.label_map, args.labels)[0]

    train = read(args.train_data, [args.folds] if args.folds else [])
    train, _ = select_lengths(train, args.min_seconds, args.max_seconds)
    classes = labels.known_labels(train["target"], args.labels)
    if args.folds:
        groups = train[labels.column_of(train, args.folds, "folds", "--train_data")]
        splits = group_splits(groups, args.folds, args.num_folds)
        for split in splits:
            if len({train["target"][row] for row in split.train}) < 2:
                raise UserError(f"--folds {args.folds}: {split.name} would train on a single class: lower --num_folds")
        return train, splits
    held = {", ".join(paths): read(paths, []) for paths in (args.validation_data, args.test_data) if paths}
    for source, table in held.items():
        labels.check_known(classes, table["target"], source)
    return join_tables([train, *held.values()], train["target"])


def gather_texts(args: ProbingArguments) -> tuple[Dataset, list[Split]]:
    """All transcribed utterances with their normalised text in `target`; those that train are long enough for it."""

    def read(paths: list[str]) -> Dataset:
        table, _ = ctc_data.prepare_texts(read_table(paths, [], args), ", ".join(paths), text.TextRules())
        return table.add_column("target", table["text"])

    train, _ = select_lengths(read(args.train_data), args.min_seconds, args.max_seconds)
    held = [read(paths) for paths in (args.validation_data, args.test_data) if paths]
    return join_tables([train, *held], [""] * len(train))


def join_tables(tables: list[Dataset], classes: list[str]) -> tuple[Dataset, list[Split]]:
    """Training, validation (else a fifth of each class in training) and test tables as one, and the rows of each."""
    table = concatenate_datasets([table.select_columns(COLUMNS) for table in tables])
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
    probe = CharacterProbe(texts, vocabulary, args.ctc_updates, args.seed)
    try:
        layers, starts = save_frames(model, table, cache)
        return probe.probe_layers(layers, starts, replace(split, train=train))
    finally:
        shutil.rmtree(cache, ignore_errors=True)


def chance_level(measure: str, targets: list[str]) -> float | None:
    """What a constant answer earns: the commonest label's share, or 1 / labels."""
    counts = Counter(targets)
    return {"uar": 1 / len(counts), "accuracy": max(counts.values()) / len(targets)}.get(measure)


def describe(table: Dataset, splits: list[Split], args: ProbingArguments) -> None:
    hours = sum(table["num_samples"]) / SAMPLING_RATE / 3600
    counts = ", ".join(f"{len(rows)}" for rows in (splits[0].train, splits[0].validation, splits[0].test))
    what = f"{len(splits)} folds by {args.folds}, the first of" if args.folds else "split into"
    print(
        f"{args.target}: {len(table)} utterances, {hours:.2f} h, {what} {counts} (train, validation, test)", flush=True
    )


def draw(folder: Path, results: list[dict[str, Any]], measure: str, chance: float | None) -> None:
    """Scores over layers, and over hours heard where they are known."""
    curves = {result["name"]: [layer[measure] for layer in result["layers"]] for result in results}
    draw_layers(folder / "layers.png", curves, measure, chance)
    points = [(result["hours"], result[measure]) for result in results if result["hours"] is not None]
    random = next((result[measure] for result in results if result["source"] is None), None)
    if points:
        draw_hours(folder / "hours.png", points, measure, random, chance)


if __name__ == "__main__":
    run_script(main)
