"""How wrong transcripts are: error rates over a corpus and of single utterances, and which utterances are worst.

For transcripts of words: WER and CER. For transcripts of tokens (phonemes): PER, the same count over tokens. A rate is
(substitutions + deletions + insertions) / units of the references over the whole corpus, a fraction that can exceed 1.
jiwer counts the edits; spaces count as characters. An empty reference adds its hypothesis as insertions. References
that are all empty have no rate and raise `ValueError`.
"""

from collections.abc import Sequence
from typing import Any

import jiwer

CHARACTERS, TOKENS = TARGET_UNITS = ("characters", "tokens")
RATES = {CHARACTERS: ("wer", "cer"), TOKENS: ("per",)}  # the first says which checkpoint is best
NAMES = {"wer": "WER", "cer": "CER", "per": "PER"}


def error_rates(references: Sequence[str], hypotheses: Sequence[str], unit: str = CHARACTERS) -> dict[str, float]:
    """`{"wer": …, "cer": …}`, or `{"per": …}` for tokens, over the corpus. Raises ValueError without references."""
    references, hypotheses = list(references), list(hypotheses)
    if not any(reference.strip() for reference in references):
        raise ValueError("all references are empty: there is no error rate")
    return {name: (jiwer.cer if name == "cer" else jiwer.wer)(references, hypotheses) for name in RATES[unit]}


def word_error_rate(reference: str, hypothesis: str) -> float:
    """WER (PER, if the words are tokens) of a single utterance, whose reference is not empty."""
    return jiwer.wer(reference, hypothesis)


def count_edits(references: Sequence[str], hypotheses: Sequence[str]) -> dict[str, int]:
    """Words of the references, and how many of them were hit, substituted, deleted, and how many inserted."""
    found = jiwer.process_words(list(references), list(hypotheses))
    names = ("hits", "substitutions", "deletions", "insertions")
    counts = {name: getattr(found, name) for name in names}
    return {"words": counts["hits"] + counts["substitutions"] + counts["deletions"]} | counts


def worst_utterances(lines: Sequence[dict[str, Any]], rate: str, most: int = 10) -> list[dict[str, Any]]:
    """The `most` predictions with errors of the highest `rate`; among equals the longest reference comes first."""
    wrong = [line for line in lines if line.get(rate)]
    return sorted(wrong, key=lambda line: (-line[rate], -len(line["reference"]), line["id"]))[:most]
