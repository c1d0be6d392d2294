"""Manifests of VoxPopuli: unlabelled speech without the sessions of dev and test, and transcribed speech."""

from pathlib import Path

import prepare_voxpopuli
import pytest
import yaml
from conftest import error_line
from corpora import TRANSCRIBED, cut_segments, replace
from test_prepare import rows_of, run

from w2v2.manifests.manifest import read_manifests

pytestmark = pytest.mark.usefixtures("in_process")


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
        ("transcribed_data/en/asr_test.tsv", Path.unlink, "en/unlabelled: 1 missing lists, so their sessions cannot be kept out of pretraining, the first: asr_test.tsv"),
        ("transcribed_data/en/asr_dev.tsv", replace("\ta word", "\t"), "en/dev: 1 utterances without transcript"),
        ("transcribed_data/en/2018", lambda path: next(path.iterdir()).unlink(), "en/dev: 1 unusable files"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_voxpopuli_is_named(voxpopuli, tmp_path, capsys, name, spoil, complaint):
    spoil(voxpopuli / name)
    assert run(prepare_voxpopuli, voxpopuli, "--output_dir", tmp_path / "lists") == 2
    assert complaint in error_line(capsys.readouterr().err.splitlines()[-1] + "\n")
    assert run(prepare_voxpopuli, voxpopuli, "--output_dir", tmp_path / "lists", "--allow_incomplete") == 0
