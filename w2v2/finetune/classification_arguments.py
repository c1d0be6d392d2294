"""Flags of fine-tuning for classification: those of fine-tuning with other defaults, and what is particular to labels."""

from dataclasses import dataclass
from typing import Any

from w2v2.errors import UserError
from w2v2.evaluate.scores import MEASURES
from w2v2.finetune.arguments import FineTuningArguments, check_metric, flag

_LEARNING_RATES = {"finetune": 3e-5, "probe": 1e-3}


@dataclass
class LabelArguments:
    """What is particular to labels."""

    label_column: str = flag("label", "The manifests' column that holds the label: label, speaker or any other.")
    label_map: list[str] = flag([], "Labels to rename or merge, as OLD=NEW: exc=hap counts excited as happy.")
    labels: list[str] = flag([], "Only these labels (after --label_map), in this order; other utterances are left out.")
    class_weights: str = flag(
        "none", "`balanced` weights an utterance's loss inversely to how frequent its class is.",
        choices=["none", "balanced"],
    )  # fmt: skip


@dataclass
class ClassificationArguments(FineTuningArguments):
    """`FineTuningArguments` with defaults for labels of whole utterances (those of the audio classification example of transformers)."""

    mode: str = flag(
        "finetune",
        "`finetune`: all but the convs learns; `probe`: the encoder is frozen, and a weighted sum of its layers and a linear "
        "head learn (SUPERB's way).",
        choices=["finetune", "probe"],
    )
    classifier_proj_size: int = flag(256, "Width of the head's projection, which is averaged over time.")
    crop_seconds: float = flag(
        20.0, "Longest piece of an utterance that training hears, another one each epoch; 0: all of it."
    )
    folds: str | None = flag(
        None,
        "Cross-validate over --train_data alone; utterances with the same value in this column (speaker, session, …) stay in one part.",
    )
    num_folds: int | None = flag(None, "Even folds of whole groups (default: each group is a fold).")

    max_seconds: float | None = flag(None, "Longer utterances are left out of training.")
    learning_rate: float | None = flag(None, "Peak learning rate (default: 3e-5; 1e-3 in `probe`).")
    max_steps: int = flag(3_000, "Updates in the run (in each fold).")
    per_device_train_batch_size: int = flag(8, "Utterances in a micro-batch.")
    gradient_accumulation_steps: int = flag(4, "Micro-batches of a device in one update.")
    lr_scheduler_type: str = flag(
        "linear", "What follows the warm-up.", choices=["linear", "cosine", "constant", "tri_stage"]
    )
    mask_time_prob: float = flag(
        0.05, "Time mask: expected number of masked frames over frames, overlaps counted twice."
    )
    mask_feature_prob: float = flag(0.0, "Channel mask: the same over channels.")
    layerdrop: float = flag(0.0, "Probability that a transformer layer is left out.")
    hidden_dropout: float = flag(0.1, "Dropout of the transformer's hidden states.")
    attention_dropout: float = flag(0.1, "Dropout of attention weights.")
    max_grad_norm: float = flag(1.0, "Clip the gradient's norm to this; 0 does not clip.")
    eval_steps: float = flag(250, "Updates between two validations; under 1: a fraction of the run.")
    save_steps: float = flag(250, "Updates between two checkpoints; a multiple of eval_steps.")
    metric_for_best_model: str | None = flag(
        "uar", "The measure that says which is best: uar, accuracy, macro_f1 or loss."
    )
    greater_is_better: bool | None = flag(None, "Whether more of it is better (default: of all but the loss).")

    def __post_init__(self):
        if self.learning_rate is None:
            self.learning_rate = _LEARNING_RATES[self.mode]
        if self.folds in ("", "none"):
            self.folds = None
        if not self.do_train:
            raise UserError(
                "--do_train false: here there is no evaluation alone; give the sets to score as --test_data when training"
            )
        super().__post_init__()
        if self.num_folds is not None and self.folds is None:
            raise UserError("--num_folds needs --folds: name the column whose groups stay together, such as speaker")
        if self.folds and (self.validation_data or self.test_data):
            raise UserError("--folds takes all from --train_data: leave --validation_data and --test_data out")
        check_metric(self.metric_for_best_model, MEASURES)
        if self.crop_seconds < 0:
            raise UserError(f"--crop_seconds {self.crop_seconds}: give seconds above 0, or 0 for whole utterances")

    def required_flags(self) -> tuple[str, ...]:
        return ("train_data", "output_dir") if self.folds else super().required_flags()

    def model_changes(self) -> dict[str, Any]:
        """The flags that are keys of the model's configuration; a frozen encoder is neither masked nor dropped from."""
        changes = super().model_changes()
        if self.mode == "probe":
            changes |= {name: 0.0 for name in changes if name.endswith(("_prob", "dropout", "layerdrop"))}
        return changes | {
            "use_weighted_layer_sum": self.mode == "probe",
            "classifier_proj_size": self.classifier_proj_size,
        }
