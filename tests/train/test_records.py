"""Lines that a full disk does not lose and a resumed run cuts back; /dev/full is a disk that is always full."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_run import file_size_limit

from w2v2.errors import UserError
from w2v2.train.records import SkippedAudio, StepRecords, json_line

pytestmark = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")


def steps(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def fill(path):
    """The disk is full from now on, until `free`."""
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/full")


def free(path):
    path.unlink()
    path.touch()


@pytest.fixture
def records(tmp_path):
    return StepRecords(tmp_path / "lines")


def test_lines_wait_for_room(records, caplog):
    fill(records.path)
    records.append({"step": 1})
    records.append({"step": 2})
    free(records.path)
    records.append({"step": 3})
    records.append({"step": 4})
    assert steps(records.path) == [1, 2, 3, 4]
    (warning,) = caplog.messages
    assert "No space left on device" in warning and str(records.path) in warning


def test_a_line_goes_on_where_the_disk_cut_it(records):
    records.append({"step": 1, "id": "é"})
    size = records.path.stat().st_size
    for room in (3, 18, 21):  # within the first line, within its é, within the second
        with file_size_limit(size + room):
            records.append({"step": 2, "id": "é"})
            assert records.path.stat().st_size == size + room
    records.sync()
    assert steps(records.path) == [1, 2, 2, 2]


def test_a_sync_waits_for_the_disk_and_needs_no_further_line(records, monkeypatch):
    synced, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (synced.append(os.fstat(file).st_size), fsync(file)))
    fill(records.path)
    records.append({"step": 1})
    free(records.path)
    records.sync()
    assert steps(records.path) == [1] and synced == [len('{"step": 1}\n')]


@pytest.mark.parametrize("torn", [b"", b'{"step": 3, "id": "\xc3', bytes(9)])
def test_a_resumed_run_keeps_the_lines_up_to_its_checkpoint(tmp_path, torn):
    path = tmp_path / "lines"
    line = '{"step": 2,  "loss": 0.10}\n'  # as no encoder of ours writes it
    path.write_bytes(b'{"step": 0}\n{"step": 1, "id": "x"}\n' + 2 * line.encode() + b'{"step": 3}\n' + torn)
    others = StepRecords(path, 2, is_main=False)
    records = StepRecords(path, 2, head=[{"step": 0, "id": "x"}])
    assert path.read_text() == '{"step": 0, "id": "x"}\n' + line + line
    assert [record["step"] for record in records.kept] == [0, 2, 2]
    assert [record["step"] for record in others.kept] == [1, 2, 2]
    StepRecords(path)
    assert path.read_bytes() == b""
    assert os.listdir(tmp_path) == ["lines"]


def test_other_processes_write_nothing(tmp_path):
    records = StepRecords(tmp_path / "lines", is_main=False)
    records.append({"step": 1})
    records.sync()
    assert not records.path.exists()


def test_a_line_is_strict_json_in_any_alphabet():
    line = json_line({"step": 1, "loss": float("nan"), "grad_norm": float("-inf"), "id": "ü\u2028\n"})
    assert line.count(b"\n") == 1 and line.endswith(b"\n") and "ü".encode() in line
    assert json.loads(line) == {"step": 1, "loss": None, "grad_norm": None, "id": "ü\u2028\n"}


def build(folder, num_utterances=100, max_fraction=0.5, found=(), first_step=0):
    args = SimpleNamespace(output_dir=folder, max_skipped_fraction=max_fraction)
    return SkippedAudio(args, SimpleNamespace(is_main_process=True), num_utterances, found, first_step)


def entries(*names):
    return [{"id": name, "audio": f"{name}.wav", "reason": "torn"} for name in names]


def test_skipped_audio_is_counted_beside_a_full_disk(tmp_path, caplog):
    skipped = build(tmp_path)
    fill(skipped.records.path)
    skipped.add(entries("a"), step=2)
    assert skipped.ids == {"a"} and "No space left on device" in caplog.text
    free(skipped.records.path)
    skipped.add(entries("b", "a"), step=3)
    assert build(tmp_path, first_step=3).ids == {"a", "b"}


def test_skipped_audio_is_listed_once_and_as_uninterrupted(tmp_path):
    whole = build(tmp_path, found=entries("a", "b", "a"))
    whole.add(entries("c", "a"), step=4)
    expected = whole.records.path.read_bytes()
    assert [json.loads(line)["id"] for line in expected.splitlines()] == ["a", "b", "c"]
    whole.add(entries("d"), step=6)
    again = build(tmp_path, first_step=5, found=entries("a", "b"))
    assert again.records.path.read_bytes() == expected and again.ids == {"a", "b", "c"}


def test_the_first_skipped_file_and_ten_times_more_are_told(tmp_path, caplog):
    skipped = build(tmp_path)
    for number in range(25):
        skipped.add(entries(f"{number}"), step=number + 1)
    first, more = caplog.messages
    assert "--train_data: 1 of 100 files cannot be read so far" in first and str(skipped.records.path) in first
    assert "11 of 100" in more
    assert (
        build(tmp_path, first_step=20).ids == {str(number) for number in range(20)}
        and "20 of 100" in caplog.messages[2]
    )


def test_too_much_skipped_audio_ends_the_run(tmp_path):
    with pytest.raises(UserError, match=r"a\.wav: torn; 2 of 10 files.*--max_skipped_fraction 0.1"):
        build(tmp_path, 10, 0.1, found=entries("a", "b"))
    skipped = build(tmp_path, 10, 0.1, found=entries("a"))
    with pytest.raises(UserError, match=r"b\.wav: torn"):
        skipped.add(entries("b"), step=1)
