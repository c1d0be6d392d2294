"""Lines that a full disk does not lose; /dev/full is a disk that is always full."""

import io
import logging
import os
import threading
from pathlib import Path

import pytest
from tiny_run import file_size_limit

from w2v2.train.line_file import LineFile
from w2v2.train.log import RunLog, read_metrics
from w2v2.train.plan import SkippedAudio

pytestmark = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")


@pytest.fixture
def full(tmp_path):
    """A path whose disk is full until `free` puts a file there."""
    path = tmp_path / "lines"
    path.symlink_to("/dev/full")
    return path


def free(path):
    path.unlink()
    path.touch()


def test_lines_wait_for_room(full, caplog):
    file = LineFile(full)
    file.append("1\n")
    file.append("2\n")
    free(full)
    file.append("3\n")
    file.append("4\n")
    assert full.read_text() == "1\n2\n3\n4\n"
    first, last = (record.getMessage() for record in caplog.records)
    assert "No space left on device" in first and str(full) in first and "no line is missing" in last


def test_a_line_goes_on_where_the_disk_cut_it(tmp_path):
    file = LineFile(tmp_path / "lines")
    with file_size_limit(7):
        file.append("12345\n")
        file.append("abcdé\n")
        assert (tmp_path / "lines").read_text() == "12345\na"
    file.append("67\n")
    assert (tmp_path / "lines").read_text() == "12345\nabcdé\n67\n"


def test_a_flush_needs_no_further_line_and_waits_for_the_disk(full, monkeypatch):
    synced, fsync = [], os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: (synced.append(os.fstat(descriptor).st_size), fsync(descriptor))
    )
    file = LineFile(full)
    file.append("1\n")
    file.flush()
    free(full)
    file.flush()
    assert full.read_text() == "1\n" and synced == [2]
    file.flush()  # nothing is left to wait for
    assert synced == [2]
    file.append("2\n")
    file.close()
    assert synced == [2, 4]


def test_a_flush_of_no_lines_makes_no_file(tmp_path):
    file = LineFile(tmp_path / "lines")
    file.flush()
    file.close()
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fails_at_a_flush_is_a_warning_and_waited_for_at_the_next(tmp_path, monkeypatch, caplog):
    def fail(descriptor):
        raise OSError(5, "Input/output error")

    file = LineFile(tmp_path / "lines")
    file.append("1\n")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        file.flush()
    assert "Input/output error" in caplog.text
    synced = []
    monkeypatch.setattr(os, "fsync", synced.append)
    file.flush()
    assert len(synced) == 1 and (tmp_path / "lines").read_text() == "1\n"


def test_what_is_never_written_is_said_to_be_lost(full, caplog):
    file = LineFile(full)
    file.append("1\n")
    file.close()
    assert "lost" in caplog.text
    free(full)
    file.close()
    assert full.read_text() == ""


def test_a_run_goes_on_logging_beside_a_full_disk(tmp_path, full, caplog):
    class Trackers:
        seen = []

        def log(self, values, step):
            self.seen.append(step)
            raise OSError(28, "No space left on device")

    caplog.set_level(logging.WARNING)
    metrics = tmp_path / "run" / "metrics.jsonl"
    log = RunLog(tmp_path / "run", total_steps=4, trackers=Trackers())
    metrics.unlink()
    metrics.symlink_to("/dev/full")
    for step in (1, 2):
        log.write({"step": step, "loss": 0.5})
    free(metrics)
    log.write({"step": 3, "loss": 0.5})
    log.close()
    assert [record["step"] for record in read_metrics(metrics)] == [1, 2, 3]
    assert Trackers.seen == [1] and "trackers cannot write (No space left on device)" in caplog.text


def test_a_thread_that_ends_of_a_full_disk_says_so_in_a_line(tmp_path, caplog, capsys, monkeypatch):
    """As TensorBoard's does; a bug keeps its traceback."""

    def run(error):
        def fail():
            raise error

        thread = threading.Thread(target=fail, name="writer")
        thread.start()
        thread.join()

    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    RunLog(tmp_path, total_steps=4).close()
    run(OSError(28, "No space left on device", "events"))
    assert capsys.readouterr().err == ""
    (record,) = caplog.records
    assert record.getMessage() == "writer has ended: events: No space left on device"
    run(ZeroDivisionError())
    assert "Traceback" in capsys.readouterr().err


def test_skipped_audio_is_counted_beside_a_full_disk(tmp_path, caplog):
    path = tmp_path / "skipped_audio.jsonl"
    skipped = SkippedAudio(tmp_path, 100, 0.5)
    path.symlink_to("/dev/full")
    skipped.add([{"id": "a", "audio": "a.wav", "reason": "torn"}], step=2)
    assert skipped.ids == {"a"} and "No space left on device" in caplog.text
    free(path)
    skipped.add([{"id": "b", "audio": "b.wav", "reason": "torn"}], step=3)
    assert SkippedAudio(tmp_path, 100, 0.5, first_step=3).ids == {"a", "b"}


@pytest.mark.parametrize("refusing", ["close", "fsync"])
def test_a_disk_that_refuses_late_loses_no_line_and_doubles_none(tmp_path, monkeypatch, caplog, refusing):
    """As file servers and quotas do: what was written is thrown away when the file is closed or synced."""
    path, is_full = tmp_path / "lines", [False]

    class Late(io.FileIO):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.size_before = os.fstat(self.fileno()).st_size

        def close(self):
            refused = is_full[0] and refusing == "close" and not self.closed
            if refused:
                os.truncate(path, self.size_before + 1)  # a part of it arrived
            super().close()
            if refused:
                raise OSError(28, "No space left on device")

    def fsync(descriptor):
        if is_full[0] and refusing == "fsync":
            os.truncate(path, 3)
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("w2v2.train.line_file.open", lambda path, mode, buffering: Late(path, "ab"), raising=False)
    monkeypatch.setattr(os, "fsync", fsync)
    file = LineFile(path)
    file.append("a\n")
    file.flush()
    for line, full in (("b\n", False), ("c\n", True), ("d\n", True)):
        is_full[0] = full
        file.append(line)
    file.flush()
    is_full[0] = False
    file.append("e\n")
    file.close()
    assert path.read_text() == "a\nb\nc\nd\ne\n"
    assert len([line for line in caplog.messages if "No space left" in line]) == 1


def test_good_lines_stay_in_the_file_when_a_later_one_is_refused(tmp_path):
    path = tmp_path / "lines"
    file = LineFile(path)
    file.append("12345\n")
    with file_size_limit(7):
        for _ in range(3):
            file.append("67\n")
            assert path.read_text().startswith("12345\n")
    file.flush()
    assert path.read_text() == "12345\n67\n67\n67\n"
