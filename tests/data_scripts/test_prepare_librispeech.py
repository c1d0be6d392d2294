"""Manifests of LibriSpeech: nothing lost, and every subset that is not whole is named."""

import prepare_librispeech
import pytest
from conftest import error_line
from test_prepare import rows_of, run, write_audio

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


def test_librispeech_table_adds_up_to_960_hours():
    table = [prepare_librispeech.KNOWN[name] for name in TRAIN]
    assert sum(utterances for utterances, _ in table) == 281_241
    assert sum(hours for _, hours in table) == pytest.approx(960.9)


def test_librispeech_joins_audio_text_and_speaker(librispeech, tmp_path):
    lists = tmp_path / "lists"
    assert run(prepare_librispeech, librispeech.parent, "--output_dir", lists) == 0  # the folder above serves as well
    found = [(row["id"], row["text"], row["speaker"], row["duration"]) for row in rows_of(lists / "dev-clean.csv")]
    assert found == [(f"{s}-7-000{n}", f"WORDS OF {n}", s, "0.5") for s in ("13", "23") for n in (0, 1)]
    pieces = [row for subset in TRAIN for row in rows_of(lists / f"{subset}.csv")]
    assert rows_of(lists / "train-960.csv") == pieces and len(pieces) == 12
    assert not (lists / "test-clean.csv").exists()


def test_an_incomplete_subset_needs_permission(librispeech, tmp_path, capsys):
    lists = tmp_path / "lists"
    lost = librispeech / "train-clean-360" / "11" / "7" / "11-7-0001.flac"
    lost.unlink()
    assert run(prepare_librispeech, librispeech, "--output_dir", lists) == 2
    error = error_line(capsys.readouterr().err)
    assert "train-clean-360: 3 of 4 utterances" in error and "11-7-0001" in error and "--allow_incomplete" in error
    assert {path.stem for path in lists.glob("*.csv")} == {TRAIN[0], TRAIN[2], "dev-clean"}
    assert run(prepare_librispeech, librispeech, "--output_dir", lists, "--allow_incomplete") == 0
    assert "warning: lists/train-clean-360" in capsys.readouterr().err
    assert len(rows_of(lists / "train-960.csv")) == 11


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("13-7-0000.flac", b"cut off", "1 unusable files, the first: "),
        ("13-7.trans.txt", b"13-7-0000 ONLY ONE\n", "1 utterances without transcript, the first: 13-7-0001"),
        ("13-7.trans.txt", b"\xff\xfe\n", "is not UTF-8"),
    ],
)
def test_a_spoilt_file_of_librispeech_is_named(librispeech, tmp_path, capsys, name, content, complaint):
    (librispeech / "dev-clean" / "13" / "7" / name).write_bytes(content)
    assert run(prepare_librispeech, librispeech, "--output_dir", tmp_path / "lists") == 2
    assert complaint in error_line(capsys.readouterr().err)


def test_librispeech_hours_are_checked_where_known(librispeech, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(prepare_librispeech.KNOWN, "train-clean-100", (4, 1.5))
    assert run(prepare_librispeech, librispeech, "--output_dir", tmp_path / "lists") == 2
    assert "train-clean-100: 0.0 hours found where 1.5 are expected" in error_line(capsys.readouterr().err)
