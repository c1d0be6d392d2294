"""Transcripts for CTC: normalisation, the vocabulary, labels, and the text of a best path.

The units of a text are characters with `|` between words, or, where the transcripts are phonemes, the tokens between its spaces.
The vocabulary says which: one of characters has the entry `|`, one of tokens has not. It comes from the training text alone; a
unit that only occurs elsewhere is `<unk>` to the loss, and an error to the error rates, whose references stay as written.

Shapes: T latent frames, U units of a transcript.
"""

import unicodedata
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

BLANK, UNKNOWN, WORD_DELIMITER = "<pad>", "<unk>", "|"
SPECIAL = (BLANK, UNKNOWN, "<s>", "</s>")  # never written; the last two in vocabularies that others made
CHARACTERS, TOKENS = TARGET_UNITS = ("characters", "tokens")
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
