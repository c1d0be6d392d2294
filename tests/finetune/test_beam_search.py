"""The beam search against brute force over every path, and its refusals."""

import gzip
import itertools
import math
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "data_scripts"))

from kneser_ney import estimate, write_arpa

from w2v2.errors import UserError
from w2v2.finetune import beam_search
from w2v2.finetune.beam_search import BeamDecoder, Setting
from w2v2.finetune.text import build_vocabulary, encode, greedy_decode

SENTENCES = [line.split() for line in ["A BA AB", "AB AB A", "B", "BA B AB", "A A AB", "AB B B", "BA"]]
VOCABULARY = build_vocabulary(["AB BA"])  # <pad> <unk> | A B
TOKENS = build_vocabulary(["A B AB BA"], "tokens")


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    """A bigram over words (or tokens), as an ARPA file, and as the model that wrote it."""
    path = tmp_path_factory.mktemp("lm") / "lm.arpa"
    model = estimate(SENTENCES, 2)
    with open(path, "w") as file:
        write_arpa(model, file)
    return str(path), model


def log_probs(vocabulary, num_frames, seed):
    logits = 2.5 * np.random.default_rng(seed).normal(size=(num_frames, len(vocabulary)))
    return (logits - np.log(np.exp(logits).sum(-1, keepdims=True))).astype(np.float32)


def log10_probability(model, words):
    padded = ["<s>", *words, "</s>"]
    return sum(math.log10(model.probability(padded[:i], padded[i])) for i in range(1, len(padded)))


def brute_force(emissions, vocabulary, model, setting):
    """The best text over all paths: log p of its best path, the language model's share, and the words' bonus."""
    known = {gram[0] for gram in model.probabilities[0]} - {"<s>", "</s>", "<unk>"}
    best = {}
    ids = [i for i in vocabulary.values() if i != vocabulary["<unk>"]]
    for path in itertools.product(ids, repeat=len(emissions)):
        text = greedy_decode(path, vocabulary)
        if known.issuperset(text.split()):
            best[text] = max(best.get(text, -math.inf), emissions[np.arange(len(path)), path].sum())

    def total(text):
        words = text.split()
        return best[text] + setting.lm_weight * log10_probability(model, words) + setting.word_score * len(words)

    return max(best, key=total)


SETTINGS = [Setting(0.0, 0.0), Setting(1.0, 0.0), Setting(3.0, 1.5), Setting(1.0, -3.0)]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("vocabulary, num_frames", [(VOCABULARY, 6), (TOKENS, 5)])
def test_the_best_hypothesis_of_all_is_found(lm, seed, vocabulary, num_frames):
    path, model = lm
    settings = SETTINGS if vocabulary is VOCABULARY else [Setting(0.0, 0.0), Setting(2.0, 0.0)]
    emissions = log_probs(vocabulary, num_frames, seed)
    decoder = BeamDecoder(path, vocabulary, settings, beam_size=10_000)
    found = [decoder.text(ids) for ids in decoder(emissions)]
    assert found == [brute_force(emissions, vocabulary, model, setting) for setting in settings]


def test_a_clear_utterance_is_written_as_it_is(lm):
    decoder = BeamDecoder(lm[0], VOCABULARY, [Setting(1.0, 0.0)])
    for text in ("AB BA A", "B", "A A", ""):
        labels = [i for label in encode(text, VOCABULARY) for i in (label, label, 0)] or [0] * 9
        emissions = np.full((len(labels), len(VOCABULARY)), -30.0)
        emissions[np.arange(len(labels)), labels] = -0.01
        assert [decoder.text(ids) for ids in decoder(emissions)] == [text]


def test_words_come_from_a_lexicon_or_a_compressed_file(lm, tmp_path):
    (tmp_path / "words.txt").write_text("AB A B |\nB\n\nB\n")
    assert beam_search.read_words(lm[0], str(tmp_path / "words.txt")) == ["AB", "B"]
    with gzip.open(tmp_path / "lm.arpa.gz", "wt") as file:
        file.write(Path(lm[0]).read_text())
    words = beam_search.read_words(str(tmp_path / "lm.arpa.gz"), None)
    assert sorted(words) == sorted(beam_search.read_words(lm[0], None)) == ["A", "AB", "B", "BA"]


def test_a_kenlm_binary_tells_its_words(tmp_path):
    path = tmp_path / "lm.bin"
    path.write_bytes(
        b"mmap lm http://kheafield.com/code format version 5\n\0\xff\x80<unk>\0junk"
        + "<unk>\0<s>\0AB\0BÄ\0</s>\0".encode()
    )
    assert beam_search.read_words(str(path), None) == ["AB", "BÄ"]
    path.write_bytes(b"mmap lm http://kheafield.com/code format version 5\n\0\xff\x80")
    assert "--lexicon" in refusal(beam_search.read_words, str(path), None)


def refusal(make, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        make(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_another_alphabet_is_refused_in_one_line(lm):
    lower = build_vocabulary(["ab ba"])
    assert "'A'" in (message := refusal(BeamDecoder, lm[0], lower, SETTINGS)) and "lm.arpa" in message
    phonemes = build_vocabulary(["HH AH0 L"], "tokens")
    assert "lacks 3 of the model's 3 tokens" in refusal(BeamDecoder, lm[0], phonemes, SETTINGS)


def test_a_file_that_is_no_language_model_is_refused(lm, tmp_path):
    path = lm[0]
    names = ("garbage.bin", "torn.arpa", "words.txt", "absent.arpa", "nowhere.txt")
    garbage, torn, words, absent, nowhere = (str(tmp_path / name) for name in names)
    Path(garbage).write_bytes(b"\x00\xff" * 100)
    Path(words).write_text("AB\n")
    Path(torn).write_text(Path(path).read_text().partition("\\2-grams:")[0] + "\\2-grams:\n-0.3 A")
    for lm_path, lexicon, message in (
        (absent, None, "no such file"), (garbage, None, "no list of words"), (garbage, words, "KenLM"),
        (torn, None, "torn.arpa"), (path, nowhere, "nowhere.txt"),
    ):  # fmt: skip
        assert message in refusal(BeamDecoder, lm_path, VOCABULARY, SETTINGS, lexicon=lexicon)


def test_a_missing_package_is_named(lm, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("flashlight")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "flashlight", None)
    assert "pip install flashlight-text" in refusal(BeamDecoder, lm[0], VOCABULARY, SETTINGS)
