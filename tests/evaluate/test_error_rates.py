"""Error rates against a textbook edit distance."""

import itertools

import numpy as np
import pytest

from w2v2.evaluate.error_rates import count_edits, error_rates, word_error_rate, worst_utterances


def edits(a, b):
    """Levenshtein distance, the textbook way."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row = list(itertools.accumulate(
            range(1, len(b) + 1),
            lambda left, j, row=row, x=x: min(left + 1, row[j] + 1, row[j - 1] + (x != b[j - 1])),
            initial=i,
        ))  # fmt: skip
    return row[-1]


def test_error_rates_are_edit_distances_over_the_corpus():
    random = np.random.default_rng(1)
    references = [" ".join(random.choice(["A", "BB", "CAB"], 4)) for _ in range(30)]
    hypotheses = [" ".join(random.choice(["A", "BB", "CAB"], n)) for n in random.integers(0, 7, 30)]
    words = sum(edits(r.split(), h.split()) for r, h in zip(references, hypotheses, strict=True))
    characters = sum(edits(r, h) for r, h in zip(references, hypotheses, strict=True))
    rates = error_rates(references, hypotheses)
    assert rates["wer"] == pytest.approx(words / sum(len(r.split()) for r in references))
    assert rates["cer"] == pytest.approx(characters / sum(map(len, references)))
    assert error_rates(references, hypotheses, "tokens") == {"per": rates["wer"]}


def test_an_empty_reference_counts_insertions():
    assert error_rates(["A B", ""], ["A B", "C C"]) == {"wer": 1.0, "cer": 1.0}
    for unit in ("characters", "tokens"):
        with pytest.raises(ValueError, match="all references are empty"):
            error_rates(["", " "], ["A", ""], unit)


def test_edits_are_counted_apart():
    found = count_edits(["A B C", "D"], ["A X C Y", ""])
    assert found == {"words": 4, "hits": 2, "substitutions": 1, "deletions": 1, "insertions": 1}


def test_the_worst_utterances_come_first():
    texts = {"a": ("ONE TWO", "ONE"), "b": ("ONE", "ONE"), "c": ("ONE TWO SIX TEN", "ONE TWO"), "d": ("ONE", "TWO TWO")}
    lines = [{"id": i, "reference": r, "hypothesis": h, "wer": word_error_rate(r, h)} for i, (r, h) in texts.items()]
    assert [line["id"] for line in worst_utterances(lines, "wer")] == ["d", "c", "a"]
    assert [line["id"] for line in worst_utterances(lines, "wer", 1)] == ["d"]
