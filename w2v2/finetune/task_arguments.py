"""The flags of one task: of speech recognition with CTC, and of labels for whole utterances."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from w2v2.data.flags import check_ranges, flag
from w2v2.errors import UserError
from w2v2.evaluate.error_rates import CHARACTERS, TARGET_UNITS, TOKENS
from w2v2.evaluate.scores import MEASURES
from w2v2.finetune.arguments import FineTuningArguments
from w2v2.finetune.decoding import Setting
from w2v2.finetune.text import (
    CASES,
    DROPPED_CHARACTERS,
    TextRules,
    case_of,
    read_text_flags,
    unit_of,
)

TEXT_FLAGS = {"target_unit", "text_case", "drop_characters", "fold_accents", "drop_tokens"}
_LEARNING_RATES = {"finetune": 3e-5, "probe": 1e-3}


def check_metric(name: str | None, measures: Iterable[str]) -> None:
    """Raises UserError where no validation has a measure of that name."""
    known = [*measures, "loss"]
    if name is not None and name.removeprefix("eval_") not in known:
        raise UserError(f"--metric_for_best_model {name}: not measured here; give one of {', '.join(known)}")


@dataclass
class CTCArguments:
    """Transcripts, which of them a run learns from, and the beam search."""

    target_unit: str = flag(
        CHARACTERS,
        "What the model writes: characters, or tokens between spaces, as phonemes are.",
        choices=TARGET_UNITS,
    )
    text_case: str = flag("upper", "Case of the transcripts; `keep` leaves it.", choices=CASES)
    drop_characters: str = flag(DROPPED_CHARACTERS, "Characters that are left out of the transcripts.")
    fold_accents: bool = flag(False, "Write É as E, ü as u.")
    drop_tokens: list[str] = flag([], "Tokens that are left out of the transcripts, such as sil spn.")
    ctc_zero_infinity: bool = flag(True, "Infinite losses (text longer than the frames) count as zero.")
    ctc_loss_reduction: str = flag(
        "mean", "`mean` over utterances of the loss a character, or `sum`: over characters with --batch_seconds (as "
        "fairseq weights them), over a micro-batch without.", choices=["mean", "sum"]
    )  # fmt: skip
    train_hours: float | None = flag(
        None, "Learn from so many hours, drawn evenly over speakers; small draws are part of large ones; 0: all.", min=0
    )  # fmt: skip
    subset_seed: int = flag(0, "Another number draws other hours.")
    train_list: str | None = flag(
        None,
        "Learn from these utterances alone: a file with an id or path a line, or a folder of audio (Libri-Light's 1h).",
    )
    blank_warning_steps: int = flag(
        1_000, "Warn where nothing but blanks is written so many updates after the encoder began to learn; 0 does not."
    )
    lm: str | None = flag(None, "n-gram to search with at the end: an ARPA file (also .gz) or a KenLM binary.")
    lexicon: str | None = flag(None, "Words that may be recognised, one a line; left out: those of the n-gram.")
    beam_size: int = flag(100, "Hypotheses that the search keeps.", min=1)
    lm_weight: float = flag(1.5, "Weight of the n-gram's log10 probabilities.")
    word_score: float = flag(0.0, "Bonus of each word.")
    tune_lm: bool = flag(False, "Choose lm_weight and word_score on the validation data, from a small grid.")
    tune_utterances: int = flag(500, "Validation utterances to choose them on, at most.", min=1)

    def __post_init__(self):
        for name in ("lm", "lexicon", "train_list"):
            if getattr(self, name) in ("", "none"):
                setattr(self, name, None)
        check_ranges(self)
        self.train_hours = self.train_hours or None
        if self.tune_lm and not self.lm:
            raise UserError("--tune_lm needs a language model: name it with --lm")
        if self.target_unit == TOKENS and self.word_score:
            raise UserError("--word_score is for words; --target_unit tokens has none: leave it out")

    @property
    def rules(self) -> TextRules:
        drop_tokens = tuple(self.drop_tokens)
        return TextRules(self.target_unit, self.text_case, self.drop_characters, self.fold_accents, drop_tokens)

    @property
    def setting(self) -> Setting:
        return Setting(self.lm_weight, self.word_score)


def follow_folder(arguments: CTCArguments, source: str, vocabulary: dict[str, int]) -> CTCArguments:
    """Flags that normalise transcripts as the fine-tuned folder `source` did; a flag that was given wins.

    What the folder's own flags do not tell, its vocabulary does: units and case.
    """
    trained = {"text_case": case_of(vocabulary)} | read_text_flags(source, TEXT_FLAGS)
    defaults = CTCArguments()
    followed = {k: v for k, v in trained.items() if getattr(arguments, k) == getattr(defaults, k)}
    return replace(arguments, **followed | {"target_unit": unit_of(vocabulary)})


@dataclass
class LabelArguments:
    """Which labels the utterances have."""

    label_column: str = flag("label", "The manifests' column that holds the label: label, speaker or any other.")
    label_map: list[str] = flag([], "Labels to rename or merge, as OLD=NEW: exc=hap counts excited as happy.")
    labels: list[str] = flag([], "Only these labels (after --label_map), in this order; other utterances are left out.")
    class_weights: str = flag(
        "none", "`balanced` weights an utterance's loss inversely to how frequent its class is.",
        choices=["none", "balanced"],
    )  # fmt: skip


@dataclass
class ClassificationArguments(FineTuningArguments):
    """`FineTuningArguments` with the defaults of transformers' audio classification example."""

    mode: str = flag(
        "finetune",
        "`finetune`: all but the convs learns; `probe`: the encoder is frozen, and a weighted sum of its layers and a "
        "linear head learn (SUPERB's way).",
        choices=["finetune", "probe"],
    )
    classifier_proj_size: int = flag(256, "Width of the head's projection, which is averaged over time.", min=1)
    crop_seconds: float = flag(
        20.0, "Longest piece of an utterance that training hears, another one each epoch; 0: all of it.", min=0
    )
    folds: str | None = flag(
        None,
        "Cross-validate over --train_data; utterances alike in this column (speaker, session, …) stay in one part.",
    )
    num_folds: int | None = flag(None, "Even folds of whole groups (default: each group is a fold).")

    max_seconds: float | None = flag(None, "Longer utterances are left out of training.", above=0)
    learning_rate: float | None = flag(None, "Peak learning rate (default: 3e-5; 1e-3 in `probe`).", min=0)
    max_steps: int = flag(3_000, "Updates in the run (in each fold).")
    gradient_accumulation_steps: int = flag(4, "Micro-batches of a device in one update.", min=1)
    lr_scheduler_type: str = flag(
        "linear", "What follows the warm-up.", choices=["linear", "cosine", "constant", "tri_stage"]
    )
    mask_time_prob: float = flag(0.05, "Time mask: masked frames over frames, overlaps counted twice.", min=0)
    mask_feature_prob: float = flag(0.0, "Channel mask: the same over channels.", min=0)
    layerdrop: float = flag(0.0, "Probability that a transformer layer is left out.", min=0, max=1)
    hidden_dropout: float = flag(0.1, "Dropout of the transformer's hidden states.", min=0, max=1)
    attention_dropout: float = flag(0.1, "Dropout of attention weights.", min=0, max=1)
    max_grad_norm: float = flag(1.0, "Clip the gradient's norm to this; 0 does not clip.", min=0)
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
                "--do_train false: there is no evaluation alone here; give the sets to score as --test_data"
            )
        super().__post_init__()
        if self.num_folds is not None and self.folds is None:
            raise UserError("--num_folds needs --folds: name the column whose groups stay together, such as speaker")
        if self.folds and (self.validation_data or self.test_data):
            raise UserError("--folds takes all from --train_data: leave --validation_data and --test_data out")
        if self.folds and self.push_to_hub:
            raise UserError(
                "--push_to_hub with --folds: there would be a model a fold; push one that is trained without --folds"
            )
        if self.folds and self.resume_from_checkpoint not in (None, "auto"):
            raise UserError("--resume_from_checkpoint with --folds takes auto alone: each fold goes on where it was")
        check_metric(self.metric_for_best_model, MEASURES)

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
