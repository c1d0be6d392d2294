"""Transcripts for CTC: their flags, normalisation, the vocabulary and its files, and the text of a best path.

Units are characters with `|` between words, or tokens (phonemes). A vocabulary of characters has the entry `|`, one of
tokens has not. It comes from the training text alone. A unit that only occurs elsewhere is `<unk>` to the loss, and an
error to the error rates. Shapes: T latent frames, U units of a transcript.
"""

import json
import tempfile
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from transformers import (
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2PhonemeCTCTokenizer,
    Wav2Vec2Processor,
)
from transformers.utils import cached_file

from w2v2.errors import SEEDS, UserError, check_ranges, flag, refuse, take_back
from w2v2.evaluate.scores import CHARACTERS, TARGET_UNITS, TOKENS
from w2v2.finetune.arguments import follow_folder
from w2v2.finetune.normalisation import CASES, WORD_DELIMITER, TextRules, fold_case
from w2v2.model.loading import first_line, locate

VOCABULARY_FILE = "vocab.json"
BLANK, UNKNOWN = "<pad>", "<unk>"
SPECIAL = (BLANK, UNKNOWN, "<s>", "</s>")  # never written; the last two in vocabularies that others made
TEXT_FLAGS = {"target_unit", "text_case", "drop_characters", "keep_characters", "fold_accents", "fold_compatibility",
              "drop_tokens"}  # fmt: skip


@dataclass
class CTCArguments:
    """Transcripts, which of them a run learns from, and the beam search."""

    train_hours: float | None = flag(
        None, "Learn from so many hours, evenly over speakers; 0: all.", min=0, heading="Data"
    )
    subset_seed: int = flag(
        0, "Another number draws other hours; with one, small draws are part of large ones.", **SEEDS
    )
    train_list: str | None = flag(None, "Learn from these alone: a list of ids or paths, or a folder (Libri-Light's).")
    text_column_name: str | None = flag(None, "Column of the data set with the transcripts (default: as in manifests).")
    target_unit: str = flag(
        CHARACTERS, "Characters, or tokens as phonemes.", choices=TARGET_UNITS, heading="Transcripts"
    )
    text_case: str = flag("auto", "Case of the transcripts; auto: capitals, if training text has both.", choices=CASES)
    drop_characters: str | None = flag(None, "Left out of the transcripts (default: punctuation and symbols).")
    keep_characters: str = flag("", "Characters that stay all the same, as \\u200c (in YAML) for Persian.")
    fold_accents: bool = flag(False, "Write É as E, ü as u, ά as α.")
    fold_compatibility: bool = flag(
        False, "Write ﬁ as fi, Ａ as A (Unicode NFKC); takes letters of some scripts apart."
    )
    drop_tokens: list[str] = flag([], "Tokens that are left out of the transcripts, such as sil spn.")
    ctc_zero_infinity: bool = flag(True, "Infinite losses (text longer than the frames) count as zero.", heading="Loss")
    ctc_loss_reduction: str = flag(
        "mean", "`mean` over utterances of the loss a character; `sum` over the characters of an update with "
        "--batch_seconds, of a micro-batch without.", choices=["mean", "sum"]
    )  # fmt: skip
    initial_blank_probability: float = flag(
        0.0, "The blank's probability under a new head; 0: that of any other unit.", min=0, below=1
    )
    blank_warning_steps: int = flag(
        1_000, "Warn of nothing but blanks so long after the encoder began to learn; 0: not.", min=0
    )
    chunk_seconds: float = flag(
        40.0, "Longer recordings are transcribed in overlapping chunks of this length.", min=10, heading="Recognition"
    )
    subtitles: str | None = flag(None, "Write subtitles of each audio file into output_dir.", choices=["srt", "vtt"])
    lm: str | None = flag(None, "n-gram to search with at the end: an ARPA file (also .gz) or a KenLM binary.")
    lexicon: str | None = flag(None, "Words that may be recognised, one a line; left out: those of the n-gram.")
    beam_size: int = flag(100, "Hypotheses that the search keeps.", min=1)
    lm_weight: float = flag(1.5, "Weight of the n-gram's log10 probabilities.", min=0)
    word_score: float = flag(0.0, "Bonus of each word.", min=-1e6)
    tune_lm: bool = flag(False, "Choose lm_weight and word_score on the validation data, from a small grid.")
    tune_utterances: int = flag(500, "Validation utterances to choose them on, at most.", min=1)

    def __post_init__(self):
        take_back(self, "lm", "lexicon", "train_list", "text_column_name")
        check_ranges(self)
        self.train_hours = self.train_hours or None
        refuse(
            (self.tune_lm and not self.lm, "--tune_lm needs a language model: name it with --lm"),
            (self.lexicon and not self.lm, "--lexicon needs a language model: name it with --lm"),
            (self.drop_tokens and self.target_unit != TOKENS,
             "--drop_tokens is for tokens, not characters: give --target_unit tokens, or leave it out"),
            *((self.target_unit == TOKENS and getattr(self, name), f"--{name} is for words, not tokens: leave it out")
              for name in ("word_score", "lexicon", "drop_characters", "keep_characters", "fold_accents")),
        )  # fmt: skip

    @property
    def rules(self) -> TextRules:
        fields = (self.target_unit, self.text_case, self.drop_characters, self.keep_characters, self.fold_accents)
        return TextRules(*fields, self.fold_compatibility, tuple(self.drop_tokens))


def split_units(text: str, unit: str) -> list[str]:
    """Entries of the vocabulary that spell a normalised text, shape (U,)."""
    return text.split() if unit == TOKENS else [WORD_DELIMITER if c == " " else c for c in text]


def unit_of(vocabulary: dict[str, int]) -> str:
    return CHARACTERS if WORD_DELIMITER in vocabulary else TOKENS


def count_units(texts: Iterable[str], unit: str) -> Counter[str]:
    return Counter(token for text in texts for token in split_units(text, unit))


def build_vocabulary(texts: Iterable[str], unit: str = CHARACTERS) -> dict[str, int]:
    """Unit → id, from normalised training text: blank 0, unknown 1, delimiter 2 (characters only), then the units."""
    first = [BLANK, UNKNOWN, WORD_DELIMITER] if unit == CHARACTERS else [BLANK, UNKNOWN]
    return {token: i for i, token in enumerate([*first, *sorted(set(count_units(texts, unit)) - set(first))])}


def encode(text: str, vocabulary: dict[str, int]) -> list[int]:
    """Ids of a normalised text, shape (U,)."""
    return [vocabulary.get(token, vocabulary[UNKNOWN]) for token in split_units(text, unit_of(vocabulary))]


def align_path(ids: Iterable[int], vocabulary: dict[str, int]) -> list[tuple[str, int, int]]:
    """What the best path writes: each unit with its first frame and the frame after its last.

    Repeats are collapsed, then blanks removed. ids (T,), negative ones are padding.
    """
    silent = {vocabulary[token] for token in SPECIAL if token in vocabulary and token != UNKNOWN}
    token_of = {i: token for token, i in vocabulary.items()}
    units, start = [], 0
    for i, run in groupby(int(i) for i in ids):
        start, first = start + len(list(run)), start
        if i >= 0 and i not in silent:
            units.append((token_of[i], first, start))
    return units


def align_words(units: Sequence[tuple[str, int, int]], unit: str) -> list[tuple[str, int, int]]:
    """Words of an aligned path (tokens, where these are the units), with their frames likewise."""
    if unit == TOKENS:
        return list(units)
    groups = [list(group) for is_end, group in groupby(units, lambda u: u[0] in (WORD_DELIMITER, " ")) if not is_end]
    return [("".join(token for token, *_ in group), group[0][1], group[-1][2]) for group in groups]


def join_units(units: Sequence[tuple[str, int, int]], unit: str) -> str:
    return " ".join(word for word, *_ in align_words(units, unit))


def greedy_decode(ids: Iterable[int], vocabulary: dict[str, int]) -> str:
    """Text of the best path, from ids (T,); negative ones are padding."""
    return join_units(align_path(ids, vocabulary), unit_of(vocabulary))


def frames_needed(labels: Sequence[Hashable]) -> int:
    """Fewest frames that CTC needs for these labels: one each, and a blank between equal neighbours."""
    return len(labels) + sum(a == b for a, b in pairwise(labels))


def make_processor(vocabulary: dict[str, int], feature_extractor: Wav2Vec2FeatureExtractor) -> Wav2Vec2Processor:
    """Feature extractor and tokenizer in one, for `pipeline("automatic-speech-recognition")`."""
    special = dict(bos_token=None, eos_token=None, unk_token=UNKNOWN, pad_token=BLANK)
    options = special | dict(clean_up_tokenization_spaces=False)  # else "DO N'T" would become "DON'T"
    if is_phonetic := unit_of(vocabulary) == TOKENS:
        options |= dict(do_phonemize=False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, VOCABULARY_FILE)
        path.write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
        tokenizer = (Wav2Vec2PhonemeCTCTokenizer if is_phonetic else Wav2Vec2CTCTokenizer)(str(path), **options)
    return Wav2Vec2Processor(feature_extractor=feature_extractor, tokenizer=tokenizer)


def read_vocabulary(source: str) -> dict[str, int]:
    """Unit → id of a fine-tuned folder or Hub id; its own blank, unknown and delimiter bear this program's names.

    Raises UserError where it has none that this program can use.
    """

    def read(name: str) -> dict[str, Any]:
        path = cached_file(locate(source), name, _raise_exceptions_for_missing_entries=False)
        return json.loads(Path(path).read_text(encoding="utf-8")) if path else {}

    def own(name: str, *usual: str) -> str | None:
        token = named.get(name) or next((token for token in usual if token in found), None)
        return token["content"] if isinstance(token, dict) else token

    where = f"--model_name_or_path {source}"
    unusable = f"{where}: {VOCABULARY_FILE} is not a vocabulary of CTC: needs a blank, an unknown token, ids from 0"
    try:
        found = read(VOCABULARY_FILE)
        named = read("special_tokens_map.json") | read("tokenizer_config.json")
        added, size = read("added_tokens.json"), read("config.json").get("vocab_size", Wav2Vec2Config().vocab_size)
        added |= {entry["content"]: int(id) for id, entry in named.get("added_tokens_decoder", {}).items()}
        refuse((not found, f"{where}: has no {VOCABULARY_FILE}: give a fine-tuned folder or Hub id, or fine-tune this "
                           "model with --train_data"))  # fmt: skip
        found |= {token: id for token, id in added.items() if id < size}  # others have no output
        names = {own("pad_token", BLANK, "[PAD]"): BLANK, own("unk_token", UNKNOWN, "[UNK]"): UNKNOWN,
                 own("bos_token"): "<s>", own("eos_token"): "</s>",
                 own("word_delimiter_token", WORD_DELIMITER): WORD_DELIMITER}  # fmt: skip
        vocabulary = {names.get(token, token): id for token, id in found.items()}
        is_whole = sorted(vocabulary.values()) == list(range(len(found))) and {BLANK, UNKNOWN} <= set(vocabulary)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{unusable} ({first_line(error)})") from None
    refuse((not is_whole, unusable))
    return vocabulary


def follow_text(arguments: CTCArguments, source: str, vocabulary: dict[str, int]) -> CTCArguments:
    """Flags that normalise transcripts as the fine-tuned folder or Hub id `source` did; a flag that was given wins.

    What its own flags do not tell, its vocabulary does: units and case.
    """
    arguments = follow_folder(arguments, source, TEXT_FLAGS, text_case=case_of(vocabulary))
    arguments = replace(arguments, target_unit=unit_of(vocabulary))
    if arguments.target_unit == CHARACTERS:  # what it writes is not dropped; a joiner stays beside a virama alone
        rules, characters = replace(arguments, text_case="keep").rules, {c for c in vocabulary if len(c) == 1}
        dropped = (c for c in sorted(characters - {WORD_DELIMITER}) if c not in rules(f"\u0d4d{c}"))
        arguments.keep_characters += "".join(dropped)
    return arguments


def case_of(vocabulary: dict[str, int]) -> str:
    """The case of the texts that a vocabulary was made from, `upper` where nothing tells."""
    units = set(vocabulary) - set(SPECIAL)
    letters = "".join(sorted(units))
    case = next((case for case in ("upper", "lower") if fold_case(letters, case) == letters), "keep")
    return f"turkish_{case}" if case != "keep" and units >= {"upper": {"I", "İ"}, "lower": {"ı", "i"}}[case] else case
