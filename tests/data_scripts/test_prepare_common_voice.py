"""Manifests of Common Voice: its own splits, and pretraining that hears none of dev and test."""

from pathlib import Path

import prepare_common_voice
import pytest
import yaml
from conftest import error_line
from corpora import replace
from test_prepare import rows_of, run

from w2v2.audio.crops import SAMPLING_RATE, measure_length
from w2v2.manifests.sources import read_sources

pytestmark = pytest.mark.usefixtures("in_process")


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
        assert "sw: no clip_durations.tsv can be used" in capsys.readouterr().err
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


LEAK = "missing lists, so their clips and speakers cannot be kept out of pretraining, the first: test.tsv"


@pytest.mark.parametrize(
    ("name", "spoil", "complaints", "left"),
    [
        ("clips", empty, ["sw/train: 1 unusable files", "sw/pretrain: 3 unusable files", "sw_1.mp3: does not exist"], {}),
        ("clips/common_voice_sw_7.mp3", lambda path: path.write_bytes(b""), ["sw_7.mp3: is an empty file"], {"pretrain": [1, 2]}),
        ("clips/common_voice_sw_7.mp3", lambda path: path.write_bytes(b"\x00" * 999), ["sw_7.mp3: "], {"pretrain": [1, 2]}),
        ("clip_durations.tsv", replace("\t2000", "\t2"), ["sw_7.mp3: lasts 2.0", "its list says 0.00 s"], {"pretrain": [1, 2]}),
        ("clip_durations.tsv", replace("\t2000", "\t9000"), ["its list says 9.00 s"], {"pretrain": [1, 2]}),
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
