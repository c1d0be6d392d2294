"""Transcripts for CTC: their flags, normalisation, the vocabulary and its files, and the text of a best path.

Units are characters with `|` between words, or tokens (phonemes). A vocabulary of characters has the entry `|`, one of
tokens has not. It comes from the training text alone. A unit that only occurs elsewhere is `<unk>` to the loss, and an
error to the error rates. Shapes: T latent frames, U units of a transcript.
"""

import json
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from pathlib import Path

import yaml
from transformers import Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2PhonemeCTCTokenizer, Wav2Vec2Processor
from transformers.utils import cached_file

from w2v2.errors import SEEDS, UserError, check_ranges, flag, refuse, take_back
from w2v2.evaluate.scores import CHARACTERS, TARGET_UNITS, TOKENS
from w2v2.finetune.arguments import CONFIG_FILE
from w2v2.model.loading import locate

VOCABULARY_FILE = "vocab.json"
BLANK, UNKNOWN, WORD_DELIMITER = "<pad>", "<unk>", "|"
SPECIAL = (BLANK, UNKNOWN, "<s>", "</s>")  # never written; the last two in vocabularies that others made
CASES = ("upper", "lower", "keep")
DROPPED_CHARACTERS = '!"#$%&()*+,-./:;<=>?@[\\]^_`{|}~¡¿«»“”„‚‘…–—'
TEXT_FLAGS = {"target_unit", "text_case", "drop_characters", "fold_accents", "drop_tokens"}
_TO_SPACE = "-/_–—"  # where one of these is dropped, a word ends
_APOSTROPHES = str.maketrans({"’": "'", "ʼ": "'"})


@dataclass(frozen=True)
class TextRules:
    """Called with a transcript, gives what the model is to write.

    Characters: NFKC, one case (unless `keep`), accents folded if asked for, plain apostrophes, single spaces. Dropped
    characters are gone; a dash, slash or underscore becomes a space. `|` is always dropped: the vocabulary uses it for
    the space. Tokens are left as they are but for `drop_tokens`.
    """

    unit: str = CHARACTERS
    case: str = "upper"
    drop_characters: str = DROPPED_CHARACTERS
    fold_accents: bool = False
    drop_tokens: tuple[str, ...] = ()

    def __call__(self, text: str) -> str:
        if self.unit == TOKENS:
            return " ".join(token for token in text.split() if token not in (*self.drop_tokens, WORD_DELIMITER))
        text = unicodedata.normalize("NFKC", text).translate(_APOSTROPHES)
        if self.fold_accents:
            parts = unicodedata.normalize("NFKD", text)
            text = unicodedata.normalize("NFC", "".join(c for c in parts if not unicodedata.combining(c)))
        text = text if self.case == "keep" else text.upper() if self.case == "upper" else text.lower()
        dropped = {c: " " if c in _TO_SPACE else None for c in self.drop_characters + WORD_DELIMITER}
        return " ".join(text.translate(str.maketrans(dropped)).split())


@dataclass
class CTCArguments:
    """Transcripts, which of them a run learns from, and the beam search."""

    target_unit: str = flag(CHARACTERS, "What is written: characters, or tokens as phonemes.", choices=TARGET_UNITS)
    text_case: str = flag("upper", "Case of the transcripts; `keep` leaves it.", choices=CASES)
    drop_characters: str = flag(DROPPED_CHARACTERS, "Characters that are left out of the transcripts.")
    fold_accents: bool = flag(False, "Write É as E, ü as u.")
    drop_tokens: list[str] = flag([], "Tokens that are left out of the transcripts, such as sil spn.")
    ctc_zero_infinity: bool = flag(True, "Infinite losses (text longer than the frames) count as zero.")
    ctc_loss_reduction: str = flag(
        "mean", "`mean` over utterances of the loss a character; `sum` over the characters of an update with "
        "--batch_seconds, of a micro-batch without.", choices=["mean", "sum"]
    )  # fmt: skip
    train_hours: float | None = flag(None, "Learn from so many hours, drawn evenly over speakers; 0: all.", min=0)
    subset_seed: int = flag(
        0, "Another number draws other hours; with one, small draws are part of large ones.", **SEEDS
    )
    train_list: str | None = flag(None, "Learn from these alone: a list of ids or paths, or a folder (Libri-Light's).")
    blank_warning_steps: int = flag(
        1_000, "Warn of nothing but blanks so long after the encoder began to learn; 0: not.", min=0
    )
    lm: str | None = flag(None, "n-gram to search with at the end: an ARPA file (also .gz) or a KenLM binary.")
    lexicon: str | None = flag(None, "Words that may be recognised, one a line; left out: those of the n-gram.")
    beam_size: int = flag(100, "Hypotheses that the search keeps.", min=1)
    lm_weight: float = flag(1.5, "Weight of the n-gram's log10 probabilities.", min=0)
    word_score: float = flag(0.0, "Bonus of each word.", min=-1e6)
    tune_lm: bool = flag(False, "Choose lm_weight and word_score on the validation data, from a small grid.")
    tune_utterances: int = flag(500, "Validation utterances to choose them on, at most.", min=1)

    def __post_init__(self):
        take_back(self, "lm", "lexicon", "train_list")
        check_ranges(self)
        self.train_hours = self.train_hours or None
        refuse(
            (self.tune_lm and not self.lm, "--tune_lm needs a language model: name it with --lm"),
            (self.target_unit == TOKENS and self.word_score, "--word_score is for words, not tokens: leave it out"),
        )

    @property
    def rules(self) -> TextRules:
        drop_tokens = tuple(self.drop_tokens)
        return TextRules(self.target_unit, self.text_case, self.drop_characters, self.fold_accents, drop_tokens)


def split_units(text: str, unit: str) -> list[str]:
    """Entries of the vocabulary that spell a normalised text, shape (U,)."""
    return text.split() if unit == TOKENS else [WORD_DELIMITER if c == " " else c for c in text]


def unit_of(vocabulary: dict[str, int]) -> str:
    return CHARACTERS if WORD_DELIMITER in vocabulary else TOKENS


def build_vocabulary(texts: Iterable[str], unit: str = CHARACTERS) -> dict[str, int]:
    """Unit → id, from normalised training text: blank 0, unknown 1, delimiter 2 (characters only), then the units."""
    first = [BLANK, UNKNOWN, WORD_DELIMITER] if unit == CHARACTERS else [BLANK, UNKNOWN]
    units = {token for text in texts for token in split_units(text, unit)}
    return {token: i for i, token in enumerate([*first, *sorted(units - set(first))])}


def unknown_units(texts: Iterable[str], vocabulary: dict[str, int]) -> dict[str, int]:
    """Units that the vocabulary lacks, with their counts, commonest first."""
    counts = Counter(token for text in texts for token in split_units(text, unit_of(vocabulary)))
    return {token: n for token, n in counts.most_common() if token not in vocabulary}


def encode(text: str, vocabulary: dict[str, int]) -> list[int]:
    """Ids of a normalised text, shape (U,)."""
    return [vocabulary.get(token, vocabulary[UNKNOWN]) for token in split_units(text, unit_of(vocabulary))]


def greedy_decode(ids: Iterable[int], vocabulary: dict[str, int]) -> str:
    """Text of the best path: repeats collapsed, then blanks removed; ids (T,), negative ones are padding."""
    silent = {vocabulary[token] for token in SPECIAL if token in vocabulary and token != UNKNOWN}
    token_of = {i: token for token, i in vocabulary.items()}
    best = [token_of[i] for i, _ in groupby(int(i) for i in ids) if i >= 0 and i not in silent]
    if unit_of(vocabulary) == TOKENS:
        return " ".join(best)
    return " ".join("".join(" " if token == WORD_DELIMITER else token for token in best).split())


def frames_needed(labels: Sequence[Hashable]) -> int:
    """Fewest frames that CTC needs for these labels: one each, and a blank between equal neighbours."""
    return len(labels) + sum(a == b for a, b in pairwise(labels))


def make_processor(vocabulary: dict[str, int], feature_extractor: Wav2Vec2FeatureExtractor) -> Wav2Vec2Processor:
    """Feature extractor and tokenizer in one, for `pipeline("automatic-speech-recognition")`."""
    options = dict(bos_token=None, eos_token=None, unk_token=UNKNOWN, pad_token=BLANK)
    if is_phonetic := unit_of(vocabulary) == TOKENS:
        options |= dict(do_phonemize=False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, VOCABULARY_FILE)
        path.write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
        tokenizer = (Wav2Vec2PhonemeCTCTokenizer if is_phonetic else Wav2Vec2CTCTokenizer)(str(path), **options)
    return Wav2Vec2Processor(feature_extractor=feature_extractor, tokenizer=tokenizer)


def read_vocabulary(source: str) -> dict[str, int]:
    """Unit → id of a fine-tuned folder or Hub id. Raises UserError where it has none that this program can use."""
    try:
        path = cached_file(locate(source), VOCABULARY_FILE)
        vocabulary = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        vocabulary = {}
    except (OSError, ValueError):
        raise UserError(f"--model_name_or_path {source}: has no {VOCABULARY_FILE}: give a fine-tuned folder or Hub id, "
                        "or fine-tune this model with --train_data") from None  # fmt: skip
    if not {BLANK, UNKNOWN} <= set(vocabulary) or sorted(vocabulary.values()) != list(range(len(vocabulary))):
        raise UserError(f"{path}: not a vocabulary of CTC: needs {BLANK}, {UNKNOWN}, and ids that count from 0")
    return vocabulary


def follow_folder(arguments: CTCArguments, source: str, vocabulary: dict[str, int]) -> CTCArguments:
    """Flags that normalise transcripts as the fine-tuned folder or Hub id `source` did; a flag that was given wins.

    What its own flags do not tell, its vocabulary does: units and case.
    """
    folder = Path(locate(source))
    if folder.is_dir():
        places = (folder, folder.parent) if folder.name.startswith("checkpoint-") else (folder,)
        found = next(filter(Path.is_file, (place / CONFIG_FILE for place in places)), None)
    else:
        found = cached_file(source, CONFIG_FILE, _raise_exceptions_for_missing_entries=False)
    written = yaml.safe_load(Path(found).read_text(encoding="utf-8")) or {} if found else {}
    letters = "".join(set(vocabulary) - set(SPECIAL))
    case = "upper" if letters == letters.upper() else "lower" if letters == letters.lower() else "keep"
    trained = {"text_case": case} | {k: v for k, v in written.items() if k in TEXT_FLAGS}
    defaults = CTCArguments()
    followed = {k: v for k, v in trained.items() if getattr(arguments, k) == getattr(defaults, k)}
    return replace(arguments, **followed | {"target_unit": unit_of(vocabulary)})
