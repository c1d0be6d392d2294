"""Interpolated modified Kneser-Ney n-grams (Chen and Goodman 1998, section 3), in plain Python.

The highest order has counts. Lower orders count the different words that precede an n-gram (its occurrences, where it
begins the sentence). Each count loses a discount D1, D2 or D3+, by the counts of counts of its order. What a history
loses goes to the next lower order; below the unigrams, to the uniform distribution over the words, `</s>` and `<unk>`.
Such a model is one of ARPA's back-off models: the history's share of the lower order is its back-off weight.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TextIO

BEGIN, END, UNKNOWN = "<s>", "</s>", "<unk>"
FALLBACK = (0.5, 1.0, 1.5)  # discounts where the counts of counts give none, as in lmplz
Gram = tuple[str, ...]


@dataclass
class NGram:
    """`probabilities[n - 1]` and `backoffs[n - 1]` are no logarithms. A missing back-off weight is 1."""

    order: int
    probabilities: list[dict[Gram, float]]
    backoffs: list[dict[Gram, float]]
    discounts: list[tuple[float, float, float]]
    fallbacks: list[int]  # orders whose discounts had to be `FALLBACK`

    def probability(self, history: Sequence[str], word: str) -> float:
        """p(word | history) as a reader of the ARPA file computes it; a word that the model lacks is `<unk>`."""
        words = {gram[0] for gram in self.probabilities[0]}
        gram = tuple(w if w in words else UNKNOWN for w in (*history, word))[-self.order :]
        weight = 1.0
        while gram not in self.probabilities[len(gram) - 1]:
            weight *= self.backoffs[len(gram) - 2].get(gram[:-1], 1.0)
            gram = gram[1:]
        return weight * self.probabilities[len(gram) - 1][gram]


def estimate(sentences: Iterable[Sequence[str]], order: int) -> NGram:
    """The model of these sentences (lists of words), of which there is at least one."""
    counts = adjusted_counts(sentences, order)
    found = [discounts(table.values()) for table in counts]
    taken = [discount or FALLBACK for discount in found]
    num_words = len(counts[0]) + 1  # <unk> too
    probabilities, backoffs, lower = [], [], {}
    for table, discount in zip(counts, taken, strict=True):
        totals, shares = _histories(table, discount)
        level = {}
        for gram, count in table.items():
            below = lower[gram[1:]] if len(gram) > 1 else 1 / num_words
            level[gram] = (count - discount[min(count, 3) - 1]) / totals[gram[:-1]] + shares[gram[:-1]] * below
        if not probabilities:
            level[UNKNOWN,] = shares[()] / num_words
        else:
            backoffs.append(shares)
        probabilities.append(level)
        lower = level
    probabilities[0] = {(BEGIN,): 0.0} | probabilities[0]
    return NGram(order, probabilities, [*backoffs, {}], taken, [n for n, d in enumerate(found, 1) if d is None])


def adjusted_counts(sentences: Iterable[Sequence[str]], order: int) -> list[Counter[Gram]]:
    """For n = 1 … order: n-gram → its count (highest order, or sentence's start), else how many words precede it.

    `<s>` alone is no event and has no count.
    """
    whole: list[Counter[Gram]] = [Counter() for _ in range(order)]
    for sentence in sentences:
        words = (BEGIN, *sentence, END)
        for n in range(1, order + 1):
            whole[n - 1].update(words[i : i + n] for i in range(len(words) - n + 1))
    adjusted = [Counter({gram: c for gram, c in whole[-1].items() if gram != (BEGIN,)})]
    for n in range(order - 1, 0, -1):
        table = Counter(gram[1:] for gram in whole[n])
        table.update({gram: c for gram, c in whole[n - 1].items() if gram[0] == BEGIN and n > 1})
        adjusted.insert(0, table)
    return adjusted


def discounts(counts: Iterable[int]) -> tuple[float, float, float] | None:
    """D1, D2, D3+ from the counts of counts 1 to 4 (Chen and Goodman, equation 17); None where they make no sense."""
    counted = Counter(counts)
    n1, n2, n3, n4 = (counted[k] for k in (1, 2, 3, 4))
    if not (n1 and n2 and n3 and n4):
        return None
    y = n1 / (n1 + 2 * n2)
    found = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
    return found if all(0 < d <= k for k, d in enumerate(found, 1)) else None


def _histories(table: Counter[Gram], discount: Sequence[float]) -> tuple[dict[Gram, int], dict[Gram, float]]:
    """Of each history: the sum of its counts, and the share that the discounts leave to the lower order."""
    totals, left = defaultdict(int), defaultdict(float)
    for gram, count in table.items():
        totals[gram[:-1]] += count
        left[gram[:-1]] += discount[min(count, 3) - 1]
    return totals, {history: left[history] / total for history, total in totals.items()}


def write_arpa(model: NGram, file: TextIO) -> None:
    """The model in the ARPA format: log10, tab-separated; `<s>`, which is never predicted, at -99."""
    file.write("\\data\\\n")
    file.writelines(f"ngram {n}={len(table)}\n" for n, table in enumerate(model.probabilities, 1))
    for n, (table, backoffs) in enumerate(zip(model.probabilities, model.backoffs, strict=True), 1):
        file.write(f"\n\\{n}-grams:\n")
        for gram, probability in table.items():
            log = math.log10(probability) if probability > 0 else -99.0
            backoff = f"\t{math.log10(backoffs[gram]):.7g}" if gram in backoffs else ""
            file.write(f"{log:.7g}\t{' '.join(gram)}{backoff}\n")
    file.write("\n\\end\\\n")
