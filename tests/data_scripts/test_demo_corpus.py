"""The demo corpus: the same bytes for the same arguments, nothing shared between splits, manifests that are true."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import demo_speech
import make_demo_corpus
import numpy as np
import pytest
import soundfile
from conftest import error_line
from test_prepare import rows_of

ROOT = Path(__file__).resolve().parents[2]
SPLITS = ("train", "dev", "test")


def speak(output_dir, *flags, status=0):
    command = [sys.executable, str(ROOT / "data_scripts" / "make_demo_corpus.py"), str(output_dir), *map(str, flags)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == status, result.stderr
    return result


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def corpus_flags():
    """Few voices, among them one with breath noise, which espeak-ng by itself seeds from the clock."""
    seeds = (s for s in range(1000) if any("+f2" in v.espeak_name for v in make_demo_corpus.plan_voices(4, 0.5, s)))
    return ["--minutes", 0.5, "--num_voices", 4, "--labelled_minutes", 0.1, "--seed", next(seeds)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, corpus_flags):
    folder = tmp_path_factory.mktemp("demo") / "corpus"
    speak(folder, *corpus_flags, "--num_workers", 2)
    return folder


def test_any_number_of_workers_makes_the_same_bytes(corpus, corpus_flags, tmp_path):
    speak(tmp_path / "again", *corpus_flags, "--num_workers", 1)
    assert contents(tmp_path / "again") == contents(corpus)


def test_splits_share_no_speaker_timbre_or_sentence(corpus):
    voices = json.loads((corpus / "corpus.json").read_text())["voices"]
    for values in (
        {s: {v["espeak_name"].split("+")[1] for v in voices if v["split"] == s} for s in SPLITS},
        {s: {row["speaker"] for row in rows_of(corpus / f"{s}.csv")} for s in SPLITS},
        {s: {row["text"] for row in rows_of(corpus / f"{s}.csv")} for s in SPLITS},
    ):
        assert all(values.values())
        assert len(set.union(*values.values())) == sum(map(len, values.values()))


def test_a_large_plan_has_distinct_voices():
    voices = make_demo_corpus.plan_voices(240, 60, 1)
    assert sum(voice.seconds for voice in voices) == pytest.approx(60 * 60)
    assert len({voice.espeak_name for voice in voices}) == 240
    timbres = {s: {v.espeak_name.split("+")[1] for v in voices if v.split == s} for s in SPLITS}
    assert len(set.union(*timbres.values())) == sum(map(len, timbres.values())) == len(demo_speech.TIMBRES)


def test_demo_manifests_tell_the_truth_about_their_files(corpus):
    listed = [row for split in SPLITS for row in rows_of(corpus / f"{split}.csv")]
    assert {row["audio"] for row in listed} == {p.relative_to(corpus).as_posix() for p in corpus.rglob("*.flac")}
    assert len({row["id"] for row in listed}) == len(listed)
    for row in listed:
        samples, rate = soundfile.read(corpus / row["audio"])
        assert rate == 16_000 and samples.shape == (round(float(row["duration"]) * rate),)
        assert 0.1 < np.abs(samples).max() < 0.99


def test_the_labelled_part_holds_all_voices_of_train(corpus):
    train, labelled = rows_of(corpus / "train.csv"), rows_of(corpus / "train_labelled.csv")
    assert 0 < len(labelled) < len(train) and all(row in train for row in labelled)
    assert {row["speaker"] for row in labelled} == {row["speaker"] for row in train}


def test_a_second_call_costs_nothing_and_mends(corpus, corpus_flags):
    before, stamps = contents(corpus), {path: path.stat().st_mtime_ns for path in corpus.rglob("*")}
    speak(corpus, *corpus_flags)
    assert stamps == {path: path.stat().st_mtime_ns for path in corpus.rglob("*")}
    next(corpus.rglob("*.flac")).unlink()
    speak(corpus, *corpus_flags)
    assert contents(corpus) == before


def test_another_demo_corpus_in_the_way_is_refused(corpus):
    result = speak(corpus, "--minutes", 1, status=2)
    assert "holds another corpus" in error_line(result.stderr)


def test_sentences_keep_to_their_split_and_length():
    streams = [demo_speech.sentences(split, random.Random(split)) for split in SPLITS]
    every = {next(stream) for stream in streams for _ in range(400)}
    assert len(every) == 1_200, "nothing twice, nothing in two splits"
    assert all(3 <= len(sentence.split()) <= 14 for sentence in every)
    words = {word for sentence in every for word in sentence.split()}
    assert len(words) >= 100 and all(word.isalpha() and word.islower() for word in words)
