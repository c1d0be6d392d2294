"""Manifests of labelled corpora, from small trees laid out like them."""

import csv

import numpy as np
import prepare_iemocap
import prepare_labelled
import prepare_voxceleb
import pytest
import soundfile


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_audio(path, seconds=0.25):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.zeros(round(16_000 * seconds)), 16_000)


def one_line(capsys):
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Traceback" not in error
    return error


def test_emodb_names_say_speaker_and_emotion(tmp_path):
    for name in ("03a01Fa", "16b10Wb", "11a02Tc"):
        write_audio(tmp_path / "wav" / f"{name}.wav")
    flags = [str(tmp_path / "wav"), "--output", str(tmp_path / "emodb.csv"), "--corpus", "emodb"]
    assert prepare_labelled.main(flags) == 0
    rows = {row["id"]: row for row in rows_of(tmp_path / "emodb.csv")}
    assert {name: (row["speaker"], row["sentence"], row["label"]) for name, row in rows.items()} == {
        "03a01Fa.wav": ("03", "a01", "happiness"),
        "11a02Tc.wav": ("11", "a02", "sadness"),
        "16b10Wb.wav": ("16", "b10", "anger"),
    }
    assert all((tmp_path / row["audio"]).is_file() and float(row["duration"]) == 0.25 for row in rows.values())


def test_ravdess_names_say_speaker_and_emotion(tmp_path):
    write_audio(tmp_path / "Actor_12" / "03-01-06-01-02-01-12.wav")
    flags = [str(tmp_path), "--output", str(tmp_path / "r.csv"), "--corpus", "ravdess"]
    assert prepare_labelled.main(flags) == 0
    (row,) = rows_of(tmp_path / "r.csv")
    assert (row["label"], row["speaker"], row["intensity"]) == ("fearful", "12", "01")


def test_any_pattern_over_the_path_makes_columns(tmp_path, capsys):
    write_audio(tmp_path / "a" / "yes" / "anna_1.wav")
    write_audio(tmp_path / "a" / "no" / "bob_2.wav")
    write_audio(tmp_path / "a" / "no" / "unnamed.wav")
    flags = [str(tmp_path / "a"), "--output", str(tmp_path / "a.csv"), "--label_map", "yes=1",
             "--pattern", r"(?P<label>[^/]+)/(?P<speaker>[^_/]+)_"]  # fmt: skip
    assert prepare_labelled.main(flags) == 2
    assert "1 of 3 names do not match the pattern, such as no/unnamed.wav" in one_line(capsys)
    assert prepare_labelled.main([*flags, "--skip_unmatched"]) == 0
    assert {(row["label"], row["speaker"]) for row in rows_of(tmp_path / "a.csv")} == {("1", "anna"), ("no", "bob")}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "one of --corpus and --pattern"),
        (["--pattern", "("], "no regular expression"),
        (["--pattern", "(?P<word>.)"], "neither a label nor a speaker"),
        (["--pattern", "(?P<label>.)(?P<audio>.)"], "audio is taken"),
        (["--pattern", "(?P<label>x)", "--label_map", "x"], "--label_map 'x'"),
        (["--corpus", "emodb"], "1 of 1 names do not match"),
    ],
)
def test_a_pattern_that_cannot_serve_is_refused(tmp_path, capsys, flags, message):
    write_audio(tmp_path / "audio" / "a.wav")
    assert prepare_labelled.main([str(tmp_path / "audio"), "--output", str(tmp_path / "a.csv"), *flags]) == 2
    assert message in one_line(capsys)


def write_iemocap(root, skip_session=None):
    """Five sessions with a dialogue of two turns each, as the release has them."""
    for number in range(1, 6):
        if number == skip_session:
            continue
        session, dialogue = root / f"Session{number}", f"Ses0{number}F_impro01"
        names = [f"{dialogue}_F000", f"{dialogue}_M000"]
        for name in names:
            write_audio(session / "sentences" / "wav" / dialogue / f"{name}.wav", 0.5)
        for folder in ("EmoEvaluation", "transcriptions"):
            (session / "dialog" / folder).mkdir(parents=True)
        (session / "dialog" / "EmoEvaluation" / f"{dialogue}.txt").write_text(
            "% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\n\n"
            f"[6.2901 - 8.2357]\t{names[0]}\tneu\t[2.5000, 2.5000, 2.5000]\nC-E2:\tNeutral;\t()\n"
            f"[8.3000 - 9.1000]\t{names[1]}\texc\t[4.0000, 3.5000, 3.0000]\n"
        )
        (session / "dialog" / "EmoEvaluation" / f"._{dialogue}.txt").write_bytes(b"\x00\x05\x16\x07\xb0")
        (session / "dialog" / "transcriptions" / f"{dialogue}.txt").write_text(
            f"{names[0]} [006.2901-008.2357]: Excuse me.\n{names[1]} [008.3000-009.1000]: Yeah. \nM: [LAUGHTER]\n"
        )


def test_iemocap_rows_have_speaker_session_label_and_text(tmp_path, capsys):
    write_iemocap(tmp_path / "IEMOCAP_full_release")
    assert prepare_iemocap.main([str(tmp_path), "--output", str(tmp_path / "out" / "i.csv")]) == 0
    rows = rows_of(tmp_path / "out" / "i.csv")
    assert len(rows) == 10 and "10 utterances, where the full release has 10,039" in capsys.readouterr().err
    assert {row["session"] for row in rows} == set("12345")
    assert len({row["speaker"] for row in rows}) == 10
    first = next(row for row in rows if row["id"] == "Ses02F_impro01_M000")
    assert (first["speaker"], first["label"], first["text"]) == ("Ses02M", "exc", "Yeah.")
    assert all((tmp_path / "out" / row["audio"]).is_file() for row in rows)


def test_an_incomplete_iemocap_is_refused_by_name(tmp_path, capsys):
    assert prepare_iemocap.main([str(tmp_path), "--output", str(tmp_path / "i.csv")]) == 2
    assert "Session1" in one_line(capsys)
    write_iemocap(tmp_path / "a", skip_session=3)
    assert prepare_iemocap.main([str(tmp_path / "a"), "--output", str(tmp_path / "i.csv")]) == 2
    assert "Session3" in one_line(capsys)
    write_iemocap(tmp_path / "b")
    next((tmp_path / "b" / "Session4").rglob("*.wav")).unlink()
    assert prepare_iemocap.main([str(tmp_path / "b"), "--output", str(tmp_path / "i.csv")]) == 2
    assert "1 of 10 evaluated utterances" in one_line(capsys)


VOXCELEB = {"1 id10001/aaa/00001.wav", "2 id10001/bbb/00001.wav", "3 id10001/ccc/00002.wav", "1 id10002/ddd/00001.wav"}


def write_voxceleb(folder):
    for line in VOXCELEB:
        write_audio(folder / "wav" / line.split()[1])
    (folder / "iden_split.txt").write_text("\n".join(sorted(VOXCELEB)) + "\n")
    return [str(folder / "wav"), "--split", str(folder / "iden_split.txt"), "--output_dir", str(folder / "out")]


def test_voxceleb_follows_the_official_split(tmp_path, capsys):
    assert prepare_voxceleb.main(write_voxceleb(tmp_path)) == 0
    found = {(name, row["id"], row["speaker"]) for name in ("train", "dev", "test") for row in rows_of(tmp_path / "out" / f"{name}.csv")}  # fmt: skip
    assert found == {
        ("train", "id10001/aaa/00001", "id10001"),
        ("train", "id10002/ddd/00001", "id10002"),
        ("dev", "id10001/bbb/00001", "id10001"),
        ("test", "id10001/ccc/00002", "id10001"),
    }
    assert "138,361" in capsys.readouterr().err


def test_an_incomplete_voxceleb_is_refused(tmp_path, capsys):
    flags = write_voxceleb(tmp_path)
    (tmp_path / "wav" / "id10002" / "ddd" / "00001.wav").unlink()
    assert prepare_voxceleb.main(flags) == 2
    assert "1 of 4 utterances" in one_line(capsys)
    assert prepare_voxceleb.main([*flags, "--allow_incomplete"]) == 0
    assert len(rows_of(tmp_path / "out" / "train.csv")) == 1
    capsys.readouterr()
    (tmp_path / "iden_split.txt").write_text("1 id10001/aaa/00001.wav id10002/ddd/00001.wav\n")
    assert prepare_voxceleb.main(flags) == 2
    assert "line 1" in one_line(capsys)
