import itertools
import json

import numpy as np
import pytest
import soundfile
import torch
from datasets import Dataset
from transformers import Wav2Vec2FeatureExtractor

from w2v2 import ctc
from w2v2.errors import UserError

VOCABULARY = ctc.build_vocabulary(["HELLO THERE", "A BAD CAB"])
RAW = Wav2Vec2FeatureExtractor(do_normalize=False)


def table(rows):
    return Dataset.from_list(
        [{"id": f"u{i}", "audio": "a.wav", "start": 0.0, "num_samples": 16_000, **row} for i, row in enumerate(rows)]
    )


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


@pytest.mark.parametrize(
    "text, expected",
    [
        ("  Hello,\tworld! ", "HELLO WORLD"),
        ("don’t", "DON'T"),
        ("well-known, and/or", "WELL KNOWN AND OR"),
        ("a|b", "AB"),
        ("ﬁne …", "FINE"),
        ("?!", ""),
    ],
)
def test_text_is_normalised(text, expected):
    assert ctc.normalize_text(text) == expected
    assert ctc.normalize_text(expected) == expected
    assert ctc.normalize_text(text, case="lower") == expected.lower()


def test_only_the_characters_asked_for_are_dropped():
    assert ctc.normalize_text("a.b c!", drop_characters="!") == "A.B C"


def test_vocabulary_has_blank_first_and_no_space():
    assert list(VOCABULARY.items())[:3] == [("<pad>", 0), ("<unk>", 1), ("|", 2)]
    assert sorted(VOCABULARY.values()) == list(range(len(VOCABULARY)))
    assert set(list(VOCABULARY)[3:]) == set("HELLOTHEREABADCAB")


def test_unknown_characters_are_counted():
    assert ctc.unknown_characters(["HELLO", "ZZ É"], VOCABULARY) == {"Z": 2, "É": 1}


def test_labels_spelled_with_blanks_between_repeats_decode_to_their_text():
    labels = ctc.encode("HELLO THERE", VOCABULARY)
    path = [i for label in labels for i in (label, label, 0)] + [-1, -1]
    assert ctc.greedy_decode(path, VOCABULARY) == "HELLO THERE"
    assert ctc.greedy_decode([], VOCABULARY) == ""


def test_greedy_decoding_agrees_with_the_stock_tokenizer():
    tokenizer = ctc.make_processor(VOCABULARY, RAW).tokenizer
    paths = np.random.default_rng(0).choice([i for i in VOCABULARY.values() if i != 1], size=(200, 30))
    for path in paths:
        assert ctc.greedy_decode(path, VOCABULARY) == " ".join(tokenizer.decode(path).split())


@pytest.mark.parametrize("text", ["A", "HELLO", "LLLL", "A BAD CAB"])
def test_frames_needed_is_where_the_ctc_loss_becomes_finite(text):
    labels = ctc.encode(text, VOCABULARY)
    finite = [
        T
        for T in range(1, 30)
        if torch.nn.functional.ctc_loss(
            torch.zeros(T, 1, len(VOCABULARY)).log_softmax(-1), torch.tensor([labels]), [T], [len(labels)]
        ).isfinite()
    ]
    assert ctc.frames_needed(labels) == finite[0]


def test_error_rates_are_edit_distances_over_the_corpus():
    random = np.random.default_rng(1)
    references = [" ".join(random.choice(["A", "BB", "CAB"], 4)) for _ in range(30)]
    hypotheses = [" ".join(random.choice(["A", "BB", "CAB"], n)) for n in random.integers(0, 7, 30)]
    words = sum(edits(r.split(), h.split()) for r, h in zip(references, hypotheses, strict=True))
    characters = sum(edits(r, h) for r, h in zip(references, hypotheses, strict=True))
    rates = ctc.error_rates(references, hypotheses)
    assert rates["wer"] == pytest.approx(words / sum(len(r.split()) for r in references))
    assert rates["cer"] == pytest.approx(characters / sum(map(len, references)))


def test_an_empty_reference_counts_insertions_and_a_corpus_of_them_has_no_rate():
    assert ctc.error_rates(["A B", ""], ["A B", "C C"]) == {"wer": 1.0, "cer": 1.0}
    with pytest.raises(ValueError, match="empty"):
        ctc.error_rates(["", ""], ["A", ""])


def test_utterances_without_text_are_dropped_and_counted():
    kept, dropped = ctc.prepare_texts(table([{"text": "a b"}, {"text": "?"}, {"text": None}]), "m", "upper", "?")
    assert (kept["text"][:], dropped) == (["A B"], {"no_text": 2})


def test_missing_text_names_the_manifest():
    with pytest.raises(UserError, match="m.csv.*text"):
        ctc.prepare_texts(table([{}]), "m.csv", "upper", "")
    with pytest.raises(UserError, match="m.csv.*none of its 1"):
        ctc.prepare_texts(table([{"text": ""}]), "m.csv", "upper", "")


def test_training_leaves_out_what_it_cannot_learn_from_and_says_why():
    rows = [
        {"text": "AB"},
        {"text": "LL", "num_samples": 800},
        {"text": "A", "num_samples": 100},
        {"text": "A", "num_samples": 10**6},
    ]
    kept, dropped = ctc.select_trainable(table(rows), VOCABULARY, lambda samples: samples // 400, 0.01, 10.0)
    assert kept["id"][:] == ["u0"]
    assert dropped == {"text_longer_than_audio": 1, "too_short": 1, "too_long": 1}


@pytest.fixture
def audio(tmp_path):
    good, torn = tmp_path / "good.wav", tmp_path / "torn.flac"
    samples = np.random.default_rng(0).uniform(-0.1, 0.1, 32_000)
    soundfile.write(good, samples, 16_000)
    soundfile.write(torn, samples, 16_000)
    torn.write_bytes(torn.read_bytes()[:30_000])
    (tmp_path / "empty.wav").touch()
    return tmp_path


def test_files_that_do_not_open_are_found_before_training(audio):
    paths = ["good.wav", "empty.wav", "absent.wav"]
    kept, skipped = ctc.drop_unreadable(table([{"audio": str(audio / path)} for path in paths]))
    assert kept["id"][:] == ["u0"]
    assert [entry["id"] for entry in skipped] == ["u1", "u2"]
    assert "empty" in skipped[0]["reason"] and "exist" in skipped[1]["reason"]


def speech(audio, substitute, names=("torn.flac", "good.wav")):
    rows = table([{"audio": str(audio / name), "num_samples": 32_000, "text": "A"} for name in names])
    return ctc.SpeechDataset(
        rows, VOCABULARY, RAW, min_samples=400, skip_log=audio / "skipped.jsonl", substitute=substitute
    )


def test_training_takes_another_utterance_for_one_that_does_not_decode(audio):
    data = speech(audio, substitute=True)
    np.testing.assert_array_equal(data[0]["input_values"], data[1]["input_values"])
    assert [entry["id"] for entry in ctc.read_skipped(data.skip_log).values()] == ["u0"]
    assert json.loads(data.skip_log.read_text().splitlines()[0])["audio"] == str(audio / "torn.flac")


def test_evaluation_marks_an_utterance_that_does_not_decode_by_having_no_labels(audio):
    data = speech(audio, substitute=False)
    assert (data[0]["labels"], data[1]["labels"]) == ([], [VOCABULARY["A"]])
    assert len(ctc.read_skipped(data.skip_log)) == 1


def test_audio_shorter_than_a_frame_is_padded_to_one(audio):
    soundfile.write(audio / "blip.wav", np.full(100, 0.5), 16_000)
    data = speech(audio, substitute=False, names=["blip.wav"])
    data.table = data.table.map(lambda row: {"num_samples": 100})
    values = data[0]["input_values"]
    assert len(values) == 400 and values[:100].all() and not values[100:].any()


def test_a_window_of_a_file_is_read(audio):
    data = speech(audio, substitute=False, names=["good.wav"])
    data.table = data.table.map(lambda row: {"start": 0.5, "num_samples": 8_000})
    expected = soundfile.read(audio / "good.wav", dtype="float32")[0][8_000:16_000]
    np.testing.assert_array_equal(data[0]["input_values"], expected)


def test_batches_are_padded_and_masked_only_where_lengths_differ():
    items = [{"input_values": np.ones(n, np.float32), "labels": labels} for n, labels in ((5, [3]), (3, [4, 5]))]
    batch = ctc.collate_ctc(items)
    assert batch["input_values"].tolist() == batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[3, -100], [4, 5]]
    assert "attention_mask" not in ctc.collate_ctc([items[0], items[0]])
