"""Transcripts: what they are made into, and back from the labels."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import Wav2Vec2FeatureExtractor

from w2v2.finetune.text import (
    CTCArguments,
    TextRules,
    build_vocabulary,
    encode,
    follow_folder,
    frames_needed,
    greedy_decode,
    make_processor,
    split_units,
    unit_of,
    unknown_units,
)

VOCABULARY = build_vocabulary(["HELLO THERE", "A BAD CAB"])
PHONEMES = build_vocabulary(["HH AH0 L OW1", "DH EH1 R"], "tokens")
RAW = Wav2Vec2FeatureExtractor(do_normalize=False)


@pytest.mark.parametrize("text, expected", [
    ("  Hello,\tworld! ", "HELLO WORLD"),
    ("don’t", "DON'T"),
    ("well-known, and/or", "WELL KNOWN AND OR"),
    ("a|b", "AB"),
    ("ﬁne …", "FINE"),
    ("?!", ""),
])  # fmt: skip
def test_text_is_normalised(text, expected):
    rules = TextRules()
    assert rules(text) == rules(expected) == expected
    assert TextRules(case="lower")(text) == expected.lower()
    assert TextRules(drop_characters="!")("a.b c!") == "A.B C"


def test_case_may_be_kept_and_accents_folded():
    assert TextRules(case="keep")("Straße nach Köln") == "Straße nach Köln"
    assert TextRules(case="keep", fold_accents=True)("Żółć über Ångström") == "Zołc uber Angstrom"
    assert TextRules(fold_accents=True)("한국 café") == "한국 CAFE"  # syllables are no accents


def test_tokens_stay_but_for_those_that_are_dropped():
    assert TextRules(unit="tokens", drop_tokens=("sil",))(" sil HH  AH0 | l ow1 sil") == "HH AH0 l ow1"


def test_vocabulary_has_blank_first_and_no_space():
    assert list(VOCABULARY.items())[:3] == [("<pad>", 0), ("<unk>", 1), ("|", 2)]
    assert sorted(VOCABULARY.values()) == list(range(len(VOCABULARY)))
    assert set(list(VOCABULARY)[3:]) == set("HELLOTHEREABADCAB")


@pytest.mark.parametrize("vocabulary, text", [(VOCABULARY, "HELLO THERE"), (PHONEMES, "HH AH0 L OW1")])
def test_labels_with_blanks_between_decode_to_their_text(vocabulary, text):
    path = [i for label in encode(text, vocabulary) for i in (label, label, 0)]
    assert greedy_decode([*path, -1, -1], vocabulary) == text
    assert greedy_decode([], vocabulary) == ""


def test_greedy_decoding_agrees_with_the_stock_tokenizer():
    for vocabulary in (VOCABULARY, PHONEMES):
        tokenizer = make_processor(vocabulary, RAW).tokenizer
        paths = np.random.default_rng(0).choice([i for i in vocabulary.values() if i != 1], size=(200, 30))
        for path in paths:
            assert greedy_decode(path, vocabulary) == " ".join(tokenizer.decode(path).split())


@pytest.mark.parametrize("text", ["A", "HELLO", "LLLL", "A BAD CAB"])
def test_frames_needed_make_the_ctc_loss_finite(text):
    labels = encode(text, VOCABULARY)
    losses = [
        F.ctc_loss(torch.zeros(T, 1, 30).log_softmax(-1), torch.tensor([labels]), [T], [len(labels)])
        for T in range(1, 30)
    ]
    assert frames_needed(labels) == 1 + [loss.isfinite().item() for loss in losses].index(True)


def test_tokens_need_no_delimiter():
    assert list(PHONEMES) == ["<pad>", "<unk>", "AH0", "DH", "EH1", "HH", "L", "OW1", "R"]
    assert (unit_of(PHONEMES), unit_of(VOCABULARY)) == ("tokens", "characters")
    assert unknown_units(["HH ZH ZH", "NG"], PHONEMES) == {"ZH": 2, "NG": 1}
    assert unknown_units(["HELLO", "ZZ É"], VOCABULARY) == {"Z": 2, "É": 1}
    assert split_units("AA B", "characters") == ["A", "A", "|", "B"]


def test_special_entries_are_not_written():
    theirs = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "|": 4, "A": 5}
    assert greedy_decode([1, 5, 0, 5, 2], theirs) == "AA"
    assert greedy_decode([1, 5, 4, 5], {**theirs, "A": 0, "<pad>": 5}) == ""  # the blank is where the vocabulary says


@pytest.mark.parametrize("text, case", [("AB", "upper"), ("ab '", "lower"), ("Ab", "keep"), ("漢字", "upper")])
def test_a_vocabulary_tells_its_case(tmp_path, text, case):
    assert follow_folder(CTCArguments(), str(tmp_path), build_vocabulary([text])).text_case == case
