"""Long recordings in overlapping chunks, the times of words, and subtitles."""

import pytest
import torch
from conftest import tiny_config
from datasets import Dataset
from transformers import Wav2Vec2ForCTC

from w2v2.finetune.ctc import chunk_logits, cut_chunks
from w2v2.finetune.text import align_path, build_vocabulary, greedy_decode
from w2v2.finetune.transcription import time_words, write_subtitles
from w2v2.model.feature_encoder import hide_padding, num_frames

VOCABULARY = build_vocabulary(["ABC"])  # <pad> <unk> | A B C


@pytest.mark.parametrize("num_samples", [400, 160_000, 160_400, 400_000, 1_000_003])
def test_the_frames_of_chunks_are_those_of_the_whole(num_samples):
    config = tiny_config()
    chunks = cut_chunks(config, num_samples, chunk_seconds=10)
    frames = []
    for chunk in chunks:
        size = chunk.samples.stop - chunk.samples.start
        assert size <= 160_000 + 400 and chunk.samples.stop <= num_samples
        first = chunk.samples.start // config.inputs_to_logits_ratio
        frames += range(first + chunk.frames.start, first + chunk.frames.stop)
        assert chunk.frames.stop <= num_frames(config, size)
    assert frames == list(range(num_frames(config, num_samples)))


def test_chunks_give_the_logits_of_a_whole_of_short_context():
    torch.manual_seed(0)
    config = tiny_config(feat_extract_norm="layer", do_stable_layer_norm=True, num_hidden_layers=0, vocab_size=6)
    model = hide_padding(Wav2Vec2ForCTC(config)).eval()
    samples = torch.randn(16_000 * 33 + 123)
    with torch.no_grad():
        whole = model(samples[None]).logits[0]
        for batch_size in (1, 3):
            torch.testing.assert_close(chunk_logits(model, samples, 10, batch_size), whole, rtol=1e-4, atol=1e-5)


def test_words_have_the_times_of_their_frames():
    path = [0, 3, 3, 0, 4, 2, 2, 5, 5, 0, 5, 0, -1]
    units = align_path(path, VOCABULARY)
    assert units == [("A", 1, 3), ("B", 4, 5), ("|", 5, 7), ("C", 7, 9), ("C", 10, 11)]
    words = time_words(units, "characters", tiny_config(), start=100.0)
    assert words == [{"word": "AB", "start": 100.02, "end": 100.1}, {"word": "CC", "start": 100.14, "end": 100.22}]
    assert " ".join(word["word"] for word in words) == greedy_decode(path, VOCABULARY)


def test_scripts_without_spaces_have_the_times_of_characters():
    units = [("天", 0, 1), ("地", 2, 3), ("น", 5, 6), ("้", 7, 9)]
    words = time_words(units, "characters", tiny_config(), 0.0)
    assert [(word["word"], word["start"], word["end"]) for word in words] == [
        ("天", 0.0, 0.02), ("地", 0.04, 0.06), ("น้", 0.1, 0.18)
    ]  # fmt: skip


def test_subtitles_are_cut_at_pauses_and_lengths(tmp_path):
    table = Dataset.from_dict({"id": ["1", "2", "3"], "audio": ["x/a.wav", "x/a.wav", "y/a.wav"]})
    timed = [("ONE", 3600.5, 3601.0), ("<TWO>", 3601.2, 3602.0), ("THREE", 3604.0, 3604.25)]
    lines = [
        {"id": "2", "words": [{"word": word, "start": start, "end": end} for word, start, end in timed]},
        {
            "id": "1",
            "words": [{"word": c, "start": 0.5 * i, "end": 0.5 * i + 0.4} for i, c in enumerate("天地人山水" * 4)],
        },
        {"id": "3", "words": []},
    ]
    assert write_subtitles(tmp_path, "srt", lines, table) == 2
    assert (tmp_path / "a.srt").read_text() == (
        f"1\n00:00:00,000 --> 00:00:06,900\n{('天地人山水' * 3)[:14]}\n\n"
        f"2\n00:00:07,000 --> 00:00:09,900\n{('天地人山水' * 4)[14:]}\n\n"
        "3\n01:00:00,500 --> 01:00:02,000\nONE <TWO>\n\n4\n01:00:04,000 --> 01:00:04,250\nTHREE\n"
    )
    assert (tmp_path / "a_2.srt").read_text() == ""
    sides = Dataset.from_dict({"id": ["1", "2", "3"], "audio": ["x/a.wav"] * 3, "channel": [0, 1, None]})
    assert write_subtitles(tmp_path / "sides", "srt", lines, sides) == 3
    assert "天" not in (tmp_path / "sides/a_channel1.srt").read_text()
    assert {path.name for path in (tmp_path / "sides").iterdir()} == {"a.srt", "a_channel0.srt", "a_channel1.srt"}
    write_subtitles(tmp_path, "vtt", lines, table)
    vtt = (tmp_path / "a.vtt").read_text()
    assert vtt.startswith("WEBVTT\n\n1\n00:00:00.000 --> 00:00:06.900\n") and "&lt;TWO&gt;" in vtt
    members = Dataset.from_dict({"id": ["1", "2", "s/3"], "audio": [f"x/a.tar:{n}:9" for n in range(3)]})
    lines[2]["id"] = "s/3"
    assert write_subtitles(tmp_path / "members", "srt", lines, members) == 3
    assert {path.name for path in (tmp_path / "members").iterdir()} == {"1.srt", "2.srt", "s_3.srt"}
