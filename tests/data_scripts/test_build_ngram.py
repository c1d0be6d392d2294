"""Kneser-Ney against its definition: probabilities that sum to one, a brute-force evaluation, KenLM as a reader."""

import math
import random
from functools import cache

import build_ngram
import pytest
from conftest import error_line
from kneser_ney import FALLBACK, discounts, estimate, write_arpa


def text(num=400, seed=0):
    """Sentences of up to six words, few of them common and many rare, as words are."""
    r = random.Random(seed)
    words = [f"w{i}" for i in range(60)]
    return [r.choices(words, [1 / (i + 1) for i in range(60)], k=r.randrange(7)) for _ in range(num)]


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_probabilities_sum_to_one_after_every_history(order):
    sentences = text(100)
    model = estimate(sentences, order)
    words = [gram[0] for gram in model.probabilities[0] if gram != ("<s>",)]
    assert {"</s>", "<unk>"} < set(words)
    histories = {
        tuple(["<s>", *s][max(0, i - k) : i]) for s in sentences for i in range(len(s) + 2) for k in range(order)
    }
    for history in histories | {("zz",), ("w1", "zz"), ("zz", "w1")}:  # and some that the text has not
        assert sum(model.probability(history, word) for word in words) == pytest.approx(1, abs=1e-12)
        assert all(model.probability(history, word) > 0 for word in words)


def brute_force(sentences, order, gram, num_words):
    """p(last word | the others) straight from the text by Chen and Goodman's recursion."""
    padded = [["<s>", *sentence, "</s>"] for sentence in sentences]

    @cache
    def grams(n):
        return [(tuple(p[i : i + n]), p[i - 1] if i else None) for p in padded for i in range(len(p) - n + 1)]

    @cache
    def count(g):
        """Adjusted count: how often, or after how many words."""
        before = [left for found, left in grams(len(g)) if found == g]
        return len(before) if len(g) == order or g[0] == "<s>" else len(set(before))

    @cache
    def discount(n):
        counts = [count(g) for g in {g for g, _ in grams(n)} - {("<s>",)}]
        n1, n2, n3, n4 = (counts.count(k) for k in (1, 2, 3, 4))
        y = n1 / (n1 + 2 * n2)
        return 0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3

    def probability(gram):
        below = probability(gram[1:]) if len(gram) > 1 else 1 / num_words
        after = {g: count(g) for g in {g for g, _ in grams(len(gram))} if g[:-1] == gram[:-1] and g != ("<s>",)}
        if not after:
            return below
        taken = sum(discount(len(gram))[min(c, 3)] for c in after.values())
        seen = after.get(gram, 0)
        return (seen - discount(len(gram))[min(seen, 3)] + taken * below) / sum(after.values())

    return probability(gram)


def test_probabilities_are_those_of_the_definition():
    sentences = text(150)  # enough for discounts of every order
    model = estimate(sentences, 3)
    assert not model.fallbacks
    words = sorted({word for sentence in sentences for word in sentence})
    r = random.Random(5)
    seen = [tuple(s[i : i + 3]) for s in sentences for i in range(len(s) - 2)]
    starts = [("<s>", s[0]) for s in sentences if s] + [("<s>", s[0], "</s>") for s in sentences if len(s) == 1]
    unseen = [tuple(r.choices(words, k=3)) for _ in range(6)]
    for gram in [*r.sample(seen, 6), *r.sample(starts, 4), *unseen]:
        expected = brute_force(sentences, 3, gram, len(words) + 2)
        assert model.probability(gram[:-1], gram[-1]) == pytest.approx(expected, rel=1e-9), gram


def test_too_little_text_has_fixed_discounts():
    assert discounts([1, 1, 2]) is None
    assert estimate([["one"]], 2).discounts == [FALLBACK, FALLBACK]


def test_kenlm_reads_the_same_probabilities_from_the_file(tmp_path):
    from flashlight.lib.text.decoder.kenlm import KenLM
    from flashlight.lib.text.dictionary import Dictionary

    model, r = estimate(text(), 3), random.Random(1)
    with open(tmp_path / "lm.arpa", "w") as file:
        write_arpa(model, file)
    words = [gram[0] for gram in model.probabilities[0] if gram[0] not in ("<s>", "</s>")]
    dictionary = Dictionary(words)
    reader = KenLM(str(tmp_path / "lm.arpa"), dictionary)
    for _ in range(30):
        sentence = r.choices(words, k=6)
        state, theirs, ours = reader.start(False), 0.0, 0.0
        for i, word in enumerate(sentence):
            state, score = reader.score(state, dictionary.get_index(word))
            theirs, ours = theirs + score, ours + math.log10(model.probability(["<s>", *sentence[:i]], word))
        theirs += reader.finish(state)[1]
        ours += math.log10(model.probability(["<s>", *sentence], "</s>"))
        assert theirs == pytest.approx(ours, abs=1e-4)


def test_text_and_manifests_are_counted_together(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("One, two!\n\nthree-four\n")
    (tmp_path / "b.csv").write_text('audio,duration,wrd\n$data_root/absent.wav,9.5,"one two"\nmute.wav,3,\n')
    output = tmp_path / "deep" / "lm.arpa"
    command = [str(tmp_path / "a.txt"), str(tmp_path / "b.csv"), "--order", "2", "--output", str(output)]
    assert build_ngram.main(command) == 0
    assert "3 sentences, 6 words" in capsys.readouterr().out
    assert "ngram 1=7" in output.read_text() and "THREE" in output.read_text()
    assert "ngram 2=6" in output.read_text()  # <s> one, one two, two </s>, <s> three, three four, four </s>


def test_transcripts_under_two_names_are_one_text(tmp_path, caplog):
    lines = ['{"audio": "a.wav", "text": "one"}', '{"audio": "b.wav", "transcript": "two three"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert list(build_ngram.read_lines(tmp_path / "a.jsonl")) == ["one", "two three"]
    assert "1 rows have no text: their transcript is read for it" in caplog.text


@pytest.mark.parametrize(
    "flags, message",
    [
        (["{0}/sources.yaml"], "is no text: name the manifests"),
        (["{0}/absent.txt"], "absent.txt"),
        (["{0}/empty.txt"], "no words"),
        (["{0}/bare.csv"], "no transcripts"),
        (["{0}/binary.txt"], "not UTF-8"),
        (["{0}/good.txt", "{0}/reserved.txt", "--text_case", "keep", "--drop_characters", "."], "the word </s>"),
    ],
)
def test_a_slip_is_one_line_and_status_2(flags, message, tmp_path, capsys):
    files = {"empty.txt": b"\n ?! \n", "good.txt": b"one\n", "reserved.txt": b"<s> one </s>\n"}
    for name, content in (
        files | {"bare.csv": b"audio,duration\nx.wav,1.0\n", "binary.txt": b"\xff\xfe\x00word"}
    ).items():
        (tmp_path / name).write_bytes(content)
    command = [flag.format(tmp_path) for flag in flags]
    assert build_ngram.main([*command, "--output", str(tmp_path / "lm.arpa")]) == 2
    assert message in error_line(capsys.readouterr().err)
    assert not (tmp_path / "lm.arpa").exists()
