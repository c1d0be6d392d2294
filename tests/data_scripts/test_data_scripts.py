"""The scripts that make manifests: nothing lost, nothing twice, nothing leaked between splits, one line for a slip."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import prepare_folder
import prepare_librispeech
import pytest
import soundfile

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPTS = REPOSITORY / "data_scripts"


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_audio(path: Path, seconds: float = 0.5, rate: int = 16_000, channels: int = 1):
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = np.random.default_rng(len(str(path))).normal(0, 0.1, (round(seconds * rate), channels))
    soundfile.write(path, samples, rate)


def one_line(capsys) -> str:
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Traceback" not in error
    return error


# prepare_folder.py


def test_folder_lists_usable_files_once_and_others_apart(tmp_path, capsys):
    audio = tmp_path / "audio"
    write_audio(audio / "a.wav", 1.0)
    write_audio(audio / "a.flac", 0.75)
    write_audio(audio / "deep" / "er" / "b.WAV", 2.0, rate=44_100, channels=2)
    write_audio(audio / ".hidden.wav")
    (audio / "notes.txt").write_text("not audio")
    (audio / "broken.flac").write_bytes(b"not a flac at all")
    (audio / "empty.wav").touch()
    assert prepare_folder.main([str(audio), "--output", str(tmp_path / "lists" / "all.csv")]) == 0
    found = {row["id"]: row for row in rows_of(tmp_path / "lists" / "all.csv")}
    assert {name: float(row["duration"]) for name, row in found.items()} == {
        "a.wav": 1.0,
        "a.flac": 0.75,
        "deep/er/b": 2.0,
    }
    assert all((tmp_path / "lists" / row["audio"]).is_file() for row in found.values())
    assert "text" not in found["a.wav"] and "speaker" not in found["a.wav"]
    skipped = [json.loads(line) for line in (tmp_path / "lists" / "all.skipped.jsonl").read_text().splitlines()]
    assert {Path(entry["audio"]).name for entry in skipped} == {"broken.flac", "empty.wav"}


def test_folder_dev_part_is_whole_speakers_each_time(tmp_path):
    for speaker in range(20):
        for take in range(3):
            write_audio(tmp_path / "audio" / f"s{speaker}" / "chapter" / f"{take}.flac", 0.2)
    flags = ["--speaker_from_parent", "2", "--valid_fraction", "0.25"]
    for name in ("one", "two"):
        assert prepare_folder.main([str(tmp_path / "audio"), "--output", str(tmp_path / f"{name}.csv"), *flags]) == 0
    train, dev = rows_of(tmp_path / "one.csv"), rows_of(tmp_path / "one_dev.csv")
    assert not {row["speaker"] for row in train} & {row["speaker"] for row in dev}
    assert {row["id"].split("/")[0] for row in dev} == {row["speaker"] for row in dev}
    assert (len(train), len(dev)) == (45, 15)
    assert (train, dev) == (rows_of(tmp_path / "two.csv"), rows_of(tmp_path / "two_dev.csv"))


def test_folder_takes_transcripts_beside_the_audio(tmp_path, capsys):
    for name in ("said", "unsaid", "mute"):
        write_audio(tmp_path / "audio" / f"{name}.wav")
    (tmp_path / "audio" / "said.txt").write_text("  früh\n am   Morgen\n", encoding="utf-8-sig")
    (tmp_path / "audio" / "mute.txt").write_text(" \n")
    assert prepare_folder.main([str(tmp_path / "audio"), "--text", "--output", str(tmp_path / "t.csv")]) == 0
    assert [(row["id"], row["text"]) for row in rows_of(tmp_path / "t.csv")] == [("said", "früh am Morgen")]
    assert len((tmp_path / "t.skipped.jsonl").read_text().splitlines()) == 2


def test_folder_slips_end_with_one_line(tmp_path, capsys):
    write_audio(tmp_path / "flat" / "a.wav")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.wav").write_bytes(b"no audio")
    (tmp_path / "none").mkdir()
    output = ["--output", str(tmp_path / "m.csv")]
    for folder, flags, complaint in [
        ("absent", output, "no such folder"),
        ("none", output, "no file that ends in"),
        ("bad", output, "none of 1 files can be used"),
        ("flat", [*output, "--speaker_from_parent"], "a.wav has only 0 folders"),
        ("flat", [*output, "--valid_fraction", "0.5"], "cannot be split"),
        ("flat", [*output, "--valid_fraction", "2"], "--valid_fraction 2.0"),
        ("flat", ["--output", str(tmp_path / "m.txt")], "end in .csv"),
    ]:
        assert prepare_folder.main([str(tmp_path / folder), *flags]) == 2
        assert complaint in one_line(capsys)
    assert not (tmp_path / "m.csv").exists()
    with pytest.raises(SystemExit, match="2"):
        prepare_folder.main([str(tmp_path / "flat"), "--outputt", "x"])
    one_line(capsys)


# prepare_librispeech.py

TRAIN = ("train-clean-100", "train-clean-360", "train-other-500")


@pytest.fixture
def librispeech(tmp_path, monkeypatch):
    """A LibriSpeech of 2 speakers × 2 utterances a subset, and a table that says so."""
    known = dict.fromkeys(prepare_librispeech.KNOWN, (4, None))
    monkeypatch.setattr(prepare_librispeech, "KNOWN", {**known, "train-clean-100": (4, 4 * 0.5 / 3600)})
    root = tmp_path / "LibriSpeech"
    for number, subset in enumerate((*TRAIN, "dev-clean")):
        for speaker in (str(10 + number), str(20 + number)):
            names = [f"{speaker}-7-{i:04d}" for i in range(2)]
            for name in names:
                write_audio(root / subset / speaker / "7" / f"{name}.flac")
            text = "".join(f"{name} WORDS OF {name[-1]}\n" for name in names)
            (root / subset / speaker / "7" / f"{speaker}-7.trans.txt").write_text(text)
    return root


def prepare(root, output_dir, *flags):
    return prepare_librispeech.main([str(root), "--output_dir", str(output_dir), *flags])


def test_librispeech_table_adds_up_to_960_hours():
    table = [prepare_librispeech.KNOWN[name] for name in TRAIN]
    assert sum(utterances for utterances, _ in table) == 281_241
    assert sum(hours for _, hours in table) == pytest.approx(960.9)


def test_librispeech_joins_audio_text_and_speaker(librispeech, tmp_path):
    assert prepare(librispeech.parent, tmp_path / "lists") == 0  # the folder above is understood as well
    rows = rows_of(tmp_path / "lists" / "dev-clean.csv")
    assert [row["id"] for row in rows] == ["13-7-0000", "13-7-0001", "23-7-0000", "23-7-0001"]
    assert [row["text"] for row in rows] == ["WORDS OF 0", "WORDS OF 1"] * 2
    assert [row["speaker"] for row in rows] == ["13", "13", "23", "23"]
    assert all(float(row["duration"]) == 0.5 and (tmp_path / "lists" / row["audio"]).is_file() for row in rows)
    pieces = [row for subset in TRAIN for row in rows_of(tmp_path / "lists" / f"{subset}.csv")]
    assert rows_of(tmp_path / "lists" / "train-960.csv") == pieces and len(pieces) == 12
    assert not (tmp_path / "lists" / "test-clean.csv").exists()


def test_an_incomplete_subset_needs_permission(librispeech, tmp_path, capsys):
    lost = librispeech / "train-clean-360" / "11" / "7" / "11-7-0001.flac"
    audio = lost.read_bytes()
    lost.unlink()
    assert prepare(librispeech, tmp_path / "lists") == 2
    error = one_line(capsys)
    assert "train-clean-360: 3 of 4 utterances" in error and "11-7-0001" in error and "--allow_incomplete" in error
    assert {path.stem for path in (tmp_path / "lists").glob("*.csv")} == {TRAIN[0], TRAIN[2], "dev-clean"}
    assert prepare(librispeech, tmp_path / "lists", "--allow_incomplete") == 0
    assert "warning: train-clean-360" in capsys.readouterr().err
    assert len(rows_of(tmp_path / "lists" / "train-960.csv")) == 11
    lost.write_bytes(audio)
    assert prepare(librispeech, tmp_path / "lists") == 0
    assert len(rows_of(tmp_path / "lists" / "train-960.csv")) == 12


@pytest.mark.parametrize(
    "path, content, complaint",
    [
        ("dev-clean/13/7/13-7-0000.flac", b"cut off", "1 unusable files, the first: "),
        (
            "dev-clean/13/7/13-7.trans.txt",
            b"13-7-0000 ONLY ONE\n",
            "1 utterances without transcript, the first: 13-7-0001",
        ),
        ("dev-clean/13/7/13-7.trans.txt", b"\xff\xfe\n", "is not UTF-8"),
    ],
)
def test_librispeech_spoilt_file_is_named(librispeech, tmp_path, capsys, path, content, complaint):
    (librispeech / path).write_bytes(content)
    assert prepare(librispeech, tmp_path / "lists") == 2
    assert complaint in one_line(capsys)


def test_librispeech_hours_are_checked_where_known(librispeech, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(prepare_librispeech.KNOWN, "train-clean-100", (4, 1.5))
    assert prepare(librispeech, tmp_path / "lists") == 2
    assert "train-clean-100: 0.0 hours found where 1.5 are expected" in one_line(capsys)


def test_librispeech_slips_end_with_one_line(librispeech, tmp_path, capsys):
    for root, flags, complaint in [
        (tmp_path / "elsewhere", [], "holds no subset"),
        (librispeech, ["--subsets", "test-other"], "--subsets test-other: not in"),
    ]:
        assert prepare(root, tmp_path / "lists", *flags) == 2
        assert complaint in one_line(capsys)


@pytest.mark.parametrize("script", ["make_demo_corpus.py", "prepare_folder.py", "prepare_librispeech.py"])
def test_help_is_complete_from_any_folder(script, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, str(SCRIPTS / script), "--help"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert result.returncode == 0 and "usage: " in result.stdout and "--num_workers" in result.stdout
