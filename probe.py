"""What is in each layer of a frozen wav2vec 2.0? Linear probes, in minutes on a CPU, without fine-tuning anything.

    python probe.py --checkpoints runs/mine/checkpoint-* --train_data emotion.csv --folds speaker --output_dir runs/probe

For a label (emotion, speaker, …) a linear classifier reads the mean over time of each layer; for `--target characters` a linear CTC head
reads its frames. Features are computed once. Beside several checkpoints stand random weights, and the hours that each had heard.
"""

import w2v2  # noqa: F401  # isort: skip  # before torch: sets how OpenMP's threads wait

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from w2v2.cli import parse_command_line, run_script
from w2v2.data.audio import SAMPLING_RATE
from w2v2.errors import UserError
from w2v2.evaluate.plots import draw_hours, draw_layers
from w2v2.finetune import ctc_data, labels, text
from w2v2.finetune.labels import Split, group_splits
from w2v2.model.feature_encoder import num_frames
from w2v2.probe.arguments import CHARACTERS, ProbingArguments
from w2v2.probe.characters import probe_characters
from w2v2.probe.features import FrozenModel, concatenate_tables, save_frames
from w2v2.probe.linear import best_layer, heard_hours, hold_out, probe_layers, table_of

RESULTS_FILE = "probe.json"
COLUMNS = ("id", "audio", "start", "num_samples", "target")


def main(argv: list[str] | None = None) -> None:
    (args,) = parse_command_line((ProbingArguments,), argv)
    folder = args.prepare_output_dir(RESULTS_FILE)

    # Data: one table, and the rows that train, validate and test.
    characters = args.target == CHARACTERS
    table, splits = gather_characters(args) if characters else gather_labels(args)
    measure = "cer" if characters else args.measure
    describe(table, splits, args)

    # Probes: features of all utterances once a model, then every layer by itself.
    results = []
    for name, source in models(args):
        model = FrozenModel(source, None if source else baseline(args), seed=args.seed, device=args.device)
        if characters:
            layers = read_characters(model, table, splits[0], args)
        else:
            layers = probe_layers(args.classifier, model.means(table), table["target"], splits, measure)
        best = best_layer(layers, lower_is_better=characters)
        hours = heard_hours(source) if source else None
        results.append({"name": name, "source": source, "hours": hours, "best_layer": best["layer"], measure: best[measure],
                        "layers": layers})  # fmt: skip
        heard = f", {hours:.2f} h heard" if hours is not None else ""
        print(f"{name}: best layer {best['layer']}, {measure} {best[measure]:.1%}{heard}", flush=True)

    chance = (
        None if characters else chance_level(measure, [table["target"][row] for split in splits for row in split.test])
    )
    print(f"\n{measure}, test; * the layer that validated best" + (f"; chance {chance:.1%}" if chance else ""))
    print(table_of(results, measure))
    write(folder, results, measure, chance, table, splits, args)


def models(args: ProbingArguments) -> list[tuple[str, str | None]]:
    """Names and sources, by hours heard where they are known; random weights (None) last."""
    named = [(Path(source).name, source) for source in args.checkpoints]
    counts = Counter(name for name, _ in named)
    named = [(name if counts[name] == 1 else source, source) for name, source in named]
    hours = {source: heard_hours(source) for source in args.checkpoints}
    if all(value is not None for value in hours.values()):
        named.sort(key=lambda entry: hours[entry[1]])
    return named + [("random weights", None)] * args.random_weights


def baseline(args: ProbingArguments) -> str:
    return args.config_name or args.checkpoints[0]


def gather_labels(args: ProbingArguments) -> tuple[Dataset, list[Split]]:
    """All utterances with their label in `target`, and the splits of their rows."""

    def read(paths: list[str], further: list[str]) -> Dataset:
        table = read_audio(paths, [args.target, *further], args)
        return labels.with_targets(table, ", ".join(paths), args.target, args.label_map, args.labels)[0]

    train = read(args.train_data, [args.folds] if args.folds else [])
    train, _ = labels.select_lengths(train, args.min_seconds, args.max_seconds)
    classes = labels.known_labels(train["target"], args.labels)
    if args.folds:
        splits = group_splits(
            train[labels.column_of(train, args.folds, "folds", "--train_data")], args.folds, args.num_folds
        )
        for split in splits:
            if len({train["target"][row] for row in split.train}) < 2:
                raise UserError(f"--folds {args.folds}: {split.name} would train on a single class: lower --num_folds")
        return concatenate_tables([train], COLUMNS), splits
    sources = [paths for paths in (args.validation_data, args.test_data) if paths]
    tables = [read(paths, []) for paths in sources]
    for paths, table in zip(sources, tables, strict=True):
        labels.check_known(classes, table["target"], ", ".join(paths))
    table = concatenate_tables([train, *tables], COLUMNS)
    return table, [rows_of([train, *tables], table["id"], table["target"])]


def gather_characters(args: ProbingArguments) -> tuple[Dataset, list[Split]]:
    """All transcribed utterances with their normalised text in `target`; those that train are long enough for it."""

    def read(paths: list[str]) -> Dataset:
        table = read_audio(paths, [], args)
        table, _ = ctc_data.prepare_texts(table, ", ".join(paths), text.TextRules())
        return table.add_column("target", table["text"])

    train, _ = labels.select_lengths(read(args.train_data), args.min_seconds, args.max_seconds)
    tables = [train, *(read(paths) for paths in (args.validation_data, args.test_data) if paths)]
    table = concatenate_tables(tables, COLUMNS)
    return table, [rows_of(tables, table["id"], [""] * len(table))]


def rows_of(tables: list[Dataset], ids: list[str], classes: list[str]) -> Split:
    """Rows of the concatenated training, validation (else a fifth of each class in training) and test tables."""
    ends = np.cumsum([0, *map(len, tables)]).tolist()
    parts = [list(range(first, last)) for first, last in zip(ends, ends[1:], strict=False)]
    if len(parts) == 3:
        return Split("test", *parts)
    train, validation = hold_out(ids, classes, parts[0])
    if not validation:
        raise UserError("--train_data: too few utterances to hold a fifth out for validation: give --validation_data")
    return Split("test", train, validation, parts[1])


def read_characters(model: FrozenModel, table: Dataset, split: Split, args: ProbingArguments) -> list[dict[str, Any]]:
    """Error rates at every layer; the frames lie in files meanwhile."""
    cache = Path(args.output_dir, "_frames")
    vocabulary = text.build_vocabulary(table["target"][row] for row in split.train)
    long_enough = [
        row for row in split.train
        if num_frames(model.config, table["num_samples"][row]) >= text.frames_needed(text.encode(table["target"][row], vocabulary))
    ]  # fmt: skip
    try:
        layers, starts = save_frames(model, table, cache)
        return probe_characters(layers, starts, table["target"], vocabulary, long_enough, split.validation, split.test,
                                num_updates=args.ctc_updates, seed=args.seed)  # fmt: skip
    finally:
        shutil.rmtree(cache, ignore_errors=True)


def read_audio(paths: list[str], columns: list[str], args: ProbingArguments) -> Dataset:
    table, skipped = ctc_data.read_utterances(
        paths, columns, data_root=args.data_root, cache_dir=Path(args.output_dir, "_cache"),
        max_skipped_fraction=args.max_skipped_fraction,
    )  # fmt: skip
    if skipped:
        print(f"{', '.join(paths)}: {len(skipped)} utterances with unreadable audio are left out")
    return table


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


def write(folder: Path, results: list[dict], measure: str, chance: float | None, table, splits, args) -> None:
    """`probe.json` and the pictures."""
    run = {"target": args.target, "folds": args.folds, "num_folds": len(splits) if args.folds else None, "seed": args.seed,
           "classifier": None if measure == "cer" else args.classifier, "utterances": len(table),
           "tested": sum(len(split.test) for split in splits)}  # fmt: skip
    whole = {"measure": measure, "chance": chance, "models": results, "run": run}
    (folder / RESULTS_FILE).write_text(json.dumps(whole, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    curves = {result["name"]: [layer[measure] for layer in result["layers"]] for result in results}
    draw_layers(folder / "plots" / "layers.png", curves, measure, chance)
    points = [(result["hours"], result[measure]) for result in results if result["hours"] is not None]
    random = next((result[measure] for result in results if result["source"] is None), None)
    if points:
        draw_hours(folder / "plots" / "hours.png", points, measure, random, chance)


if __name__ == "__main__":
    run_script(main)
