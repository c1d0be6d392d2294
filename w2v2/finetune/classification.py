"""A label for a whole utterance: its flags, a `Trainer` with scores, what is written of them, and cross-validation.

Either all but the convs learns, or the encoder is frozen and a softmax-weighted sum of its layers feeds the head
(SUPERB, Yang et al. 2021).

Shapes: B utterances, C classes.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers.trainer_utils import EvalLoopOutput

from w2v2.errors import UserError, flag, refuse, take_back
from w2v2.evaluate.plots import draw_confusion
from w2v2.evaluate.scores import MEASURES, classification_scores, confusion_counts, describe_scores, mean_and_deviation
from w2v2.finetune.arguments import PREDICTIONS_FILE, FineTuningArguments, write_results
from w2v2.finetune.classifier import folder_labels
from w2v2.finetune.evaluation import check_metric
from w2v2.finetune.labels import LabelledDataset, Split, shared_groups
from w2v2.finetune.trainer import FineTuner
from w2v2.train.schedule import SCHEDULES

FOLDS_FILE = "folds.json"
MOST_LISTED = 10  # probabilities of an utterance in predictions.jsonl


@dataclass
class ClassificationArguments(FineTuningArguments):
    """`FineTuningArguments` with the defaults of transformers' audio classification example."""

    mode: str = flag(
        "finetune", "`probe`: only a linear head on the layers' sum learns.", choices=["finetune", "probe"]
    )
    classifier_proj_size: int = flag(256, "Width of the head's projection, which is averaged over time.", min=1)
    crop_seconds: float = flag(20.0, "Longest piece that training hears, another each epoch; 0: all.", min=0)
    folds: str | None = flag(None, "Cross-validate over --train_data; groups of this column (speaker) stay together.")
    num_folds: int | None = flag(None, "Even folds of whole groups (default: each group is a fold).", min=2)

    max_seconds: float | None = flag(None, "Longer utterances are left out of training.", above=0)
    learning_rate: float | None = flag(None, "Peak learning rate (default: 3e-5; 1e-3 in `probe`).", min=0, max=1)
    max_steps: int = flag(3_000, "Updates in the run (in each fold).", min=-1)
    gradient_accumulation_steps: int = flag(4, "Micro-batches of a device in one update.", min=1)
    lr_scheduler_type: str = flag("linear", "What follows the warm-up.", choices=SCHEDULES)
    mask_time_prob: float = flag(0.05, "Time mask: masked frames over frames, overlaps counted twice.", min=0)
    mask_feature_prob: float = flag(0.0, "Channel mask: the same over channels.", min=0)
    layerdrop: float = flag(0.0, "Probability that a transformer layer is left out.", min=0, max=1)
    hidden_dropout: float = flag(0.1, "Dropout of the transformer's hidden states.", min=0, max=1)
    attention_dropout: float = flag(0.1, "Dropout of attention weights.", min=0, max=1)
    max_grad_norm: float = flag(1.0, "Clip the gradient's norm to this; 0 does not clip.", min=0)
    eval_steps: float = flag(250, "Updates between two validations; under 1: a fraction of the run.", above=0)
    save_steps: float = flag(250, "Updates between two checkpoints; a multiple of eval_steps.", above=0)
    metric_for_best_model: str | None = flag("uar", "What says which is best: uar, accuracy, macro_f1 or loss.")
    greater_is_better: bool | None = flag(None, "Whether more of it is better (default: of all but the loss).")

    bears = ("label_smoothing_factor",)

    def __post_init__(self):
        take_back(self, "folds")
        self.metric_for_best_model = self.metric_for_best_model or "uar"
        super().__post_init__()
        if self.learning_rate is None:
            self.learning_rate = 1e-3 if self.mode == "probe" else 3e-5
        folds = self.folds
        refuse(
            (folds and not self.do_train, "--do_train false with --folds: folds are trained; leave --folds out"),
            (self.num_folds is not None and not folds, "--num_folds needs --folds: name the column of the groups"),
            (folds and (self.validation_data or self.test_data),
             "--folds takes all from --train_data: leave --validation_data and --test_data out"),
            (folds and self.push_to_hub, "--push_to_hub with --folds: push a model that is trained without --folds"),
            (folds and self.resume_from_checkpoint not in (None, "auto"),
             "--resume_from_checkpoint with --folds takes auto alone: each fold goes on where it was"),
        )  # fmt: skip
        check_metric(self.metric_for_best_model, MEASURES)

    def required_flags(self) -> tuple[str, ...]:
        return ("train_data", "output_dir") if self.folds else super().required_flags()

    def model_changes(self) -> dict[str, Any]:
        """The flags that are keys of the model's configuration; a frozen encoder is neither masked nor dropped from."""
        changes, is_probe = super().model_changes(), self.mode == "probe"
        if is_probe:
            changes |= {name: 0.0 for name in changes if name.endswith(("_prob", "dropout", "layerdrop"))}
        return changes | {"use_weighted_layer_sum": is_probe, "classifier_proj_size": self.classifier_proj_size}


class ClassificationTrainer(FineTuner):
    """Scores labels: `predict` gives probabilities (B, C), and metrics hold accuracy, UAR, macro-F1 and the mean loss.

    The loss is the mean over utterances of the cross-entropy times the class's weight. Divided by the sum of the
    weights instead, an update would depend on how it is cut into micro-batches.
    """

    tie_breakers = ("uar", "accuracy", "macro_f1")

    def __init__(self, *args, class_weights: Sequence[float] | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.class_weights = None if class_weights is None else torch.tensor(class_weights)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
        loss = self._loss(outputs.logits, inputs["labels"])
        return (loss, outputs) if return_outputs else loss

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Of logits (B, C) and labels (B,); those below 0 do not count."""
        weights = None if self.class_weights is None else self.class_weights.to(logits.device)
        options = dict(weight=weights, reduction="none", label_smoothing=self.args.label_smoothing_factor)
        losses = F.cross_entropy(logits.float(), labels.masked_fill(labels < 0, -100), **options)
        return losses.sum() / (labels >= 0).sum().clamp(min=1)

    def score_output(self, output: EvalLoopOutput, data: LabelledDataset) -> tuple[np.ndarray, dict[str, Any]]:
        """Probabilities, NaN where the audio was unreadable, and scores of those that have a label."""
        labels, logits = torch.tensor(output.label_ids), torch.tensor(output.predictions, dtype=torch.float32)
        readable, known = labels != -100, labels >= 0
        probabilities = logits.softmax(-1).masked_fill(~readable[:, None], torch.nan).numpy()
        scores: dict[str, Any] = {"utterances": int(readable.sum()), "loss": None}
        if (num_known := int(known.sum())) != scores["utterances"]:
            scores["scored"] = num_known
        if num_known:
            scores |= classification_scores(labels[known].numpy(), logits[known].argmax(-1).numpy())
            scores["loss"] = float(self._loss(logits, labels))
        return probabilities, scores

    def summary(self) -> dict[str, Any]:
        run = super().summary() | {"labels": list(self.model.config.label2id)}
        if self.train_dataset is None:
            return run
        run |= {"mode": self.args.mode, "train_labels": dict(Counter(self.train_dataset.table["target"]))}
        if self.args.mode == "probe":
            run["layer_weights"] = self.model.layer_weights.detach().softmax(0).tolist()
        return run


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


def write_scores(output_dir: str, results: Mapping, lines: Sequence[Mapping], classes: Sequence[str]) -> None:
    """`results.json`, `predictions.jsonl` and a picture of each set's confusions."""
    write_results(output_dir, results, lines)
    scored = [line for line in lines if line["reference"] is not None]
    for name in dict.fromkeys(line["set"] for line in scored):
        pairs = [(line["reference"], line["prediction"]) for line in scored if line["set"] == name]
        counts = confusion_counts(*zip(*pairs, strict=True), classes)
        draw_confusion(Path(output_dir, "plots", f"confusion_{name}.png"), counts, classes)


def check_classes(classes: Sequence[str], checkpoint: str | None) -> None:
    """Raises UserError where a run would go on with other labels than it began with."""
    if checkpoint and folder_labels(checkpoint) != list(classes):
        raise UserError(f"{checkpoint}: made with other labels than --train_data's; resume with the same labels")


def check_folds(splits: list[Split], table: Dataset, groups: list[str], args: ClassificationArguments) -> None:
    """Write `folds.json`, and warn of speakers in two parts.

    Raises UserError where a fold would train without a label, or the run to resume had other folds.
    """
    targets = table["target"][:]
    for split in splits:
        if absent := sorted(set(targets) - {targets[row] for row in split.train}):
            raise UserError(f"--folds {args.folds}: {split.name} would train without the label {absent[0]!r}: give a "
                            "smaller --num_folds, leave the label out (--labels), or fold by another column")  # fmt: skip
    if "speaker" in table.column_names and (shared := shared_groups(splits, table["speaker"])):
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
    write_scores(args.output_dir, {"pooled": pooled, **spread, "folds": results, "run": run}, lines, classes)
    print(f"\n      pooled: {describe_scores(pooled)} over {len(lines)} utterances", flush=True)
    listed = ", ".join(f"{name} {spread['mean'][name]:.1%} ± {spread['std'][name]:.1%}" for name in MEASURES)
    print(f"{len(results):>6} folds: {listed} (mean ± standard deviation)", flush=True)
