"""What holds for every corpus: the same bytes twice, a killed run goes on, one line for what cannot be read."""

import csv
import gzip
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import prepare_common_voice
import prepare_libri_light
import prepare_librispeech
import prepare_voxpopuli
import pytest
from conftest import error_line
from corpora import replace
from test_prepare import run, write_audio


def contents(folder: Path) -> dict[str, bytes]:
    """What a script wrote, but what it keeps for an interrupted run."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.usefixtures("in_process")
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


def test_the_same_tree_gives_the_same_bytes(release, libri_light, voxpopuli, tmp_path):
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


def test_a_killed_run_goes_on_where_it_was(tmp_path, monkeypatch):
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


@pytest.mark.usefixtures("in_process")
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
