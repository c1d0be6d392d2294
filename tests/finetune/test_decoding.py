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
from w2v2.finetune import decoding
from w2v2.finetune.decoding import BeamDecoder, Setting, tuning_grid
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


def brute_force(emissions, vocabulary, model, setting, words):
    """The best text over all paths: log p of its best path, the language model's share, and the words' bonus."""
    known = {gram[0] for gram in model.probabilities[0]} - {"<s>", "</s>", "<unk>"}
    best = {}
    ids = [i for i in vocabulary.values() if i != vocabulary["<unk>"]]
    for path in itertools.product(ids, repeat=len(emissions)):
        text = greedy_decode(path, vocabulary)
        score = emissions[np.arange(len(path)), path].sum()
        if known.issuperset(text.split()) and score > best.get(text, -math.inf):
            best[text] = score
    bonus = setting.word_score if words else 0.0
    return max(
        best,
        key=lambda text: (
            best[text] + setting.lm_weight * log10_probability(model, text.split()) + bonus * len(text.split())
        ),
    )


SETTINGS = [Setting(0.0, 0.0), Setting(1.0, 0.0), Setting(3.0, 1.5), Setting(1.0, -3.0)]


@pytest.mark.parametrize("seed", range(8))
def test_the_best_words_of_all_are_found(lm, seed):
    path, model = lm
    emissions = log_probs(VOCABULARY, 6, seed)
    decoder = BeamDecoder(path, VOCABULARY, SETTINGS, beam_size=10_000)
    found = [decoder.text(ids) for ids in decoder(emissions)]
    assert found == [brute_force(emissions, VOCABULARY, model, setting, True) for setting in SETTINGS]


@pytest.mark.parametrize("seed", range(4))
def test_the_best_tokens_of_all_are_found(lm, seed):
    path, model = lm
    emissions = log_probs(TOKENS, 5, seed)
    settings = [Setting(0.0, 0.0), Setting(2.0, 0.0)]
    decoder = BeamDecoder(path, TOKENS, settings, beam_size=10_000)
    found = [decoder.text(ids) for ids in decoder(emissions)]
    assert found == [brute_force(emissions, TOKENS, model, setting, False) for setting in settings]


def test_a_clear_utterance_is_written_as_it_is(lm):
    decoder = BeamDecoder(lm[0], VOCABULARY, [Setting(1.0, 0.0)])
    for text in ("AB BA A", "B", "A A", ""):
        labels = [i for label in encode(text, VOCABULARY) for i in (label, label, 0)] or [0] * 9
        emissions = np.full((len(labels), len(VOCABULARY)), -30.0)
        emissions[np.arange(len(labels)), labels] = -0.01
        assert [decoder.text(ids) for ids in decoder(emissions)] == [text]


def test_hypotheses_stack_and_come_apart_again(lm):
    decoder = BeamDecoder(lm[0], VOCABULARY, SETTINGS[:2])
    hypotheses = [[[0, 1], []], [[2], [3, 3, 0]]]
    stacked = decoder.stack(hypotheses)
    assert stacked.shape == (2, 3, 2)
    again = [[[i for i in stacked[b, :, k] if i >= 0] for k in range(2)] for b in range(2)]
    assert again == hypotheses
    assert decoder.text(stacked[1, :, 0]) == decoder.words[2]
    assert decoder.stack([[[], []]]).shape == (1, 1, 2)


def test_the_grid_of_tokens_has_no_word_scores():
    assert {setting.word_score for setting in tuning_grid("tokens")} == {0.0}
    assert len(tuning_grid("characters")) == len(set(tuning_grid("characters"))) == 25


def test_words_come_from_a_lexicon_or_a_compressed_file(lm, tmp_path):
    (tmp_path / "words.txt").write_text("AB A B |\nB\n\nB\n")
    assert decoding.read_words(lm[0], str(tmp_path / "words.txt")) == ["AB", "B"]
    with gzip.open(tmp_path / "lm.arpa.gz", "wt") as file:
        file.write(Path(lm[0]).read_text())
    words = decoding.read_words(str(tmp_path / "lm.arpa.gz"), None)
    assert sorted(words) == sorted(decoding.read_words(lm[0], None)) == ["A", "AB", "B", "BA"]


def test_a_kenlm_binary_tells_its_words(tmp_path):
    path = tmp_path / "lm.bin"
    path.write_bytes(
        b"mmap lm http://kheafield.com/code format version 5\n\0\xff\x80<unk>\0junk"
        + "<unk>\0<s>\0AB\0BÄ\0</s>\0".encode()
    )
    assert decoding.read_words(str(path), None) == ["AB", "BÄ"]
    path.write_bytes(b"mmap lm http://kheafield.com/code format version 5\n\0\xff\x80")
    assert "--lexicon" in refusal(decoding.read_words, str(path), None)


def test_words_that_cannot_be_spelled_are_left_out():
    assert decoding.spellable(["AB", "BÄ", "A"], VOCABULARY, "lm") == ["AB", "A"]


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
    assert "no such file" in refusal(BeamDecoder, str(tmp_path / "absent.arpa"), VOCABULARY, SETTINGS)
    (tmp_path / "garbage.bin").write_bytes(b"\x00\xff" * 100)
    assert "no list of words" in refusal(BeamDecoder, str(tmp_path / "garbage.bin"), VOCABULARY, SETTINGS)
    (tmp_path / "words.txt").write_text("AB\n")
    message = refusal(
        BeamDecoder, str(tmp_path / "garbage.bin"), VOCABULARY, SETTINGS, lexicon=str(tmp_path / "words.txt")
    )
    assert "garbage.bin" in message and "KenLM" in message
    torn = Path(lm[0]).read_text()
    (tmp_path / "torn.arpa").write_text(torn[: torn.index("\\2-grams:") + 20])
    assert "torn.arpa" in refusal(BeamDecoder, str(tmp_path / "torn.arpa"), VOCABULARY, SETTINGS)
    assert "nowhere.txt" in refusal(BeamDecoder, lm[0], VOCABULARY, SETTINGS, lexicon=str(tmp_path / "nowhere.txt"))


def test_a_missing_package_is_named(lm, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("flashlight")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "flashlight", None)
    assert "pip install flashlight-text" in refusal(BeamDecoder, lm[0], VOCABULARY, SETTINGS)
