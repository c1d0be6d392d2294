"""The model that labels, its flags, and its `Trainer`.

`Wav2Vec2ForSequenceClassification` averages a projection of the frames over time, padding left out, and has one linear
layer above. Either all but the convs learns, or the encoder is frozen and a softmax-weighted sum of its layers feeds the
head (SUPERB, Yang et al. 2021).

Shapes: B utterances, C classes.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import Wav2Vec2Config, Wav2Vec2ForSequenceClassification
from transformers.trainer_utils import EvalLoopOutput

from w2v2.errors import UserError, flag, refuse, take_back
from w2v2.evaluate.scores import MEASURES, classification_scores
from w2v2.finetune.arguments import FineTuningArguments
from w2v2.finetune.evaluation import check_metric
from w2v2.finetune.labels import LabelledDataset
from w2v2.finetune.trainer import FineTuner
from w2v2.model.feature_encoder import hide_padding
from w2v2.model.loading import load_config, load_with_head
from w2v2.train.schedule import SCHEDULES

HEAD = ("projector", "classifier", "layer_weights")


@dataclass
class ClassificationArguments(FineTuningArguments):
    """`FineTuningArguments` with the defaults of transformers' audio classification example."""

    mode: str = flag(
        "finetune",
        "`probe`: a linear head on the layers' sum.",
        choices=["finetune", "probe"],
        heading="Classification",
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
            (folds and (self.list_sources("validation_data") or self.list_sources("test_data")),
             "--folds takes all from the training data: leave validation and test data out"),
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


def folder_labels(source: str | None) -> list[str]:
    """The labels of a classifier, in its order; none of any other model."""
    config = load_config(source, None) if source else None
    if config is None or Wav2Vec2ForSequenceClassification.__name__ not in (config.architectures or ()):
        return []
    return [str(label) for _, label in sorted(config.id2label.items())]


def build_classifier(
    config: Wav2Vec2Config, labels: Sequence[str], args: FineTuningArguments
) -> Wav2Vec2ForSequenceClassification:
    """Pretrained (or random) weights under a head with an output for each label.

    The head is new, unless the folder's own has the same labels and shape. An utterance's output does not depend on
    its neighbours in the batch. Below a weighted sum of layers the encoder is frozen: it stays in evaluation mode
    whatever `train()` says, so it neither drops nor masks anything.
    """
    source = args.model_name_or_path
    keeps_head = _fits_head(config, labels, args)
    config.id2label, config.label2id = dict(enumerate(labels)), {label: i for i, label in enumerate(labels)}
    config.problem_type = "single_label_classification"
    model = hide_padding(load_with_head(Wav2Vec2ForSequenceClassification, source, config, () if keeps_head else HEAD))
    if config.use_weighted_layer_sum and not keeps_head:
        nn.init.constant_(model.layer_weights, 1 / len(model.layer_weights))
    if config.use_weighted_layer_sum:
        model.freeze_base_model()
        model.wav2vec2.register_forward_pre_hook(_stay_in_evaluation, prepend=True)
    elif args.freeze_feature_encoder:
        model.freeze_feature_encoder()
    return model


def _fits_head(config: Wav2Vec2Config, labels: Sequence[str], args: FineTuningArguments) -> bool:
    """Whether the folder that training starts from has a head for these labels; what comes of it is said."""
    source = args.model_name_or_path
    if not (theirs := folder_labels(source)):
        return False
    before = load_config(source, None)
    differs = [key for key in ("classifier_proj_size", "use_weighted_layer_sum")
               if getattr(before, key) != getattr(config, key)]  # fmt: skip
    listed = ", ".join(theirs[:10]) + " …" * (len(theirs) > 10)
    reason = f"other labels ({listed})" if theirs != list(labels) else f"another {differs[0]}" if differs else ""
    args.print_once(f"        head: new, as {source} has {reason}" if reason else
                    f"        head: kept from {source}, which has the same {len(theirs)} labels")  # fmt: skip
    return not reason


def load_classifier(source: str) -> Wav2Vec2ForSequenceClassification:
    """A fine-tuned model as it is."""
    if not folder_labels(source):
        raise UserError(
            f"--do_train false: {source} has no classifier: give a folder that finetune_classification.py made"
        )
    return hide_padding(load_with_head(Wav2Vec2ForSequenceClassification, source, load_config(source, None), head=()))


def _stay_in_evaluation(base: nn.Module, inputs: tuple) -> None:
    base.eval()


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
            scores["loss"] = float(F.cross_entropy(logits[known], labels[known]))  # whatever weights training has
        return probabilities, scores

    def summary(self) -> dict[str, Any]:
        run = super().summary() | {"labels": list(self.model.config.label2id)}
        if self.train_dataset is None:
            return run
        run |= {"mode": self.args.mode, "train_labels": dict(Counter(self.train_dataset.table["target"]))}
        if self.args.mode == "probe":
            run["layer_weights"] = self.model.layer_weights.detach().softmax(0).tolist()
        return run
