"""Fine-tune a pretrained wav2vec 2.0 to give an utterance one label: emotion, speaker, intent, keyword, language.

    accelerate launch finetune_classification.py CONFIG.yaml [--flag value …]        (or plain python)
    python finetune_classification.py --do_train false --model_name_or_path FINE_TUNED --test_data a.csv --output_dir out

`--mode finetune`: all but the convs learns. `--mode probe`: the encoder is frozen and a weighted sum of its layers
feeds a linear head (SUPERB, Yang et al. 2021). Scores: accuracy, unweighted average recall (UAR) and macro-F1;
`--folds speaker` cross-validates.
"""

import w2v2  # noqa: F401  # isort: skip  # before torch: sets how OpenMP's threads wait

import copy
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from accelerate import PartialState
from datasets import Dataset
from transformers import TrainerCallback, set_seed

from w2v2.cli import parse_command_line, run_script
from w2v2.errors import UserError
from w2v2.finetune.arguments import (
    CONFIG_FILE,
    RESULTS_FILE,
    SKIPPED_FILE,
    follow_folder,
    prepare_output_dir,
    write_config,
)
from w2v2.finetune.classifier import (
    ClassificationArguments,
    ClassificationTrainer,
    build_classifier,
    folder_labels,
    load_classifier,
)
from w2v2.finetune.ctc_data import longest_first, name_sets, warn_shared
from w2v2.finetune.evaluation import write_results
from w2v2.finetune.label_scores import (
    FOLDS_FILE,
    check_classes,
    check_folds,
    describe,
    score,
    write_pooled,
)
from w2v2.finetune.labels import (
    LABEL_FLAGS,
    LabelArguments,
    LabelledDataset,
    check_known,
    collate_labelled,
    group_splits,
    known_labels,
    read_labelled,
    values_of,
)
from w2v2.finetune.subsets import select_lengths
from w2v2.hub.push import HubCallback
from w2v2.manifests.dataset_loading import Manifest, name_sources
from w2v2.model.feature_encoder import min_samples
from w2v2.model.loading import load_config, load_feature_extractor
from w2v2.report.page import report_run
from w2v2.train.events import note_finish, note_start
from w2v2.train.launch import leave_group


def main(argv: list[str] | None = None) -> None:
    label_args, args = parse_command_line((LabelArguments, ClassificationArguments), argv)
    if not args.do_train:
        label(label_args, args)
    elif args.folds:
        cross_validate(label_args, args)
    else:
        train_once(label_args, args)


def train_once(label_args: LabelArguments, args: ClassificationArguments) -> None:
    """Train on one set, choose the checkpoint on another, score the others."""
    checkpoint = prepare_output_dir(args)
    train, paths = args.list_sources("train_data"), list_held(args)
    train, dropped = read_labelled("train", train, label_args, args)
    sets = {name: read_labelled(name, manifests, label_args, args)[0] for name, manifests in paths.items()}
    for name, table in sets.items():
        warn_shared(train, table, name, args.print_once)
    before = folder_labels(checkpoint or args.model_name_or_path)
    classes = known_labels(train["target"], label_args.labels, before)
    for name, table in sets.items():
        check_known(classes, table["target"], name_sources(paths[name]))
    hub = HubCallback(args)
    results, lines = run(train, sets, classes, label_args, args, checkpoint=checkpoint, callbacks=[hub])
    results["run"]["dropped"] = dropped | results["run"]["dropped"]
    if args.process_index == 0:
        write_results(args.output_dir, results, lines)
    for name in sets:
        args.print_once(describe(name, results[name]))
    best = results["run"]["best_update"]
    args.print_once(f"{f'        best: update {best}; ' if best else ''}model and {RESULTS_FILE} in {args.output_dir}")
    hub.hand_over(args)
    if args.process_index == 0:
        note_finish(args, results["run"]["updates"])
        report_run(args)
    leave_group()
    PartialState().destroy_process_group()


def list_held(args: ClassificationArguments) -> dict[str, list[Manifest]]:
    """Validation, and each test set by its name."""
    test = name_sets(args.list_sources("test_data"))
    return {"validation": args.list_sources("validation_data")} | {name: [source] for name, source in test.items()}


def label(label_args: LabelArguments, args: ClassificationArguments) -> None:
    """Label the sets with a fine-tuned model, and score those that have labels themselves."""
    paths = {name: manifests for name, manifests in list_held(args).items() if manifests}
    if not paths:
        raise UserError("--do_train false: nothing to label: give --test_data")
    prepare_output_dir(args)

    # 1. Model: what was fine-tuned, its labels, and where it found them.
    source = args.model_name_or_path
    model, classes = load_classifier(source), folder_labels(source)
    label_args = follow_folder(label_args, source, LABEL_FLAGS)
    extractor = load_feature_extractor(source, model.config)

    # 2. Data: utterances with audio that opens, labelled or not.
    shared = dict(min_samples=min_samples(model.config), skip_log=Path(args.output_dir, SKIPPED_FILE))
    data = {}
    for name, manifests in paths.items():
        table, _ = read_labelled(name, manifests, label_args, args)
        check_known(classes, table["target"], name_sources(manifests))
        data[name] = LabelledDataset(longest_first(table), classes, extractor, substitute=False, **shared)

    # 3. Label.
    trainer = ClassificationTrainer(
        model, args, data_collator=collate_labelled, eval_dataset=next(iter(data.values())), processing_class=extractor
    )
    if args.process_index == 0:
        write_config(Path(args.output_dir, CONFIG_FILE), label_args, args)
        note_start(args)
    results, lines = score(trainer, data, classes)
    if args.process_index == 0:
        write_results(args.output_dir, results | {"run": trainer.summary()}, lines)
        note_finish(args)
        report_run(args)
    for name in data:
        args.print_once(describe(name, results[name]))
    args.print_once(f"{RESULTS_FILE} in {args.output_dir}")
    trainer.end()


def cross_validate(label_args: LabelArguments, args: ClassificationArguments) -> None:
    """A run for each fold: it is tested on the fold, validated on the next one, and trains on the rest."""
    if args.overwrite_output_dir and args.process_index == 0:
        for folder in Path(args.output_dir).glob("fold-*"):
            shutil.rmtree(folder)
    is_new = args.overwrite_output_dir or not (
        args.resume_from_checkpoint and Path(args.output_dir, FOLDS_FILE).exists()
    )
    if is_new:
        prepare_output_dir(args)
    table, dropped = read_labelled("all", args.list_sources("train_data"), label_args, args, [args.folds])
    classes = known_labels(table["target"], label_args.labels, folder_labels(args.model_name_or_path))
    groups = values_of(table, args.folds, "folds", "--train_data")
    splits = group_splits(groups, args.folds, args.num_folds)
    check_folds(splits, table, groups, args)
    if args.process_index == 0:
        if is_new:  # each fold has a file of its own, with what a resume changed
            write_config(Path(args.output_dir, CONFIG_FILE), label_args, args)
        note_start(args)

    results, lines = [], []
    for split in splits:
        fold_args = copy.copy(args)
        fold_args.output_dir = str(Path(args.output_dir, split.name))
        held = sorted({groups[row] for row in split.test})
        listed = ", ".join(held[:10]) + " …" * (len(held) > 10)
        args.print_once(f"\n{split.name} of {len(splits)}, tested on {args.folds} {listed}")
        train, validation, test = (table.select(rows) for rows in (split.train, split.validation, split.test))
        sets, checkpoint = {"validation": validation, "test": test}, prepare_output_dir(fold_args)
        scores, found = run(train, sets, classes, label_args, fold_args, checkpoint=checkpoint)
        if args.process_index == 0:
            write_results(fold_args.output_dir, scores, found)
            note_finish(fold_args, scores["run"]["updates"])
        args.print_once(describe("test", scores["test"]))
        best_update = scores["run"]["best_update"]
        results.append({"fold": split.name, "groups": held, **scores["test"], "best_update": best_update})
        lines += [{"fold": split.name, **line} for line in found if line["set"] == "test"]
    if args.process_index == 0:
        write_pooled(results, lines, classes, args, dropped)
        note_finish(args)
        report_run(args)
    leave_group()
    PartialState().destroy_process_group()


def run(
    train: Dataset, sets: dict[str, Dataset], classes: list[str], label_args: LabelArguments,
    args: ClassificationArguments, *, checkpoint: str | None, callbacks: Sequence[TrainerCallback] = (),
) -> tuple[dict, list[dict]]:  # fmt: skip
    """One training, into `args.output_dir`. Returns results by set, with `run` beside them, and a line an utterance."""
    check_classes(classes, checkpoint)
    config = load_config(args.model_name_or_path, args.config_name, **args.model_changes())
    set_seed(args.seed)

    # 1. Data: utterances with one label each, decoded when they are asked for.
    train, num_dropped = select_lengths(train, args.min_seconds, args.max_seconds)
    if absent := sorted(set(classes) - set(train["target"])):
        raise UserError(f"--min_seconds, --max_seconds: they leave no utterance of the label {absent[0]!r} to train "
                        "on: widen them, or leave the label out (--labels)")  # fmt: skip
    if num_dropped:
        args.print_once(f"     dropped: {num_dropped} by their length (training)")
    extractor = load_feature_extractor(config.name_or_path, config)
    shared = dict(min_samples=min_samples(config), skip_log=Path(args.output_dir, SKIPPED_FILE))
    perturbed = dict(speeds=args.speed_perturbation, seed=args.seed)
    train_set = LabelledDataset(
        train, classes, extractor, substitute=True, crop_seconds=args.crop_seconds, **perturbed, **shared
    )
    data = {
        name: LabelledDataset(longest_first(table), classes, extractor, substitute=False, **shared)
        for name, table in sets.items()
    }

    # 2. Model: pretrained below, a new head on top, or the folder's own.
    model = build_classifier(config, classes, args)

    # 3. Train: the best checkpoint on the validation set is loaded at the end.
    weights = None
    if label_args.class_weights == "balanced":
        from sklearn.utils.class_weight import compute_class_weight  # slow to import

        weights = compute_class_weight("balanced", classes=np.array(classes), y=train["target"][:]).tolist()
    trainer = ClassificationTrainer(
        model, args, data_collator=collate_labelled, train_dataset=train_set, eval_dataset=data["validation"],
        processing_class=extractor, class_weights=weights, callbacks=list(callbacks),
    )  # fmt: skip
    trainer.dropped = {"by their length": num_dropped}
    trainer.describe(checkpoint)
    trainer.check_resume(checkpoint)
    if args.process_index == 0:
        write_config(Path(args.output_dir, CONFIG_FILE), label_args, args)
        note_start(args, checkpoint)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()

    # 4. Evaluate: every set with these weights.
    results, lines = score(trainer, data, classes)
    return results | {"run": trainer.summary()}, lines


if __name__ == "__main__":
    run_script(main)
