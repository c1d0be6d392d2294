"""What a classifier finds in whole sets: scores, predictions, pictures, and those of a cross-validation."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from w2v2.errors import UserError
from w2v2.evaluate.scores import MEASURES, classification_scores, describe_scores, mean_and_deviation
from w2v2.finetune.arguments import PREDICTIONS_FILE
from w2v2.finetune.classifier import ClassificationArguments, ClassificationTrainer, folder_labels
from w2v2.finetune.evaluation import write_results
from w2v2.finetune.labels import Split, check_trained, nfc, shared_groups

FOLDS_FILE = "folds.json"
MOST_LISTED = 10  # probabilities of an utterance in predictions.jsonl


def score(trainer: ClassificationTrainer, data: Mapping, classes: Sequence[str]) -> tuple[dict, list[dict]]:
    """Scores and predictions of each set with the model as it is now; unreadable audio has no prediction."""
    results, lines = {}, []
    for name, dataset in data.items():
        output = trainer.predict(dataset, metric_key_prefix=name)
        found = {key: output.metrics.get(f"{name}_{key}") for key in (*MEASURES, "loss", "utterances", "scored")}
        results[name] = {key: value for key, value in found.items() if value is not None}
        for row, probabilities in zip(dataset.table, output.predictions, strict=True):
            if not np.isnan(probabilities).any():
                best = {classes[i]: round(float(probabilities[i]), 4) for i in np.argsort(-probabilities)[:MOST_LISTED]}
                line = {
                    "set": name,
                    "id": row["id"],
                    "reference": row["target"] or None,
                    "prediction": next(iter(best)),
                }
                lines.append(line | {"probability": max(best.values()), "probabilities": best})
    return results, lines


def describe(name: str, result: Mapping[str, Any]) -> str:
    """A line on a set's scores, or that it was labelled alone."""
    if "uar" not in result:
        return f"{name:>12}: {result['utterances']} utterances labelled in {PREDICTIONS_FILE}"
    number = result.get("scored", result["utterances"])
    return f"{name:>12}: {describe_scores(result)} over {number} utterances"


def check_classes(classes: Sequence[str], checkpoint: str | None) -> None:
    """Raises UserError where a run would go on with other labels than it began with."""
    if checkpoint and folder_labels(checkpoint) != list(classes):
        raise UserError(f"{checkpoint}: made with other labels than --train_data's; resume with the same labels")


def check_folds(splits: list[Split], table: Dataset, groups: list[str], args: ClassificationArguments) -> None:
    """Write `folds.json`, and warn of speakers in two parts.

    Raises UserError where a fold would train without a label, or the run to resume had other folds.
    """
    check_trained(splits, table["target"][:], args.folds)
    if "speaker" in table.column_names and (shared := shared_groups(splits, list(map(nfc, table["speaker"])))):
        args.print_once(f"     warning: {len(shared)} speakers, such as {shared[0]}, are in training and in the test of "
                        "a fold")  # fmt: skip
    path = Path(args.output_dir, FOLDS_FILE)
    folds = {split.name: sorted({groups[row] for row in split.test}) for split in splits}
    if args.resume_from_checkpoint and path.exists() and json.loads(path.read_text(encoding="utf-8")) != folds:
        raise UserError(f"{path}: made with other folds; resume with the same --folds, or --overwrite_output_dir")
    if args.process_index == 0:
        path.write_text(json.dumps(folds, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_pooled(
    results: list[dict], lines: list[dict], classes: list[str], args: ClassificationArguments, dropped: dict[str, int]
) -> None:
    """Scores of all tested utterances together, and the mean and deviation of the folds'."""
    references, predictions = ([line[key] for line in lines] for key in ("reference", "prediction"))
    pooled = classification_scores(references, predictions) | {"utterances": len(lines)}
    spread = mean_and_deviation(results)
    run = dict(model=args.model_name_or_path, config=args.config_name, mode=args.mode, seed=args.seed)
    run |= {"labels": classes, "folds": args.folds, "dropped": dropped}
    write_results(args.output_dir, {"pooled": pooled, **spread, "folds": results, "run": run}, lines)
    print(f"\n      pooled: {describe_scores(pooled)} over {len(lines)} utterances", flush=True)
    listed = ", ".join(f"{name} {spread['mean'][name]:.1%} ± {spread['std'][name]:.1%}" for name in MEASURES)
    print(f"{len(results):>6} folds: {listed} (mean ± standard deviation)", flush=True)
