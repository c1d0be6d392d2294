"""The vocabulary of a fine-tuned folder, written for the stock classes and read back.

`vocab.json` and the tokenizer's files are what `pipeline("automatic-speech-recognition")` wants; how the transcripts were normalised
stands in `finetune_config.yaml` beside them.
"""

import json
import os
import tempfile
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
from w2v2.finetune.text import BLANK, TOKENS, UNKNOWN, WORD_DELIMITER, unit_of
from w2v2.model.backbone import locate

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
