"""Manifests of Libri-Light: recordings cut where speech pauses, nothing lost, nothing twice."""

from collections import defaultdict
from pathlib import Path

import numpy as np
import prepare_libri_light
import pytest
from conftest import error_line
from corpora import CUT
from test_prepare import rows_of, run, write_audio

from w2v2.manifests.manifest import read_manifests

pytestmark = pytest.mark.usefixtures("in_process")


def test_libri_light_cuts_recordings_where_its_speech_pauses(libri_light, tmp_path, capsys):
    lists = tmp_path / "lists"
    flags = ["--most_seconds", "12", "--most_pause", "0.75"]
    assert run(prepare_libri_light, libri_light, "--output_dir", lists, *flags) == 0
    assert "small: 1 of 3 recordings hold no speech, according to their .json" in capsys.readouterr().err
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
        (f"{SMALL}.flac", lambda path: write_audio(path, 20.0), "lasts 20.00 s, but its list says 38.00 s"),
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
