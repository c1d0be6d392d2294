"""Transcripts for CTC: normalisation, the vocabulary, labels, and the text of a best path.

The units of a text are characters with `|` between words, or, where the transcripts are phonemes, the tokens between its spaces.
The vocabulary says which: one of characters has the entry `|`, one of tokens has not. It comes from the training text alone; a
unit that only occurs elsewhere is `<unk>` to the loss, and an error to the error rates, whose references stay as written.

Shapes: T latent frames, U units of a transcript.
"""

import json
import os
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml
from transformers import (
    PreTrainedTokenizer,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2PhonemeCTCTokenizer,
    Wav2Vec2Processor,
)
from transformers.utils import cached_file

from w2v2.errors import UserError
from w2v2.evaluate.error_rates import CHARACTERS, TOKENS
from w2v2.model.config import locate

BLANK, UNKNOWN, WORD_DELIMITER = "<pad>", "<unk>", "|"
SPECIAL = (BLANK, UNKNOWN, "<s>", "</s>")  # never written; the last two in vocabularies that others made
CASES = ("upper", "lower", "keep")
DROPPED_CHARACTERS = '!"#$%&()*+,-./:;<=>?@[\\]^_`{|}~¡¿«»“”„‚‘…–—'
_TO_SPACE = "-/_–—"  # where one of these is dropped, a word ends
_APOSTROPHES = str.maketrans({"’": "'", "ʼ": "'"})


@dataclass(frozen=True)
class TextRules:
    """How a transcript is made into what the model is to write. Called with a text, gives the normalised one.

    Characters: NFKC, one case (unless `keep`), accents folded if asked for (É → E), dropped characters gone, single spaces, plain
    apostrophes. A dropped dash, slash or underscore becomes a space, so that `well-known` stays two words. Tokens are left as
    they are but for `drop_tokens`. `|` is always dropped, since the vocabulary uses it for the space.
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


def split_units(text: str, unit: str) -> list[str]:
    """Entries of the vocabulary that spell a normalised text, shape (U,)."""
    return text.split() if unit == TOKENS else [WORD_DELIMITER if c == " " else c for c in text]


def unit_of(vocabulary: dict[str, int]) -> str:
    return CHARACTERS if WORD_DELIMITER in vocabulary else TOKENS


def case_of(vocabulary: dict[str, int]) -> str:
    """The case of the texts that a vocabulary of characters was made from, `upper` where nothing tells."""
    letters = "".join(set(vocabulary) - set(SPECIAL))
    if letters.lower() == letters.upper() or letters == letters.upper():
        return "upper"
    return "lower" if letters == letters.lower() else "keep"


def build_vocabulary(texts: Iterable[str], unit: str = CHARACTERS) -> dict[str, int]:
    """Unit → id, from normalised training text: blank 0, unknown 1, word delimiter 2 (characters only), then the units in order."""
    first = [BLANK, UNKNOWN, WORD_DELIMITER] if unit == CHARACTERS else [BLANK, UNKNOWN]
    units: set[str] = set()
    for text in texts:
        units.update(split_units(text, unit))
    return {token: i for i, token in enumerate([*first, *sorted(units - set(first))])}


def unknown_units(texts: Iterable[str], vocabulary: dict[str, int]) -> dict[str, int]:
    """Units that the vocabulary lacks, with their counts, commonest first."""
    unit = unit_of(vocabulary)
    counts = Counter(token for text in texts for token in split_units(text, unit))
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
    return len(labels) + sum(a == b for a, b in zip(labels, labels[1:], strict=False))


VOCABULARY_FILE, FLAGS_FILE = "vocab.json", "finetune_config.yaml"


def make_processor(vocabulary: dict[str, int], feature_extractor: Wav2Vec2FeatureExtractor) -> Wav2Vec2Processor:
    """Feature extractor and tokenizer in one, as the stock pipeline wants them."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, VOCABULARY_FILE)
        with open(path, "w", encoding="utf-8") as file:
            json.dump(vocabulary, file, ensure_ascii=False)
        tokenizer = _make_tokenizer(path, vocabulary)
    return Wav2Vec2Processor(feature_extractor=feature_extractor, tokenizer=tokenizer)


def _make_tokenizer(path: str, vocabulary: dict[str, int]) -> PreTrainedTokenizer:
    special = dict(bos_token=None, eos_token=None, unk_token=UNKNOWN, pad_token=BLANK)
    if unit_of(vocabulary) == TOKENS:
        return Wav2Vec2PhonemeCTCTokenizer(path, do_phonemize=False, **special)
    return Wav2Vec2CTCTokenizer(path, word_delimiter_token=WORD_DELIMITER, **special)


def read_vocabulary(source: str) -> dict[str, int]:
    """Unit → id of a fine-tuned folder or Hub id.

    Raises UserError where it has none, or one that this program cannot use.
    """
    try:
        path = cached_file(locate(source), VOCABULARY_FILE)
    except (OSError, ValueError):
        raise UserError(
            f"--model_name_or_path {source}: no {VOCABULARY_FILE} there (no such folder or Hub id, or no fine-tuned model): give a "
            "fine-tuned folder, or fine-tune this one with --train_data"
        ) from None
    try:
        vocabulary = json.loads(Path(path).read_text(encoding="utf-8"))
        ids = sorted(vocabulary.values())
    except (ValueError, AttributeError, TypeError):
        raise UserError(f"{path}: not a vocabulary: an object of character → id is expected") from None
    if missing := [token for token in (BLANK, UNKNOWN) if token not in vocabulary]:
        raise UserError(f"{path}: has no entry {missing[0]}: this program needs {BLANK} as blank and {UNKNOWN}")
    if ids != list(range(len(ids))):
        raise UserError(f"{path}: its ids are not 0 to {len(ids) - 1}, each once: not the vocabulary of a CTC model")
    return vocabulary


def read_text_flags(source: str, names: set[str]) -> dict[str, Any]:
    """Which of the flags in `names` a fine-tuned folder was made with, as far as they differed from their defaults."""
    folder = Path(locate(source))
    if folder.is_dir():
        places = (folder, folder.parent) if folder.name.startswith("checkpoint-") else (folder,)
        found = [place / FLAGS_FILE for place in places if (place / FLAGS_FILE).is_file()]
    else:
        found = [cached_file(source, FLAGS_FILE, _raise_exceptions_for_missing_entries=False)]
    if not found or found[0] is None:
        return {}
    written = yaml.safe_load(Path(found[0]).read_text(encoding="utf-8")) or {}
    return {name: value for name, value in written.items() if name in names}
