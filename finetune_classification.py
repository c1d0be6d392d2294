"""Fine-tune a pretrained wav2vec 2.0 to give an utterance one label: emotion, speaker, intent, keyword, language.

    accelerate launch finetune_classification.py CONFIG.yaml [--flag value …]        (or plain python)

`--mode finetune`: all but the convs learns. `--mode probe`: the encoder is frozen and a weighted sum of its layers feeds a linear head
(SUPERB, Yang et al. 2021). Scores: accuracy, unweighted average recall (UAR) and macro-F1; `--folds speaker` cross-validates.
"""

import w2v2  # noqa: F401  # isort: skip  # before torch: sets how OpenMP's threads wait

import copy
import json
import shutil
from collections import Counter
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset
from transformers import set_seed

from w2v2.cli import parse_command_line, run_script
from w2v2.data.audio import SAMPLING_RATE
from w2v2.errors import UserError
from w2v2.evaluate.scores import MEASURES, classification_scores, describe_scores, mean_and_deviation
from w2v2.finetune import ctc_data, labels
from w2v2.finetune.arguments import (
    CONFIG_FILE,
    RESULTS_FILE,
    SKIPPED_FILE,
    prepare_output_dir,
    write_config,
)
from w2v2.finetune.classification import ClassificationTrainer, build_classifier, check_classes, score, write_results
from w2v2.finetune.ctc_data import CACHE_FOLDER, name_sets, say
from w2v2.finetune.labels import Split, group_splits, shared_groups
from w2v2.finetune.task_arguments import ClassificationArguments, LabelArguments
from w2v2.finetune.trainer import describe_best
from w2v2.hub.push import HubCallback
from w2v2.model.config import load_config
from w2v2.model.feature_encoder import min_samples
from w2v2.model.loading import load_feature_extractor
from w2v2.train.launch import leave_group

FOLDS_FILE = "folds.json"


def main(argv: list[str] | None = None) -> None:
    label_args, args = parse_command_line((LabelArguments, ClassificationArguments), argv)
    if args.folds:
        cross_validate(label_args, args)
    else:
        run(label_args, args)


def run(label_args: LabelArguments, args: ClassificationArguments) -> None:
    """Train on one set, choose the checkpoint on another, score the others."""
    checkpoint = prepare_output_dir(args)
    names = name_sets(args.test_data)
    train = read_set("train", args.train_data, label_args, args)
    classes = labels.known_labels(train["target"], label_args.labels)
    sets = {"validation": read_set("validation", args.validation_data, label_args, args)}
    sets |= {name: read_set(name, [path], label_args, args) for name, path in names.items()}
    for name, table in sets.items():
        labels.check_known(
            classes, table["target"], ", ".join([names[name]] if name in names else args.validation_data)
        )
    hub = HubCallback(args)
    results, lines = train_and_score(train, sets, classes, checkpoint, label_args, args, [hub])
    if args.process_index == 0:
        write_results(args.output_dir, results, lines, classes)
        for name in sets:
            say(args, f"{name:>12}: {describe_scores(results[name])} over {results[name]['utterances']} utterances")
        say(args, f"{describe_best(results['run']['best_update'])}model and {RESULTS_FILE} in {args.output_dir}")
    hub.hand_over(args)


def cross_validate(label_args: LabelArguments, args: ClassificationArguments) -> None:
    """A run for each fold: it is tested on the fold, its checkpoint is chosen on the next one, and it trains on the rest."""
    if args.resume_from_checkpoint not in (None, "auto"):
        raise UserError("--resume_from_checkpoint with --folds takes auto alone: each fold goes on where it was")
    if args.push_to_hub:
        raise UserError(
            "--push_to_hub with --folds: there would be a model a fold; push one that is trained without --folds"
        )
    if args.overwrite_output_dir and args.process_index == 0:
        for folder in Path(args.output_dir).glob("fold-*"):
            shutil.rmtree(folder)
    if args.overwrite_output_dir or not (args.resume_from_checkpoint and Path(args.output_dir, FOLDS_FILE).exists()):
        prepare_output_dir(args)
    table = read_set("all", args.train_data, label_args, args, [args.folds])
    classes = labels.known_labels(table["target"], label_args.labels)
    groups = table[labels.column_of(table, args.folds, "folds", "--train_data")]
    splits = group_splits(groups, args.folds, args.num_folds)
    check_folds(splits, table, groups, classes, args)
    if args.process_index == 0:
        write_config(Path(args.output_dir, CONFIG_FILE), label_args, args)

    results, lines = [], []
    for split in splits:
        fold_args = copy.copy(args)
        fold_args.output_dir = str(Path(args.output_dir, split.name))
        held = sorted({groups[row] for row in split.test})
        say(
            args,
            f"\n{split.name} of {len(splits)}, tested on {args.folds} {', '.join(held[:10])}{' …' * (len(held) > 10)}",
        )
        sets = {"validation": table.select(split.validation), "test": table.select(split.test)}
        checkpoint = prepare_output_dir(fold_args)
        scores, found = train_and_score(table.select(split.train), sets, classes, checkpoint, label_args, fold_args)
        if args.process_index == 0:
            write_results(fold_args.output_dir, scores, found, classes)
        say(args, f"        test: {describe_scores(scores['test'])} over {len(split.test)} utterances")
        results.append(
            {"fold": split.name, "groups": held, **scores["test"], "best_update": scores["run"]["best_update"]}
        )
        lines += [{"fold": split.name, **line} for line in found if line["set"] == "test"]
    if args.process_index == 0:
        conclude_folds(results, lines, classes, args)
    leave_group()
    PartialState().destroy_process_group()


def conclude_folds(results: list[dict], lines: list[dict], classes: list[str], args: ClassificationArguments) -> None:
    """Scores of all tested utterances together, and the mean and deviation of the folds'."""
    references, predictions = ([line[key] for line in lines] for key in ("reference", "prediction"))
    pooled = classification_scores(references, predictions) | {"utterances": len(lines)}
    spread = mean_and_deviation(results)
    run = {"model": args.model_name_or_path, "config": args.config_name, "mode": args.mode, "seed": args.seed,
           "labels": classes, "folds": args.folds}  # fmt: skip
    write_results(args.output_dir, {"pooled": pooled, **spread, "folds": results, "run": run}, lines, classes)
    say(args, f"\n      pooled: {describe_scores(pooled)} over {len(lines)} utterances")
    listed = ", ".join(f"{name} {spread['mean'][name]:.1%} ± {spread['std'][name]:.1%}" for name in MEASURES)
    say(args, f"{len(results):>6} folds: {listed} (mean ± standard deviation)")


def check_folds(splits: list[Split], table: Dataset, groups: list[str], classes: list[str], args) -> None:
    """Every fold's training has all labels, and a run is only gone on with by the same folds; speakers in two parts are told."""
    for split in splits:
        if absent := sorted(set(classes) - {table["target"][row] for row in split.train}):
            raise UserError(f"--folds {args.folds}: {split.name} would train without the label {absent[0]!r}: give a smaller "
                            "--num_folds, leave the label out (--labels), or fold by another column")  # fmt: skip
    if "speaker" in table.column_names and (shared := shared_groups(splits, table["speaker"])):
        say(
            args,
            f"     warning: {len(shared)} speakers, such as {shared[0]}, are in training and in the test of a fold",
        )
    path, folds = (
        Path(args.output_dir, FOLDS_FILE),
        {split.name: sorted({groups[row] for row in split.test}) for split in splits},
    )
    if args.resume_from_checkpoint and path.exists() and json.loads(path.read_text(encoding="utf-8")) != folds:
        raise UserError(
            f"{path}: made with other folds; resume with the same data and --folds, or --overwrite_output_dir"
        )
    if args.process_index == 0:
        path.write_text(json.dumps(folds, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def train_and_score(
    train: Dataset, sets: dict[str, Dataset], classes: list[str], checkpoint: str | None, label_args, args, callbacks=()
) -> tuple[dict, list[dict]]:
    """One training, into `args.output_dir`. Results by set, with `run` beside them; a line for each scored utterance."""
    check_classes(classes, checkpoint)
    config = load_config(args.model_name_or_path, args.config_name, **args.model_changes())
    set_seed(args.seed)

    # Data: utterances with one label each, decoded when they are asked for.
    train, dropped = labels.select_lengths(train, args.min_seconds, args.max_seconds)
    if absent := sorted(set(classes) - set(train["target"])):
        raise UserError(
            f"--min_seconds, --max_seconds: they leave no utterance of the label {absent[0]!r} to train on: widen them, or leave the "
            "label out (--labels)"
        )
    extractor = load_feature_extractor(config.name_or_path, config)
    shared = dict(min_samples=min_samples(config), skip_log=Path(args.output_dir, SKIPPED_FILE))
    train_set = labels.LabelledDataset(
        train, classes, extractor, substitute=True, crop_seconds=args.crop_seconds, seed=args.seed, **shared
    )
    data = {
        name: labels.LabelledDataset(ctc_data.longest_first(table), classes, extractor, substitute=False, **shared)
        for name, table in sets.items()
    }

    # Model: pretrained below, a new head on top; an utterance's output does not depend on its neighbours in the batch.
    model = build_classifier(
        config, classes, args.model_name_or_path,
        freeze_convs=args.freeze_feature_encoder, freeze_encoder=args.mode == "probe",
    )  # fmt: skip

    # Train; the best checkpoint on the validation set is loaded at the end.
    weights = labels.balanced_weights(train["target"], classes) if label_args.class_weights == "balanced" else None
    trainer = ClassificationTrainer(
        model, args, data_collator=labels.collate_labelled, train_dataset=train_set, eval_dataset=data["validation"],
        processing_class=extractor, class_weights=weights, callbacks=list(callbacks),
    )  # fmt: skip
    describe(trainer, classes, dropped, checkpoint)
    if trainer.is_world_process_zero() and not args.folds:
        write_config(Path(args.output_dir, CONFIG_FILE), label_args, args)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    results, lines = score(trainer, data, classes)
    results["run"] = {
        "model": args.model_name_or_path,
        "config": args.config_name,
        "mode": args.mode,
        "updates": trainer.state.global_step,
        "best_update": trainer.best_update,
        "train_utterances": len(train),
        "train_hours": round(sum(train["num_samples"]) / SAMPLING_RATE / 3600, 4),
        "train_labels": dict(Counter(train["target"])),
        "labels": classes,
        "seed": args.seed,
        "skipped_audio": len(ctc_data.read_skipped(Path(args.output_dir, SKIPPED_FILE))),
    }
    if args.mode == "probe":
        results["run"]["layer_weights"] = model.layer_weights.detach().softmax(0).tolist()
    if not args.folds:  # the next fold needs the other processes
        trainer.end()
    return results, lines


def read_set(
    name: str, paths: list[str], label_args: LabelArguments, args, further: list[str] | None = None
) -> Dataset:
    """Utterances of one set that have one of the labels, and audio that opens."""
    with args.main_process_first(local=False):
        table, skipped = labels.read_utterances(
            paths, [label_args.label_column, *(further or [])], data_root=args.data_root,
            cache_dir=Path(args.output_dir, CACHE_FOLDER), max_skipped_fraction=args.max_skipped_fraction,
        )  # fmt: skip
    if skipped and args.process_index == 0:
        ctc_data.log_skipped(Path(args.output_dir, SKIPPED_FILE), skipped)
    table, others = labels.with_targets(
        table, ", ".join(paths), label_args.label_column, label_args.label_map, label_args.labels
    )
    hours = sum(table["num_samples"]) / SAMPLING_RATE / 3600
    left_out = f", {others} with other labels" if others else ""
    say(args, f"{name:>12}: {len(table)} utterances, {hours:.2f} h, {len(set(table['target']))} labels, "
              f"{len(skipped)} unreadable{left_out}")  # fmt: skip
    return table


def describe(trainer: ClassificationTrainer, classes: list[str], dropped: int, checkpoint: str | None) -> None:
    """What this run will do, on the console."""
    args, train = trainer.args, trainer.train_dataset
    start = args.model_name_or_path or f"random weights of {args.config_name}"
    learning = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad) / 1e6
    parameters = sum(p.numel() for p in trainer.model.parameters()) / 1e6
    say(args, f"       model: {start}, {parameters:.2f} M parameters, of which {learning:.2f} M learn")
    counts = Counter(train.table["target"]).most_common()
    listed = ", ".join(f"{label} {count}" for label, count in counts[:12]) + " …" * (len(counts) > 12)
    say(
        args,
        f"      labels: {len(classes)}: {listed}" + (f"; {dropped} utterances dropped by length" if dropped else ""),
    )
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    updates = args.max_steps if args.max_steps > 0 else round(args.num_train_epochs * len(train) / batch)
    resumed = f", resumed from {checkpoint}" if checkpoint else ""
    say(args, f"     updates: {updates} of {batch} utterances, {updates * batch / len(train):.1f} epochs{resumed}")


if __name__ == "__main__":
    run_script(main)
