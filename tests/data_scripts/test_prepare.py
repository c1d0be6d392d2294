"""The scripts that make manifests: nothing lost, nothing twice, nothing leaked between splits, one line for a slip."""

import csv
import json
from pathlib import Path

import numpy as np
import prepare_folder
import prepare_iemocap
import prepare_labelled
import prepare_librispeech
import prepare_voxceleb
import pytest
import soundfile
from conftest import error_line
from encoding import encode

from w2v2.data.utterances import load_manifest


def rows_of(path: Path) -> list[dict]:
    """Rows of a manifest, each of whose files is where its path, relative to the manifest, says."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert all((path.parent / row["audio"]).is_file() for row in rows)
    return rows


def write_audio(path: Path, seconds: float = 0.5, rate: int = 16_000, channels: int = 1):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.zeros((round(seconds * rate), channels)), rate)


def run(script, *argv) -> int:
    try:
        return script.main(list(map(str, argv)))
    except SystemExit as end:
        return end.code


# -- any folder


def test_folder_lists_usable_files_once_and_others_apart(tmp_path, caplog):
    audio, output = tmp_path / "audio", tmp_path / "lists" / "all.csv"
    write_audio(audio / "a.wav", 1.0)
    write_audio(audio / "a.flac", 0.75)
    write_audio(audio / "deep" / "er" / "b.WAV", 2.0, rate=44_100, channels=2)
    encode(audio / "c.webm", np.zeros(48_000), 48_000, "libopus")
    write_audio(audio / ".hidden.wav")
    (audio / "notes.txt").write_text("not audio")
    (audio / "broken.flac").write_bytes(b"not a flac at all")
    (audio / "empty.wav").touch()
    assert run(prepare_folder, audio, "--output", output) == 0
    durations = {row["id"]: float(row["duration"]) for row in rows_of(output)}
    assert durations == {"a.wav": 1.0, "a.flac": 0.75, "deep/er/b": 2.0, "c": pytest.approx(1.0, abs=0.03)}
    assert f"{audio}: skipped files, hidden or with a suffix that is not of audio: 1 .txt, 1 hidden" in caplog.text
    assert set(rows_of(output)[0]) == {"id", "audio", "duration"}
    skipped = [json.loads(line) for line in (tmp_path / "lists" / "all.skipped.jsonl").read_text().splitlines()]
    assert {Path(entry["audio"]).name for entry in skipped} == {"broken.flac", "empty.wav"}


def test_folder_dev_part_is_whole_speakers_each_time(tmp_path):
    for speaker in range(20):
        for take in range(3):
            write_audio(tmp_path / "audio" / f"s{speaker}" / "chapter" / f"{take}.flac", 0.2)
    flags = ["--speaker_from_parent", "2", "--valid_fraction", "0.25"]
    for name in ("one", "two"):
        assert run(prepare_folder, tmp_path / "audio", "--output", tmp_path / f"{name}.csv", *flags) == 0
    train, dev = rows_of(tmp_path / "one.csv"), rows_of(tmp_path / "one_dev.csv")
    assert not {row["speaker"] for row in train} & {row["speaker"] for row in dev}
    assert {row["id"].split("/")[0] for row in dev} == {row["speaker"] for row in dev}
    assert (len(train), len(dev)) == (45, 15)
    assert (train, dev) == (rows_of(tmp_path / "two.csv"), rows_of(tmp_path / "two_dev.csv"))


def test_folder_takes_transcripts_beside_the_audio(tmp_path):
    for name in ("said", "unsaid", "mute", "binary"):
        write_audio(tmp_path / "audio" / f"{name}.wav")
    (tmp_path / "audio" / "said.txt").write_text("  früh\n am   Morgen\n", encoding="utf-8-sig")
    (tmp_path / "audio" / "mute.txt").write_text(" \n")
    (tmp_path / "audio" / "binary.txt").write_bytes(b"\xff\xfe")
    assert run(prepare_folder, tmp_path / "audio", "--text", "--output", tmp_path / "t.csv") == 0
    assert [(row["id"], row["text"]) for row in rows_of(tmp_path / "t.csv")] == [("said", "früh am Morgen")]
    assert len((tmp_path / "t.skipped.jsonl").read_text().splitlines()) == 3


# -- labels from names


@pytest.mark.parametrize(
    ("corpus", "name", "columns"),
    [
        ("emodb", "wav/03a01Fa.wav", dict(speaker="03", sentence_code="a01", label="happiness")),
        ("emodb", "wav/16b10Wb.wav", dict(speaker="16", sentence_code="b10", label="anger")),
        ("ravdess", "Actor_12/03-01-06-01-02-01-12.wav", dict(speaker="12", intensity="01", label="fearful")),
    ],
)
def test_names_say_speaker_and_emotion(tmp_path, corpus, name, columns):
    write_audio(tmp_path / name, 0.25)
    assert run(prepare_labelled, tmp_path, "--output", tmp_path / "m.csv", "--corpus", corpus) == 0
    (row,) = rows_of(tmp_path / "m.csv")
    assert row == row | columns | {"id": name, "duration": "0.25"}
    assert "text" not in load_manifest([tmp_path / "m.csv"])[0].column_names  # a sentence's number is no transcript


PATTERN = ["--pattern", r"(?P<label>[^/]+)/(?P<speaker>[^_/]+)_"]


def test_any_pattern_over_the_path_makes_columns(tmp_path, capsys):
    for name in ("yes/anna_1", "no/bob_2", "no/unnamed"):
        write_audio(tmp_path / "a" / f"{name}.wav")
    flags = [tmp_path / "a", "--output", tmp_path / "a.csv", "--label_map", "yes=1"]
    assert run(prepare_labelled, *flags, *PATTERN) == 2
    assert "1 of 3 names do not match the pattern, such as no/unnamed.wav" in error_line(capsys.readouterr().err)
    assert run(prepare_labelled, *flags, *PATTERN, "--skip_unmatched") == 0
    assert {(row["label"], row["speaker"]) for row in rows_of(tmp_path / "a.csv")} == {("1", "anna"), ("no", "bob")}
    assert "--label_map" not in capsys.readouterr().err
    assert run(prepare_labelled, *flags, "maybe=2", *PATTERN, "--skip_unmatched") == 0
    assert "--label_map: no file has the label maybe" in capsys.readouterr().err
    assert run(prepare_labelled, *flags, "--pattern", r"(?P<speaker>[^_/]+)_", "--skip_unmatched") == 2
    assert "names no label" in error_line(capsys.readouterr().err)


# -- IEMOCAP, VoxCeleb


@pytest.fixture
def iemocap(tmp_path):
    """Five sessions with a dialogue of two turns each, as the release has them."""
    for number in range(1, 6):
        session, dialogue = tmp_path / "IEMOCAP_full_release" / f"Session{number}", f"Ses0{number}F_impro01"
        names = [f"{dialogue}_F000", f"{dialogue}_M000"]
        for name in names:
            write_audio(session / "sentences" / "wav" / dialogue / f"{name}.wav")
        texts = {
            "EmoEvaluation": "% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\n\n"
            f"[6.2901 - 8.2357]\t{names[0]}\tneu\t[2.5000, 2.5000, 2.5000]\nC-E2:\tNeutral;\t()\n"
            f"[8.3000 - 9.1000]\t{names[1]}\texc\t[4.0000, 3.5000, 3.0000]\n",
            "transcriptions": f"{names[0]} [006.2901-008.2357]: Excuse me.\n"
            f"{names[1]} [008.3000-009.1000]: Yeah. \nM: [LAUGHTER]\n",
        }
        for folder, text in texts.items():
            (session / "dialog" / folder).mkdir(parents=True)
            (session / "dialog" / folder / f"{dialogue}.txt").write_text(text)
            (session / "dialog" / folder / f"._{dialogue}.txt").write_bytes(b"\x00\x05\x16\x07\xb0")
    return tmp_path


def test_iemocap_rows_have_speaker_session_label_and_text(iemocap, capsys, monkeypatch):
    assert run(prepare_iemocap, iemocap, "--output", iemocap / "out" / "i.csv") == 2
    assert "10 of 10,039 utterances found" in error_line(capsys.readouterr().err)
    monkeypatch.setattr(prepare_iemocap, "KNOWN", 10)
    assert run(prepare_iemocap, iemocap, "--output", iemocap / "out" / "i.csv") == 0
    rows = {row["id"]: row for row in rows_of(iemocap / "out" / "i.csv")}
    assert len(rows) == 10
    assert {row["session"] for row in rows.values()} == set("12345")
    assert len({row["speaker"] for row in rows.values()}) == 10
    row = rows["Ses02F_impro01_M000"]
    assert (row["speaker"], row["label"], row["text"]) == ("Ses02M", "exc", "Yeah.")
    next((iemocap / "IEMOCAP_full_release" / "Session4").rglob("*.wav")).unlink()
    assert run(prepare_iemocap, iemocap, "--output", iemocap / "out" / "i.csv") == 2
    assert "1 unusable files, the first: " in error_line(capsys.readouterr().err)
    assert run(prepare_iemocap, iemocap, "--output", iemocap / "out" / "i.csv", "--allow_incomplete") == 0
    assert len(rows_of(iemocap / "out" / "i.csv")) == 9
    assert len((iemocap / "out" / "i.skipped.jsonl").read_text().splitlines()) == 1


VOXCELEB = ("1 id10001/aaa/00001.wav", "2 id10001/bbb/00001.wav", "3 id10001/ccc/00002.wav", "1 id10002/ddd/00001.wav")


def test_voxceleb_follows_the_official_split(tmp_path, capsys, monkeypatch):
    for line in VOXCELEB:
        write_audio(tmp_path / "wav" / line.split()[1])
    (tmp_path / "iden_split.txt").write_text("\n".join(VOXCELEB) + "\n")
    flags = [tmp_path / "wav", "--split", tmp_path / "iden_split.txt", "--output_dir", tmp_path / "out"]
    assert run(prepare_voxceleb, *flags) == 2
    assert "train: 2 of 138,361 utterances found; " in error_line(capsys.readouterr().err)
    monkeypatch.setattr(prepare_voxceleb, "SETS", {"1": ("train", 2), "2": ("dev", 1), "3": ("test", 1)})
    assert run(prepare_voxceleb, *flags) == 0
    for number, name in (("1", "train"), ("2", "dev"), ("3", "test")):
        found = [f"{number} {row['id']}.wav" for row in rows_of(tmp_path / "out" / f"{name}.csv")]
        assert found == [line for line in VOXCELEB if line[0] == number]
    assert [row["speaker"] for row in rows_of(tmp_path / "out" / "train.csv")] == ["id10001", "id10002"]
    (tmp_path / "wav" / "id10002" / "ddd" / "00001.wav").unlink()
    assert run(prepare_voxceleb, *flags) == 2
    assert "train: 1 unusable files, the first: " in error_line(capsys.readouterr().err)
    assert run(prepare_voxceleb, *flags, "--allow_incomplete") == 0
    assert len(rows_of(tmp_path / "out" / "train.csv")) == 1


# -- slips


@pytest.mark.parametrize(
    ("script", "command", "complaint"),
    [
        (prepare_folder, "absent --output m.csv", "No such file"),
        (prepare_folder, "bad --output m.csv", "none of 1 files can be used"),
        (prepare_folder, "flat --output m.csv --speaker_from_parent", "a.wav has no such folder above it"),
        (prepare_folder, "flat --output m.csv --valid_fraction 0.5", "cannot be split"),
        (prepare_folder, "flat --output m.csv --valid_fraction 2", "--valid_fraction: 2"),
        (prepare_folder, "flat --output m.txt", "end in .csv"),
        (prepare_labelled, "flat --output m.csv", "one of the arguments --corpus --pattern"),
        (prepare_labelled, "flat --output m.csv --pattern (", "not a regular expression"),
        (prepare_labelled, "flat --output m.csv --pattern (?P<word>.)", "neither a label nor a speaker"),
        (prepare_labelled, "flat --output m.csv --pattern (?P<label>.)(?P<audio>.)", "column audio exists already"),
        (prepare_labelled, "flat --output m.csv --corpus emodb", "1 of 1 names do not match"),
        (prepare_librispeech, "flat --output_dir m.csv", "holds none of train-clean-100"),
        (prepare_iemocap, "partial --output m.csv", "Session1"),
        (prepare_voxceleb, "flat --output_dir m.csv --split flat/split.txt", "line 1"),
        (prepare_voxceleb, "flat --output_dir m.csv --split absent.txt", "absent.txt"),
    ],
)
def test_a_slip_is_one_line_and_status_2(tmp_path, monkeypatch, capsys, script, command, complaint):
    monkeypatch.chdir(tmp_path)
    write_audio(Path("flat/a.wav"))
    Path("flat/split.txt").write_text("1 id10001/aaa/00001.wav id10002/ddd/00001.wav\n")
    Path("partial/Session3").mkdir(parents=True)
    Path("bad").mkdir()
    Path("bad/a.wav").write_bytes(b"no audio")
    assert run(script, *command.split()) == 2
    assert complaint in error_line(capsys.readouterr().err)
    assert not Path("m.csv").exists()
