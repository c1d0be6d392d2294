"""How wrong transcripts are: error rates over a corpus and of single utterances, and which utterances are worst.

For transcripts of words: WER and CER. For transcripts of tokens (phonemes): PER, the same count over tokens. Edits are counted by
jiwer, rates as fractions. The rule for empty references is in w2v2/evaluation/wer/wer.py.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from w2v2.finetune.text import CHARACTERS, TOKENS

_METRICS = Path(__file__).parent
RATES = {CHARACTERS: ("wer", "cer"), TOKENS: ("per",)}  # the first says which checkpoint is best
NAMES = {"wer": "WER", "cer": "CER", "per": "PER"}


@lru_cache
def _metric(name: str):
    import evaluate  # here, because it takes seconds

    return evaluate.load(str(_METRICS / name), keep_in_memory=True)


def error_rates(references: Sequence[str], hypotheses: Sequence[str], unit: str = CHARACTERS) -> dict[str, float]:
    """`{"wer": …, "cer": …}`, or `{"per": …}` for tokens, over the whole corpus."""
    pairs = dict(predictions=list(hypotheses), references=list(references))
    return {name: _corpus_rate("wer" if name == "per" else name, pairs) for name in RATES[unit]}


def _corpus_rate(name: str, pairs: dict[str, list[str]]) -> float:
    return _metric(name).compute(**pairs)[name]


def word_error_rate(reference: str, hypothesis: str) -> float:
    """WER (PER, if the words are tokens) of a single utterance, whose reference is not empty."""
    import jiwer

    return jiwer.wer(reference, hypothesis)


def count_edits(references: Sequence[str], hypotheses: Sequence[str]) -> dict[str, int]:
    """Words of the references, and how many of them were hit, substituted, deleted, and how many inserted."""
    import jiwer

    found = jiwer.process_words(list(references), list(hypotheses))
    names = ("hits", "substitutions", "deletions", "insertions")
    counts = {name: getattr(found, name) for name in names}
    return {"words": counts["hits"] + counts["substitutions"] + counts["deletions"]} | counts


def worst_utterances(lines: Sequence[dict[str, Any]], rate: str, most: int = 10) -> list[dict[str, Any]]:
    """The `most` predictions with errors that have the highest `rate`; among equals those with the longest reference first."""
    wrong = [line for line in lines if line.get(rate)]
    return sorted(wrong, key=lambda line: (-line[rate], -len(line["reference"]), line["id"]))[:most]
