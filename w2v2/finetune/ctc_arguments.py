"""The flags of speech recognition: transcripts, which of them a run learns from, and the search."""

from dataclasses import dataclass, replace

from w2v2.errors import UserError
from w2v2.finetune.arguments import flag
from w2v2.finetune.decoding import Setting
from w2v2.finetune.text import CASES, CHARACTERS, DROPPED_CHARACTERS, TARGET_UNITS, TOKENS, TextRules, case_of, unit_of
from w2v2.finetune.vocabulary import read_text_flags

TEXT_FLAGS = {"target_unit", "text_case", "drop_characters", "fold_accents", "drop_tokens"}


@dataclass
class CTCArguments:
    """What is particular to transcripts."""

    target_unit: str = flag(
        CHARACTERS,
        "What the model writes: characters, or tokens between spaces, as phonemes are.",
        choices=list(TARGET_UNITS),
    )
    text_case: str = flag("upper", "Case of the transcripts; `keep` leaves it.", choices=list(CASES))
    drop_characters: str = flag(DROPPED_CHARACTERS, "Characters that are left out of the transcripts.")
    fold_accents: bool = flag(False, "Write É as E, ü as u.")
    drop_tokens: list[str] = flag([], "Tokens that are left out of the transcripts, such as sil spn.")
    ctc_zero_infinity: bool = flag(True, "Infinite losses (text longer than the frames) count as zero.")
    ctc_loss_reduction: str = flag(
        "mean", "`mean` over utterances of the loss a character, or `sum`: over characters with --batch_seconds (as fairseq weights "
        "them), over a micro-batch without.", choices=["mean", "sum"]
    )  # fmt: skip
    train_hours: float | None = flag(
        None, "Learn from so many hours, drawn evenly over speakers, smaller draws within larger ones; 0: from all."
    )
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
    beam_size: int = flag(100, "Hypotheses that the search keeps.")
    lm_weight: float = flag(1.5, "Weight of the n-gram's log10 probabilities.")
    word_score: float = flag(0.0, "Bonus of each word.")
    tune_lm: bool = flag(False, "Choose lm_weight and word_score on the validation data, from a small grid.")
    tune_utterances: int = flag(500, "Validation utterances to choose them on, at most.")

    def __post_init__(self):
        for name in ("lm", "lexicon", "train_list"):
            if getattr(self, name) in ("", "none"):
                setattr(self, name, None)
        if self.train_hours is not None and self.train_hours < 0:
            raise UserError(f"--train_hours {self.train_hours:g} is negative: give hours, or 0 for all there are")
        self.train_hours = self.train_hours or None
        if self.beam_size < 1 or self.tune_utterances < 1:
            raise UserError("--beam_size and --tune_utterances are at least 1")
        if self.tune_lm and not self.lm:
            raise UserError("--tune_lm needs a language model: name it with --lm")
        if self.target_unit == TOKENS and self.word_score:
            raise UserError("--word_score is for words; --target_unit tokens has none: leave it out")

    @property
    def rules(self) -> TextRules:
        return TextRules(
            self.target_unit, self.text_case, self.drop_characters, self.fold_accents, tuple(self.drop_tokens)
        )

    @property
    def setting(self) -> Setting:
        return Setting(self.lm_weight, self.word_score)


def follow_folder(arguments: CTCArguments, source: str, vocabulary: dict[str, int]) -> CTCArguments:
    """Transcripts are normalised as for the training of this fine-tuned folder, where a flag does not say otherwise.

    What the folder does not tell, its vocabulary does: units and case.
    """
    trained = {"text_case": case_of(vocabulary)} | read_text_flags(source, TEXT_FLAGS)
    defaults = CTCArguments()
    followed = {k: v for k, v in trained.items() if getattr(arguments, k) == getattr(defaults, k)}
    return replace(arguments, **followed | {"target_unit": unit_of(vocabulary)})
