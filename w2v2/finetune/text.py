"""Transcripts for CTC: normalisation, the vocabulary and its files, labels, and the text of a best path.

The units of a text are characters with `|` between words, or, where the transcripts are phonemes, the tokens between
its spaces. The vocabulary says which: one of characters has the entry `|`, one of tokens has not. It comes from the
training text alone; a unit that only occurs elsewhere is `<unk>` to the loss, and an error to the error rates, whose
references stay as written.

Shapes: T latent frames, U units of a transcript.
"""

import json
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
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2PhonemeCTCTokenizer,
    Wav2Vec2Processor,
)
from transformers.utils import cached_file

from w2v2.errors import UserError
from w2v2.evaluate.error_rates import CHARACTERS, TOKENS
from w2v2.model.config import locate

VOCABULARY_FILE, FLAGS_FILE = "vocab.json", "finetune_config.yaml"  # the latter says how texts were normalised
BLANK, UNKNOWN, WORD_DELIMITER = "<pad>", "<unk>", "|"
SPECIAL = (BLANK, UNKNOWN, "<s>", "</s>")  # never written; the last two in vocabularies that others made
CASES = ("upper", "lower", "keep")
DROPPED_CHARACTERS = '!"#$%&()*+,-./:;<=>?@[\\]^_`{|}~¡¿«»“”„‚‘…–—'
_TO_SPACE = "-/_–—"  # where one of these is dropped, a word ends
_APOSTROPHES = str.maketrans({"’": "'", "ʼ": "'"})


@dataclass(frozen=True)
class TextRules:
    """How a transcript is made into what the model is to write. Called with a text, gives the normalised one.

    Characters: NFKC, one case (unless `keep`), accents folded if asked for (É → E), dropped characters gone, single
    spaces, plain apostrophes. A dropped dash, slash or underscore becomes a space, so that `well-known` stays two
    words. Tokens are left as they are but for `drop_tokens`. `|` is always dropped, since the vocabulary uses it for
    the space.
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
    """Unit → id, from normalised training text: blank 0, unknown 1, delimiter 2 (characters only), then the units."""
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


def make_processor(vocabulary: dict[str, int], feature_extractor: Wav2Vec2FeatureExtractor) -> Wav2Vec2Processor:
    """Feature extractor and tokenizer in one, for `pipeline("automatic-speech-recognition")`."""
    special = dict(bos_token=None, eos_token=None, unk_token=UNKNOWN, pad_token=BLANK)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, VOCABULARY_FILE)
        path.write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
        if unit_of(vocabulary) == TOKENS:
            tokenizer = Wav2Vec2PhonemeCTCTokenizer(str(path), do_phonemize=False, **special)
        else:
            tokenizer = Wav2Vec2CTCTokenizer(str(path), word_delimiter_token=WORD_DELIMITER, **special)
    return Wav2Vec2Processor(feature_extractor=feature_extractor, tokenizer=tokenizer)


def read_vocabulary(source: str) -> dict[str, int]:
    """Unit → id of a fine-tuned folder or Hub id.

    Raises UserError where it has none, or one that this program cannot use.
    """
    try:
        path = cached_file(locate(source), VOCABULARY_FILE)
    except (OSError, ValueError):
        raise UserError(
            f"--model_name_or_path {source}: no {VOCABULARY_FILE} there (no such folder or Hub id, or no fine-tuned "
            "model): give a fine-tuned folder, or fine-tune this one with --train_data"
        ) from None
    try:
        vocabulary = json.loads(Path(path).read_text(encoding="utf-8"))
        ids = sorted(vocabulary.values())
    except (ValueError, AttributeError, TypeError):
        raise UserError(f"{path}: not a vocabulary: an object of character → id is expected") from None
    if not {BLANK, UNKNOWN} <= vocabulary.keys() or ids != list(range(len(ids))):
        raise UserError(
            f"{path}: not the vocabulary of a CTC model: it needs {BLANK}, {UNKNOWN}, and ids from 0 to {len(ids) - 1}"
        )
    return vocabulary


def check_vocabulary(vocabulary: dict[str, int], checkpoint: str | None) -> None:
    """Raises UserError where a run would go on with another vocabulary than it began with."""
    if checkpoint and json.loads(Path(checkpoint, VOCABULARY_FILE).read_text(encoding="utf-8")) != vocabulary:
        raise UserError(
            f"{checkpoint}: made with another vocabulary than --train_data's; resume with the same training text"
        )


def read_text_flags(source: str, names: set[str]) -> dict[str, Any]:
    """Which of the flags in `names` a fine-tuned folder was made with, as far as they differed from their defaults."""
    folder = Path(locate(source))
    if folder.is_dir():
        places = (folder, folder.parent) if folder.name.startswith("checkpoint-") else (folder,)
        found = next((place / FLAGS_FILE for place in places if (place / FLAGS_FILE).is_file()), None)
    else:
        found = cached_file(source, FLAGS_FILE, _raise_exceptions_for_missing_entries=False)
    written = yaml.safe_load(Path(found).read_text(encoding="utf-8")) or {} if found else {}
    return {name: value for name, value in written.items() if name in names}
