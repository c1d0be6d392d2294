"""Common Voice, Libri-Light and VoxPopuli on small trees laid out as their releases: nothing lost, nothing leaked."""

import csv
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import prepare_common_voice
import prepare_libri_light
import prepare_librispeech
import prepare_voxpopuli
import pytest
import soundfile
import yaml
from conftest import error_line
from encoding import encode
from test_prepare import rows_of, run, write_audio

from w2v2.data.audio import SAMPLING_RATE, measure_length
from w2v2.data.manifest import read_manifests
from w2v2.data.sources import read_sources


@pytest.fixture(autouse=True)
def in_process(request, monkeypatch):
    """Workers take most of the time of small trees: most tests look at the files themselves."""
    if "with_workers" not in request.fixturenames:
        monkeypatch.setattr("w2v2.data.inspection.map_files", lambda paths, action, *_: map(action, paths))


@pytest.fixture
def with_workers():
    """For tests of what is done in worker processes."""


def contents(folder: Path) -> dict[str, bytes]:
    """What a script wrote, but what it keeps for an interrupted run."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


# -- Common Voice

CV_HEADER = (
    "client_id path sentence_id sentence sentence_domain up_votes down_votes age gender accents variant locale segment"
)
# clip: speaker, seconds, lists. A dev and a test speaker have clips in validated and other as well.
CLIPS = {
    1: ("ann", 1.25, "validated train"),
    2: ("ann", 0.75, "validated"),
    3: ("ben", 1.0, "validated dev"),
    4: ("ben", 1.5, "validated"),
    5: ("cat", 0.5, "validated test"),
    6: ("cat", 1.0, "other"),
    7: ("dan", 2.0, "other"),
    8: ("eve", 1.0, "invalidated"),
}


@pytest.fixture(scope="session")
def spoken(tmp_path_factory) -> dict[float, bytes]:
    """MP3s at 48 kHz, as Common Voice has them, by their seconds."""
    folder = tmp_path_factory.mktemp("spoken")
    noise = np.random.default_rng(0).standard_normal(96_000) * 0.1
    lengths = {seconds for _, seconds, _ in CLIPS.values()}
    paths = {s: encode(folder / f"{s}.mp3", noise[: round(s * 48_000)], 48_000, "libmp3lame") for s in lengths}
    return {seconds: Path(path).read_bytes() for seconds, path in paths.items()}


def write_language(folder: Path, clips: dict, spoken: dict) -> None:
    name = folder.name
    (folder / "clips").mkdir(parents=True)
    lists = {key: [] for key in ("validated", "other", "invalidated", "train", "dev", "test")}
    durations = ["clip\tduration[ms]"]
    for number, (speaker, seconds, where) in clips.items():
        clip = f"common_voice_{name}_{number}.mp3"
        (folder / "clips" / clip).write_bytes(spoken[seconds])
        durations.append(f"{clip}\t{round(seconds * 1000)}")
        cells = [speaker, clip, "f" * 64, f'" lone quote {number}', "", "2", "0", "", "", "", "", name, ""]
        for key in where.split():
            lists[key].append("\t".join(cells))
    for key, lines in lists.items():
        (folder / f"{key}.tsv").write_text("\n".join(["\t".join(CV_HEADER.split()), *lines]) + "\n", encoding="utf-8")
    (folder / "clip_durations.tsv").write_text("\n".join(durations) + "\n")


@pytest.fixture
def release(tmp_path, spoken):
    """A release of two languages, one of which has neither dev nor test clips."""
    folder = tmp_path / "cv-corpus-17.0-2024-03-15"
    write_language(folder / "sw", CLIPS, spoken)
    write_language(folder / "zh-CN", {1: ("fay", 1.0, "validated train"), 2: ("gus", 0.5, "other")}, spoken)
    return folder


def numbers(path: Path) -> list[int]:
    return [int(row["id"].rpartition("_")[2]) for row in rows_of(path)]


def test_common_voice_keeps_dev_and_test_out_of_pretraining(release, tmp_path, capsys):
    lists = tmp_path / "lists"
    assert run(prepare_common_voice, release, "--output_dir", lists) == 0
    found = {path.relative_to(lists).as_posix(): numbers(path) for path in lists.rglob("*.csv")}
    splits = {"sw/train.csv": [1], "sw/dev.csv": [3], "sw/test.csv": [5], "zh-CN/train.csv": [1]}
    assert found == splits | {"sw/pretrain.csv": [1, 2, 7], "zh-CN/pretrain.csv": [1, 2]}
    said = capsys.readouterr().out
    told = "3 clips of 2 speakers; left out: 2 clips of dev and test, 2 more of their 2 speakers\n"
    assert f"sw: validated, other: {told}" in said and "zh-CN: the release has no clips for test" in said
    (row,) = rows_of(lists / "sw" / "train.csv")
    expected = dict(id="common_voice_sw_1", duration="1.25", text='" lone quote 1', speaker="ann", language="sw")
    assert row == expected | {"audio": row["audio"]}
    assert "text" not in rows_of(lists / "sw" / "pretrain.csv")[0]
    sources = yaml.safe_load((lists / "sources.yaml").read_text())
    assert sources == [dict(name=n, language=n, data=f"{n}/pretrain.csv") for n in ("sw", "zh-CN")]
    table, skipped, _ = read_sources(str(lists / "sources.yaml"))
    assert table["num_samples"].to_pylist() == [20_000, 12_000, 32_000, 16_000, 8_000] and not skipped


def test_common_voice_keeps_speakers_if_asked(release, tmp_path, capsys):
    assert run(prepare_common_voice, release, "--output_dir", tmp_path, "--keep_speakers") == 0
    assert numbers(tmp_path / "sw" / "pretrain.csv") == [1, 2, 4, 6, 7]
    told = "5 clips of 4 speakers, 2 of them in dev or test; left out: 2 clips of dev and test\n"
    assert told in capsys.readouterr().out


def test_common_voice_takes_other_lists_and_one_language(release, tmp_path):
    flags = ["--pretrain_from", "invalidated", "other", "other"]
    assert run(prepare_common_voice, release / "sw", "--output_dir", tmp_path / "a", *flags) == 0
    assert numbers(tmp_path / "a" / "sw" / "pretrain.csv") == [8, 7]  # in the order of the lists, each once
    assert run(prepare_common_voice, release, "--output_dir", tmp_path / "b", "--languages", "zh-CN") == 0
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["sources.yaml", "zh-CN"]


def test_common_voice_without_durations_decodes_every_clip(release, tmp_path, capsys):
    (release / "sw" / "clip_durations.tsv").unlink()
    for number, flags in enumerate((["--languages", "sw"], ["--measure_all"])):
        lists = tmp_path / str(number)
        assert run(prepare_common_voice, release, "--output_dir", lists, *flags) == 0
        assert "sw: no clip_durations.tsv is used" in capsys.readouterr().err
        for row in rows_of(lists / "sw" / "pretrain.csv"):
            length = measure_length(str(lists / "sw" / row["audio"]))
            assert float(row["duration"]) == length / SAMPLING_RATE


def test_common_voice_leaves_out_what_lasts_no_time(release, tmp_path, capsys):
    path = release / "sw" / "clip_durations.tsv"
    path.write_text(path.read_text().replace("sw_2.mp3\t750", "sw_2.mp3\t0"))
    (release / "sw" / "clips" / "common_voice_sw_2.mp3").write_bytes(b"")
    assert run(prepare_common_voice, release, "--output_dir", tmp_path / "lists") == 0
    assert numbers(tmp_path / "lists" / "sw" / "pretrain.csv") == [1, 7]
    assert "sw/validated.tsv: 1 clips last 0 ms" in capsys.readouterr().err


def empty(path: Path):
    for clip in path.iterdir():
        clip.unlink()


def replace(old: str, new: str):
    return lambda path: path.write_text(path.read_text().replace(old, new))


LEAK = "lists are missing whose clips and speakers pretraining may not hear, the first: test.tsv"


@pytest.mark.parametrize(
    ("name", "spoil", "complaints", "left"),
    [
        ("clips", empty, ["sw/train: 1 unusable files", "sw/pretrain: 3 unusable files", "sw_1.mp3: does not exist"], {}),
        ("clips/common_voice_sw_7.mp3", lambda path: path.write_bytes(b""), ["sw_7.mp3: is an empty file"], {"pretrain": [1, 2]}),
        ("clips/common_voice_sw_7.mp3", lambda path: path.write_bytes(b"\x00" * 999), ["sw_7.mp3: "], {"pretrain": [1, 2]}),
        ("clip_durations.tsv", replace("\t2000", "\t2"), ["sw_7.mp3: lasts 2.0", "where 0.00 s are said of it"], {"pretrain": [1, 2]}),
        ("clip_durations.tsv", replace("\t2000", "\t9000"), ["where 9.00 s are said of it"], {"pretrain": [1, 2]}),
        ("test.tsv", Path.unlink, ["sw/test: test.tsv is missing", f"sw/pretrain: 1 {LEAK}"], {"test": None}),
        ("other.tsv", Path.unlink, ["sw/pretrain: other.tsv is missing"], {"pretrain": [1, 2]}),
        ("train.tsv", replace('" lone quote 1', ""), ["sw/train: 1 utterances without transcript"], {}),
        ("dev.tsv", replace("sw_3", "sw_5"), ["sw/dev: 1 clips that another split has too"], {}),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_language_is_named(release, tmp_path, capsys, name, spoil, complaints, left):
    spoil(release / "sw" / name)
    flags = [release, "--output_dir", tmp_path / "lists"]
    assert run(prepare_common_voice, *flags) == 2
    error = error_line(capsys.readouterr().err)
    assert all(complaint in error for complaint in complaints) and "--allow_incomplete" in error
    assert (tmp_path / "lists" / "zh-CN" / "pretrain.csv").exists()  # what is whole is written
    assert run(prepare_common_voice, *flags, "--allow_incomplete") == 0
    assert "warning: sw/" in capsys.readouterr().err
    for split, expected in left.items():
        path = tmp_path / "lists" / "sw" / f"{split}.csv"
        assert numbers(path) == expected if expected else not path.exists()


# -- Libri-Light

RECORDINGS = {  # seconds, and stretches of speech
    "small/100/book_one/chapter_01": (40.0, [[0.5, 4.0], [4.5, 9.0], [12.0, 14.0], [15.0, 38.0]]),
    "small/100/book_one/chapter_02": (5.0, []),
    "small/207/book_two/chapter_01": (3.0, [[0.0, 3.004]]),
    "medium/300/book/chapter_01": (6.0, [[1.0, 2.0]]),
}
CUT = {
    "book_one/chapter_01": [(0.5, 8.5), (12.0, 2.0), (15.0, 11.5), (26.5, 11.5)],
    "book_two/chapter_01": [(0.0, 3.004)],
}


@pytest.fixture
def libri_light(tmp_path, monkeypatch):
    """Two unlabelled subsets with figures that fit them, and the limited supervision."""
    root = tmp_path / "librilight"
    for name, (seconds, activity) in RECORDINGS.items():
        write_audio(root / f"{name}.flac", seconds)
        meta = {"speaker": name.split("/")[1], "book_meta": {"id": "1"}, "snr": 5.4, "voice_activity": activity}
        (root / f"{name}.json").write_text(json.dumps(meta))
    for number, folder in enumerate([*(f"1h/{fold}" for fold in range(6)), "9h"]):
        for kind, speaker in (("clean", f"10{number}"), ("other", f"20{number}")):
            chapter = root / "librispeech_finetuning" / folder / kind / speaker / "7"
            write_audio(chapter / f"{speaker}-7-0000.flac", 0.25)
            (chapter / f"{speaker}-7.trans.txt").write_text(f"{speaker}-7-0000 A WORD\n")
    hours = {"small": 48 / 3600, "medium": 6 / 3600}
    monkeypatch.setattr(prepare_libri_light, "KNOWN", prepare_libri_light.KNOWN | hours)
    return root


def test_libri_light_cuts_recordings_where_its_speech_pauses(libri_light, tmp_path, capsys):
    lists = tmp_path / "lists"
    flags = ["--most_seconds", "12", "--most_pause", "0.75"]
    assert run(prepare_libri_light, libri_light, "--output_dir", lists, *flags) == 0
    assert "small: 1 of 3 recordings hold no speech by their .json" in capsys.readouterr().err
    found = defaultdict(list)
    for row in rows_of(lists / "small.csv"):
        book, _, number = row["id"].partition("/")[2].rpartition("-")
        assert int(number) == len(found[book]) and row["speaker"] == row["id"].split("/")[0]
        found[book].append((float(row["start"]), float(row["duration"])))
    assert found == CUT
    table, skipped, notes = read_manifests([str(lists / "small.csv")])
    assert len(table) == 5 and not skipped and not notes["warnings"]
    assert [row["id"] for row in rows_of(lists / "medium.csv")] == ["300/book/chapter_01-0000"]


def test_stretches_are_joined_without_a_gap_or_an_overlap():
    rng = np.random.default_rng(0)
    for most_seconds, most_pause in ((5.0, 0.5), (20.0, 1.0), (3.0, 0.0)):
        bounds = np.cumsum(rng.exponential([1.0, 6.0], (200, 2)).ravel()).reshape(-1, 2)
        pieces = prepare_libri_light.join_stretches(bounds.tolist(), most_seconds, most_pause)
        heard = np.zeros(int(bounds[-1, 1] * 100) + 2, int)
        for start, end in pieces * 100:
            heard[round(start) : round(end)] += 1
        inside = np.concatenate([np.arange(int(a * 100) + 2, int(b * 100) - 1) for a, b in bounds])
        assert (pieces[:, 1] - pieces[:, 0]).max() <= most_seconds + 1e-9
        assert heard.max() == 1 and heard[inside].all()  # each second of speech once
        silence = sum(bounds[1:, 0] - bounds[:-1, 1] > most_pause)
        assert len(pieces) > silence and set(bounds[:, 0]) & set(pieces[:, 0])


def test_libri_light_joins_its_limited_supervision(libri_light, tmp_path):
    lists = tmp_path / "lists"
    assert run(prepare_libri_light, libri_light.parent, "--output_dir", lists) == 0  # the folder above serves as well
    folds = [rows_of(lists / f"10min-{fold}.csv") for fold in range(6)]
    assert [len(rows) for rows in folds] == [2] * 6 and folds[0][0]["text"] == "A WORD"
    assert rows_of(lists / "1h.csv") == sum(folds, [])
    assert rows_of(lists / "10h.csv") == sum(folds, []) + rows_of(lists / "9h.csv")


def test_libri_light_leaves_recordings_whole_for_segmenting(libri_light, tmp_path, capsys):
    for path in libri_light.rglob("*.json"):
        path.unlink()
    assert run(prepare_libri_light, libri_light, "--output_dir", tmp_path / "lists", "--whole_files") == 0
    assert "data_scripts/segment.py" in capsys.readouterr().out
    assert [float(row["duration"]) for row in rows_of(tmp_path / "lists" / "small.csv")] == [40.0, 5.0, 3.0]


SMALL = "small/100/book_one/chapter_01"


@pytest.mark.parametrize(
    ("name", "spoil", "complaint"),
    [
        (f"{SMALL}.json", Path.unlink, f"lists/small: 1 recordings whose .json is missing or damaged (--whole_files needs none), the first: {SMALL}.json"),
        (f"{SMALL}.json", lambda path: path.write_text('{"voice_activity": [1]}'), f"damaged (--whole_files needs none), the first: {SMALL}.json"),
        (f"{SMALL}.flac", Path.unlink, f"1 recordings missing, with a .json, the first: {SMALL}.flac"),
        (f"{SMALL}.flac", lambda path: path.write_bytes(b"cut off"), "1 unusable files, the first: "),
        (f"{SMALL}.flac", lambda path: write_audio(path, 20.0), "lasts 20.00 s, where 38.00 s are said of it"),
        ("small/100/book_one/chapter_02.flac", lambda path: write_audio(path, 9.0), "hours found where"),
        ("librispeech_finetuning/1h/3/clean/103/7/103-7.trans.txt", lambda path: path.write_text("\n"), "lists/10min-3: 1 utterances without transcript, the first: 103-7-0000"),
        ("librispeech_finetuning/1h/3/clean/103/7/103-7-0000.flac", Path.unlink, "lists/10min-3: 1 transcribed utterances without audio"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_libri_light_is_named(libri_light, tmp_path, capsys, name, spoil, complaint):
    spoil(libri_light / name)
    assert run(prepare_libri_light, libri_light, "--output_dir", tmp_path / "lists") == 2
    assert complaint in error_line(capsys.readouterr().err)
    assert (tmp_path / "lists" / "medium.csv").exists()
    assert run(prepare_libri_light, libri_light, "--output_dir", tmp_path / "lists", "--allow_incomplete") == 0


# -- VoxPopuli

EVENTS = {  # segments of each recording, in seconds
    "20180117-0900-PLENARY-15_en": [(0.0, 1.0), (1.25, 2.0)],
    "20190116-0900-PLENARY-4_en": [(0.5, 2.5)],
    "20190116-0900-PLENARY-4_de": [(0.25, 1.0)],
    "20190205-AGRI-1_de": [(0.0, 1.5)],
}
TRANSCRIBED = {
    "train": "20190116-0900-PLENARY-4-en_20190116-09:10:04_0",
    "dev": "20180117-0900-PLENARY-15-en_20180117-09:32:04_17",
}


@pytest.fixture
def voxpopuli(tmp_path):
    """Recordings in two languages, and transcribed English: dev lies in one of the unlabelled sessions."""
    root, lines = tmp_path / "vox", ["event_id\tsegment_no\tstart\tend"]
    for event, segments in EVENTS.items():
        path = root / "raw_audios" / event[-2:] / event[:4] / f"{event}.ogg"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, np.random.default_rng(0).standard_normal(48_000) * 0.1, 16_000, format="OGG")
        lines += [f"{event}\t{number}\t{start}\t{end}" for number, (start, end) in enumerate(segments)]
    (root / "unlabelled_data").mkdir()
    with gzip.open(root / "unlabelled_data" / "unlabelled_v2.tsv.gz", "wt") as file:
        file.write("\n".join(lines) + "\n")
    folder = root / "transcribed_data" / "en"
    for split in ("train", "dev", "test"):
        name = TRANSCRIBED.get(split, "20200101-0900-PLENARY-1-en_20200101-09:00:00_1")
        (folder / name[:4]).mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / name[:4] / f"{name}.ogg", np.full(16_000, 0.1), 16_000, format="OGG")
        header = "id raw_text normalized_text speaker_id split gender is_gold_transcript accent".replace(" ", "\t")
        row = f"{name}\tA Word.\ta word\t{split}-mep\t{split}\tmale\tTrue\tNone"
        (folder / f"asr_{split}.tsv").write_text(f"{header}\n{row}\n")
    return root


def cut_segments(root: Path) -> None:
    """The files that VoxPopuli's get_unlabelled_data.py cuts."""
    for event, segments in EVENTS.items():
        for number, (start, end) in enumerate(segments):
            path = root / "unlabelled_data" / event[-2:] / event[:4] / f"{event}_{number}.ogg"
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, np.full(round((end - start) * 16_000), 0.1), 16_000, format="OGG")


@pytest.mark.parametrize("is_cut", [False, True])
def test_voxpopuli_leaves_out_the_sessions_of_dev_and_test(voxpopuli, tmp_path, capsys, is_cut):
    if is_cut:
        cut_segments(voxpopuli)
    lists = tmp_path / "lists"
    assert run(prepare_voxpopuli, voxpopuli, "--output_dir", lists) == 0
    said = capsys.readouterr()
    assert "en/unlabelled: left out: 2 segments (0.0 hours) of sessions that dev and test are from" in said.out
    assert "the sessions of dev and test are not left out" in said.err.splitlines()[0]  # of German
    assert ("pack them once with data_scripts/pack_audio.py" in said.out) == (not is_cut)
    english, german = (rows_of(lists / language / "unlabelled.csv") for language in ("en", "de"))
    assert [row["id"] for row in english] == ["20190116-0900-PLENARY-4_en_0"]
    assert [float(row["duration"]) for row in german] == [0.75, 1.5]
    assert ("start" in english[0]) == (not is_cut) and {row["language"] for row in german} == {"de"}
    assert {row["language"]: row["data"] for row in yaml.safe_load((lists / "sources.yaml").read_text())} == {
        "de": "de/unlabelled.csv",
        "en": "en/unlabelled.csv",
    }
    (train,) = rows_of(lists / "en" / "train.csv")
    assert (train["id"], train["text"], train["speaker"]) == (TRANSCRIBED["train"], "a word", "train-mep")
    for split in ("de/unlabelled", "en/unlabelled", "en/dev"):
        assert not read_manifests([str(lists / f"{split}.csv")])[2]["warnings"]


def test_voxpopuli_subsets_follow_dates_and_kinds(voxpopuli, tmp_path):
    for subset, expected in (("400k", 2), ("100k", 1), ("10k", 1)):
        flags = ["--languages", "de", "--subset", subset, "--output_dir", tmp_path / subset]
        assert run(prepare_voxpopuli, voxpopuli, *flags) == 0
        assert len(rows_of(tmp_path / subset / "de" / "unlabelled.csv")) == expected
    assert not prepare_voxpopuli.is_heard("20180117-0900-PLENARY-15_en", "10k")
    assert not prepare_voxpopuli.is_heard("20200801-0900-PLENARY-15_en", "10k")


RECORDING = "raw_audios/de/2019/20190205-AGRI-1_de.ogg"


@pytest.mark.parametrize(
    ("name", "spoil", "complaint"),
    [
        (RECORDING, Path.unlink, "de/unlabelled: 1 unusable files, the first: "),
        (RECORDING, lambda path: path.write_bytes(b"OggS cut off"), "de/unlabelled: 1 unusable files, the first: "),
        ("transcribed_data/en/asr_test.tsv", Path.unlink, "en/unlabelled: 1 lists are missing whose sessions pretraining may not hear, the first: asr_test.tsv"),
        ("transcribed_data/en/asr_dev.tsv", replace("\ta word", "\t"), "en/dev: 1 utterances without transcript"),
        ("transcribed_data/en/2018", lambda path: next(path.iterdir()).unlink(), "en/dev: 1 unusable files"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_voxpopuli_is_named(voxpopuli, tmp_path, capsys, name, spoil, complaint):
    spoil(voxpopuli / name)
    assert run(prepare_voxpopuli, voxpopuli, "--output_dir", tmp_path / "lists") == 2
    assert complaint in error_line(capsys.readouterr().err.splitlines()[-1] + "\n")
    assert run(prepare_voxpopuli, voxpopuli, "--output_dir", tmp_path / "lists", "--allow_incomplete") == 0


# -- all of them


@pytest.mark.parametrize(
    ("corpus", "script", "name", "spoil", "complaint"),
    [
        ("release", prepare_common_voice, "sw/train.tsv", replace("client_id", "user"), "sw/train.tsv: has no column 'client_id'"),
        ("release", prepare_common_voice, "sw/train.tsv", replace("\t2\t0", "\t2"), "sw/train.tsv: row 1 (line 2) has 12 cells where the header has 13"),
        ("release", prepare_common_voice, "sw/clip_durations.tsv", replace("\t2000", "\t2.0 s"), "has no columns clip and duration[ms] of whole numbers"),
        ("voxpopuli", prepare_voxpopuli, "transcribed_data/en/asr_dev.tsv", replace("speaker_id", "mep"), "asr_dev.tsv: has no column 'speaker_id'"),
        ("voxpopuli", prepare_voxpopuli, "unlabelled_data/unlabelled_v2.tsv.gz", lambda path: path.write_bytes(path.read_bytes()[:-30]), "unlabelled_v2.tsv.gz: is damaged"),
        ("voxpopuli", prepare_voxpopuli, "unlabelled_data/unlabelled_v2.tsv.gz", lambda path: path.write_bytes(gzip.compress(b"event_id|start\n")), "has no event_id, segment_no, start, end"),
    ],
)  # fmt: skip
def test_a_list_that_cannot_be_read_ends_it(request, tmp_path, capsys, corpus, script, name, spoil, complaint):
    folder = request.getfixturevalue(corpus)
    spoil(folder / name)
    assert run(script, folder, "--output_dir", tmp_path / "lists", "--allow_incomplete") == 2
    assert complaint in error_line(capsys.readouterr().err.splitlines()[-1] + "\n")


def test_the_same_tree_gives_the_same_bytes(release, libri_light, voxpopuli, tmp_path, with_workers):
    corpora = {prepare_common_voice: release, prepare_libri_light: libri_light, prepare_voxpopuli: voxpopuli}
    for script, folder in corpora.items():
        outputs = []
        for name, workers in (("one", 1), ("three", 3), ("one", 2)):  # the last with the lengths that are kept
            lists = tmp_path / folder.name / name
            assert run(script, folder, "--output_dir", lists, "--num_workers", workers) == 0
            outputs.append(contents(lists))
        assert outputs[0] == outputs[1] == outputs[2] and outputs[0]


KILLED = """
import sys, time
sys.path.insert(0, sys.argv.pop(1))
import corpus_files, prepare_librispeech
length = corpus_files.measure_length
corpus_files.measure_length = lambda path: time.sleep(600) if path.endswith("40-7-0020.flac") else length(path)
prepare_librispeech.KNOWN |= {"dev-clean": (40, None)}
prepare_librispeech.main(sys.argv[1:])
"""


def test_a_killed_run_goes_on_where_it_was(tmp_path, monkeypatch, with_workers):
    chapter = tmp_path / "LibriSpeech" / "dev-clean" / "40" / "7"
    names = [f"40-7-{number:04d}" for number in range(40)]
    for number, name in enumerate(names):
        write_audio(chapter / f"{name}.flac", 0.25 + number / 100)
    (chapter / "40-7.trans.txt").write_text("".join(f"{name} WORDS\n" for name in names))
    lists, kept = tmp_path / "lists", tmp_path / "lists" / ".lengths.jsonl"
    flags = [str(tmp_path / "LibriSpeech"), "--output_dir", str(lists), "--num_workers", "1"]
    command = [sys.executable, "-c", KILLED, str(Path(prepare_librispeech.__file__).parent), *flags]
    killed = subprocess.Popen(command, start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        while not (kept.exists() and len(kept.read_text().splitlines()) == 16):  # two blocks of eight
            assert time.monotonic() < deadline and killed.poll() is None
            time.sleep(0.05)
    finally:
        os.killpg(killed.pid, signal.SIGKILL)
        killed.wait()
    assert not (lists / "dev-clean.csv").exists()
    monkeypatch.setitem(prepare_librispeech.KNOWN, "dev-clean", (40, None))
    assert run(prepare_librispeech, *flags) == 0
    assert len(kept.read_text().splitlines()) == 40  # none of them was measured again
    assert run(prepare_librispeech, tmp_path / "LibriSpeech", "--output_dir", tmp_path / "whole") == 0
    assert contents(lists) == contents(tmp_path / "whole")
    with open(lists / "dev-clean.csv", newline="") as file:
        assert [float(row["duration"]) for row in csv.DictReader(file)] == pytest.approx(
            [0.25 + n / 100 for n in range(40)]
        )


@pytest.mark.parametrize(
    ("script", "make", "flags", "complaint"),
    [
        (prepare_common_voice, "sw/clips", "", "holds no LANGUAGE/validated.tsv"),
        (prepare_common_voice, "sw/validated.tsv/", "--languages xx", "--languages xx: "),
        (prepare_libri_light, "other", "", "holds none of small, medium, large, duplicate, librispeech_finetuning"),
        (prepare_libri_light, "small", "--most_seconds 0.5", "--most_seconds: 0.5"),
        (prepare_libri_light, "small", "", "lists/small: no utterance found"),
        (prepare_voxpopuli, "other", "", "holds none of unlabelled_data, raw_audios, transcribed_data"),
        (prepare_voxpopuli, "raw_audios/en/2019", "", "unlabelled_v2.tsv.gz is missing: fetch https://"),
        (prepare_voxpopuli, "raw_audios/en/2019", "--languages xx", "has en"),
    ],
)
def test_a_slip_is_one_line(tmp_path, capsys, script, make, flags, complaint):
    (tmp_path / "corpus" / make).mkdir(parents=True)
    assert run(script, tmp_path / "corpus", "--output_dir", tmp_path / "lists", *flags.split()) == 2
    assert complaint in error_line(capsys.readouterr().err.splitlines()[-1] + "\n")
