import contextlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from datasets import Dataset
from transformers import Wav2Vec2FeatureExtractor

from w2v2.errors import UserError
from w2v2.finetune import ctc_data
from w2v2.finetune.normalisation import TextRules
from w2v2.finetune.text import build_vocabulary

VOCABULARY = build_vocabulary(["HELLO THERE", "A BAD CAB"])
RAW = Wav2Vec2FeatureExtractor(do_normalize=False)


def table(rows):
    return Dataset.from_list(
        [{"id": f"u{i}", "audio": "a.wav", "start": 0.0, "num_samples": 16_000, **row} for i, row in enumerate(rows)]
    )


@pytest.mark.parametrize("rows, needed, expected", [
    ([{"text": "a b"}, {"text": "?"}, {"text": None}], True, (["A B"], 2)),
    ([{"text": ""}, {"text": "a"}], False, (["A"], 1)),
    ([{}, {}], False, (["", ""], 0)),  # a test set without any text stays whole
    ([{"text": ""}, {"text": None}], False, (["", ""], 0)),
])  # fmt: skip
def test_utterances_without_text_are_dropped_and_counted(rows, needed, expected):
    kept, dropped = ctc_data.prepare_texts(table(rows), "m", TextRules(), needed=needed)
    assert (kept["text"][:], dropped) == expected


@pytest.mark.parametrize("row, needed, message", [
    ({}, True, "m.csv.*text"),
    ({"text": ""}, True, "m.csv.*none of its 1"),
    ({"text": "?"}, False, "none of its 1"),  # there is text, but nothing is left of it
])  # fmt: skip
def test_missing_text_names_the_manifest(row, needed, message):
    with pytest.raises(UserError, match=message):
        ctc_data.prepare_texts(table([row]), "m.csv", TextRules(), needed=needed)


def test_special_tokens_in_a_transcript_are_refused():
    rows = table([{"text": "HH AH0"}, {"text": "L <unk> OW1"}])
    with pytest.raises(UserError, match="m.csv: 1 utterances, such as u1, .*<unk>"):
        ctc_data.prepare_texts(rows, "m.csv", TextRules("tokens"))
    kept, _ = ctc_data.prepare_texts(rows, "m.csv", TextRules("tokens", drop_tokens=("<unk>",)))
    assert kept["text"][:] == ["HH AH0", "L OW1"]


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
    (audio / "m.csv").write_text("id,audio,duration\nu0,good.wav,2\nu1,empty.wav,2\nu2,absent.wav,2\n")
    args = SimpleNamespace(data_root=None, output_dir=audio, max_skipped_fraction=0.7)
    kept, skipped = ctc_data.read_utterances([str(audio / "m.csv")], args)
    assert kept["id"][:] == ["u0"]
    assert [entry["id"] for entry in skipped] == ["u1", "u2"]
    assert "empty" in skipped[0]["reason"] and "exist" in skipped[1]["reason"]


def test_files_are_measured_once_for_all_starts_and_ranks(audio, monkeypatch, caplog):
    sides = np.random.default_rng(0).uniform(-0.1, 0.1, (16_000, 1)) * [1, -1]
    soundfile.write(audio / "opposite.wav", sides, 16_000)
    (audio / "m.csv").write_text("id,audio,duration\nu0,good.wav,2\nu1,opposite.wav,1\n")
    measure = ctc_data.measure_length

    def count(path):
        with open(audio / "probed", "a") as file:
            file.write(f"{Path(path).name} ")
        return measure(path)

    monkeypatch.setattr(ctc_data, "measure_length", count)
    args = SimpleNamespace(data_root=None, output_dir=audio, max_skipped_fraction=0.0)
    for rank in (0, 0, 1):
        args.process_index, args.main_process_first = rank, lambda local: contextlib.nullcontext()
        table, skipped = ctc_data.read_once([str(audio / "m.csv")], args)
        assert (len(table), skipped) == (2, [])
    assert sorted((audio / "probed").read_text().split()) == ["good.wav", "opposite.wav"]
    assert caplog.text.count("sides cancel out when they are mixed") == 2  # not on other ranks


def test_a_set_of_unreadable_files_alone_is_empty(audio):
    (audio / "m.csv").write_text("id,audio,duration\nu0,empty.wav,2\nu1,absent.wav,2\n")
    args = SimpleNamespace(data_root=None, output_dir=audio, max_skipped_fraction=1.0, process_index=0)
    args.main_process_first = lambda local: contextlib.nullcontext()
    table, skipped = ctc_data.read_once([str(audio / "m.csv")], args)
    assert (len(table), len(skipped)) == (0, 2)


def speech(audio, substitute, names=("torn.flac", "good.wav"), **row):
    whole = {"num_samples": 32_000, "text": "A"} | row
    rows = table([{"audio": str(audio / name), **whole} for name in names])
    shared = dict(min_samples=400, skip_log=audio / "skipped.jsonl", substitute=substitute)
    return ctc_data.SpeechDataset(rows, VOCABULARY, RAW, **shared)


def test_training_takes_another_for_unreadable_audio(audio):
    data = speech(audio, substitute=True)
    np.testing.assert_array_equal(data[0]["input_values"], data[1]["input_values"])
    [entry] = ctc_data.read_skipped(data.skip_log).values()
    assert (entry["id"], entry["audio"]) == ("u0", str(audio / "torn.flac"))


@pytest.mark.parametrize("text, label", [("A", VOCABULARY["A"]), ("", VOCABULARY["<unk>"])])
def test_unreadable_audio_has_no_labels_but_missing_text_has(audio, text, label):
    data = speech(audio, substitute=False, text=text)
    assert (data[0]["labels"], data[1]["labels"]) == ([], [label])
    assert len(ctc_data.read_skipped(data.skip_log)) == 1


def test_audio_shorter_than_a_frame_is_padded_to_one(audio):
    values = speech(audio, substitute=False, names=["good.wav"], num_samples=100)[0]["input_values"]
    assert len(values) == 400 and values[:100].any() and not values[100:].any()


def test_a_window_of_a_file_is_read(audio):
    data = speech(audio, substitute=False, names=["good.wav"], start=0.5, num_samples=8_000)
    expected = soundfile.read(audio / "good.wav", dtype="float32")[0][8_000:16_000]
    np.testing.assert_array_equal(data[0]["input_values"], expected)


def test_speed_moves_pitch_and_length_and_is_drawn_anew_each_epoch(tmp_path):
    soundfile.write(tmp_path / "tone.wav", 0.5 * np.sin(2 * np.pi * 400 / 16_000 * np.arange(32_000)), 16_000)
    rows = table([{"audio": str(tmp_path / "tone.wav"), "num_samples": 32_000, "text": "A"}])
    shared = dict(min_samples=400, skip_log=tmp_path / "skipped.jsonl", substitute=True)
    plain = ctc_data.SpeechDataset(rows, VOCABULARY, RAW, **shared)
    data = ctc_data.SpeechDataset(rows, VOCABULARY, RAW, speeds=[0.5, 1.0, 2.0], seed=3, **shared)
    lengths = []
    for data.epoch in range(30):
        values = data[0]["input_values"]
        np.testing.assert_array_equal(values, data[0]["input_values"])
        peak = np.abs(np.fft.rfft(values * np.hanning(len(values)))).argmax() * 16_000 / len(values)
        assert peak == pytest.approx(400 * 32_000 / len(values), abs=1)
        lengths.append(len(values))
        if len(values) == 32_000:
            np.testing.assert_array_equal(values, plain[0]["input_values"])
    assert set(lengths) == {16_000, 32_000, 64_000}


def test_batches_are_masked_only_where_lengths_differ():
    items = [{"input_values": np.ones(n, np.float32), "labels": labels} for n, labels in ((5, [3]), (3, [4, 5]))]
    batch = ctc_data.collate_speech(items)
    assert batch["input_values"].tolist() == batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[3, -100], [4, 5]]
    assert "attention_mask" not in ctc_data.collate_speech([items[0], items[0]])
