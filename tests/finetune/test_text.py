"""Transcripts: what they are made into, and back from the labels."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_config
from transformers import Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor

from w2v2.finetune.text import (
    CTCArguments,
    build_vocabulary,
    encode,
    follow_text,
    frames_needed,
    greedy_decode,
    make_processor,
    read_vocabulary,
    split_units,
    unit_of,
)

VOCABULARY = build_vocabulary(["HELLO THERE", "A BAD CAB"])
PHONEMES = build_vocabulary(["HH AH0 L OW1", "DH EH1 R"], "tokens")
RAW = Wav2Vec2FeatureExtractor(do_normalize=False)


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
    assert split_units("AA B", "characters") == ["A", "A", "|", "B"]


def test_blank_and_unknown_are_read_from_a_models_own_tokenizer(tmp_path):
    theirs = {"|": 0, "a": 1, "b": 2, "[UNK]": 3, "[PAD]": 4}
    (tmp_path / "vocab.json").write_text(json.dumps(theirs))
    special = dict(unk_token="[UNK]", pad_token="[PAD]", bos_token="<s>", eos_token="</s>")
    tokenizer = Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json"), **special)
    tokenizer.save_pretrained(tmp_path)
    assert len(tokenizer) == 7
    for size, added in ((7, {"<s>": 5, "</s>": 6}), (5, {})):  # tokens were added, and the model writes them or not
        tiny_config(vocab_size=size).save_pretrained(tmp_path)
        vocabulary = read_vocabulary(str(tmp_path))
        assert vocabulary == {"|": 0, "a": 1, "b": 2, "<unk>": 3, "<pad>": 4} | added
    path = [1, 1, 4, 1, 0, 4, 2, 4]
    assert greedy_decode(path, vocabulary) == tokenizer.decode(path) == "aa b"


def test_a_handed_over_tokenizer_leaves_spaces_alone(tmp_path):
    processor = make_processor(build_vocabulary(["DO N'T"]), RAW)
    processor.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert written["clean_up_tokenization_spaces"] is False


def test_special_entries_are_not_written():
    theirs = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "|": 4, "A": 5}
    assert greedy_decode([1, 5, 0, 5, 2], theirs) == "AA"
    assert greedy_decode([1, 5, 4, 5], {**theirs, "A": 0, "<pad>": 5}) == ""  # the blank is where the vocabulary says


@pytest.mark.parametrize("text, case", [("AB", "upper"), ("ab '", "lower"), ("Ab", "keep"), ("漢字", "upper"),
                                        ("Iİ", "turkish_upper"), ("ıi", "turkish_lower"), ("Straẞe", "keep")])  # fmt: skip
def test_a_vocabulary_tells_its_case(tmp_path, text, case):
    assert follow_text(CTCArguments(), str(tmp_path), build_vocabulary([text])).text_case == case
