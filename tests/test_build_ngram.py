"""Kneser-Ney against its definition: probabilities that sum to one, a brute-force evaluation, KenLM as a reader."""

import math
import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data_scripts"))

import build_ngram
from kneser_ney import FALLBACK, adjusted_counts, discounts, estimate, write_arpa


def text(num=400, seed=0):
    """Sentences of a Markov chain over a few words, so that the counts of counts are all there."""
    r = random.Random(seed)
    words = [f"w{i}" for i in range(40)]
    sentences = []
    for _ in range(num):
        sentence, at = [], r.randrange(40)
        while r.random() < 0.8:
            at = (at + int(r.expovariate(0.3))) % 40
            sentence.append(words[at])
        sentences.append(sentence)
    return sentences


def contexts(sentences, n):
    """Histories of up to n words that a text has, and some that it has not."""
    found = {("zz",), ("w1", "zz"), ("zz", "w1")}
    for sentence in sentences:
        padded = ["<s>", *sentence]
        found |= {tuple(padded[max(0, i - k) : i]) for i in range(len(padded) + 1) for k in range(n + 1)}
    return sorted(found)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_probabilities_sum_to_one_after_every_history(order):
    sentences = text(100)
    model = estimate(sentences, order)
    words = [gram[0] for gram in model.probabilities[0] if gram != ("<s>",)]
    assert {"</s>", "<unk>"} < set(words)
    for history in contexts(sentences, order - 1):
        assert sum(model.probability(history, word) for word in words) == pytest.approx(1, abs=1e-12)
        assert all(model.probability(history, word) > 0 for word in words)


def brute_force(sentences, order, gram, vocabulary):
    """p(last word | the others) straight from the text by Chen and Goodman's recursion, nothing stored."""

    def count(g):
        """Adjusted count: how often, or after how many words."""
        padded = [["<s>", *s, "</s>"] for s in sentences]
        if len(g) == order or g[0] == "<s>":
            return sum(tuple(p[i : i + len(g)]) == g for p in padded for i in range(len(p)))
        return len({p[i - 1] for p in padded for i in range(1, len(p)) if tuple(p[i : i + len(g)]) == g})

    def all_grams(n):
        padded = [["<s>", *s, "</s>"] for s in sentences]
        return {tuple(p[i : i + n]) for p in padded for i in range(len(p) - n + 1)} - {("<s>",)}

    def discount(n, c):
        counts = [count(g) for g in all_grams(n)]
        n1, n2, n3, n4 = (counts.count(k) for k in (1, 2, 3, 4))
        y = n1 / (n1 + 2 * n2)
        return (0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)[min(c, 3)]

    history = gram[:-1]
    below = brute_force(sentences, order, gram[1:], vocabulary) if history else 1 / len(vocabulary)
    after = {g: count(g) for g in all_grams(len(gram)) if g[:-1] == history}
    total = sum(after.values())
    if not total:
        return below
    left = sum(discount(len(gram), c) for c in after.values())
    seen = after.get(gram, 0)
    return (seen - discount(len(gram), seen)) / total + left / total * below


def test_probabilities_are_those_of_the_definition():
    r = random.Random(2)
    words = ["w1", "w2", "w3", "w4", "w5", "w6", "w7"]
    sentences = [r.choices(words, [20, 9, 5, 3, 2, 1, 1], k=r.randrange(5)) for _ in range(40)]
    model = estimate(sentences, 2)
    assert not model.fallbacks
    vocabulary = sorted({word for sentence in sentences for word in sentence}) + ["</s>", "<unk>"]
    for history in ("<s>", *vocabulary[:4]):
        for word in vocabulary[:-1]:
            expected = brute_force(sentences, 2, (history, word), vocabulary)
            assert model.probability((history,), word) == pytest.approx(expected, rel=1e-9)


def test_lower_orders_count_the_words_before_and_not_the_occurrences():
    counts = adjusted_counts([["san", "francisco"], ["san", "francisco"], ["old", "dog"], ["a", "dog"]], 2)
    assert counts[0]["francisco",] == 1 and counts[0]["dog",] == 2
    assert counts[1]["san", "francisco"] == 2
    assert ("<s>",) not in counts[0]


def test_discounts_follow_the_counts_of_counts_or_are_not_there():
    found = discounts([1] * 50 + [2] * 20 + [3] * 10 + [4] * 6 + [9] * 3)
    y = 50 / 90
    assert found == pytest.approx((1 - 2 * y * 20 / 50, 2 - 3 * y * 10 / 20, 3 - 4 * y * 6 / 10))
    assert discounts([1, 1, 2]) is None
    assert estimate([["one"]], 2).discounts == [FALLBACK, FALLBACK]


def test_kenlm_reads_the_same_probabilities_from_the_file(tmp_path):
    from flashlight.lib.text.decoder.kenlm import KenLM
    from flashlight.lib.text.dictionary import Dictionary

    sentences = text()
    model = estimate(sentences, 3)
    with open(tmp_path / "lm.arpa", "w") as file:
        write_arpa(model, file)
    words = sorted({word for sentence in sentences for word in sentence}) + ["<unk>"]
    dictionary = Dictionary(words)
    reader = KenLM(str(tmp_path / "lm.arpa"), dictionary)
    r = random.Random(1)
    for _ in range(30):
        sentence = r.choices(words, k=6)
        state, theirs, ours = reader.start(False), 0.0, 0.0
        for i, word in enumerate(sentence):
            state, score = reader.score(state, dictionary.get_index(word))
            theirs, ours = theirs + score, ours + math.log10(model.probability(["<s>", *sentence[:i]], word))
        theirs += reader.finish(state)[1]
        ours += math.log10(model.probability(["<s>", *sentence], "</s>"))
        assert theirs == pytest.approx(ours, abs=1e-4)


def test_text_and_manifests_are_normalised_alike_and_counted_together(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("One, two!\n\nthree-four\n")
    (tmp_path / "b.csv").write_text('audio,duration,text\nx.wav,1.0,"one two"\ny.wav,1.0,\n')
    output = tmp_path / "deep" / "lm.arpa"
    command = [str(tmp_path / "a.txt"), str(tmp_path / "b.csv"), "--order", "2", "--output", str(output)]
    assert build_ngram.main(command) == 0
    assert "3 sentences, 6 words" in capsys.readouterr().out
    words = {line.split("\t")[1] for line in output.read_text().split("\\1-grams:\n")[1].split("\n\n")[0].splitlines()}
    assert words == {"<s>", "</s>", "<unk>", "ONE", "TWO", "THREE", "FOUR"}
    assert "ngram 2=6" in output.read_text()  # <s> one, one two, two </s>, <s> three, three four, four </s>


@pytest.mark.parametrize(
    "flags, message",
    [
        (["{0}/absent.txt"], "absent.txt"),
        (["{0}/empty.txt"], "no words"),
        (["{0}/bare.csv"], "no transcripts"),
        (["{0}/binary.txt"], "not UTF-8"),
        (["{0}/good.txt", "--order", "1"], "--order 1"),
    ],
)
def test_a_slip_is_one_line_and_status_2(flags, message, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("\n ?! \n")
    (tmp_path / "good.txt").write_text("one\n")
    (tmp_path / "bare.csv").write_text("audio,duration\nx.wav,1.0\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00word")
    command = [flag.format(tmp_path) for flag in flags]
    assert build_ngram.main([*command, "--output", str(tmp_path / "lm.arpa")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "lm.arpa").exists()
