"""One run at a time in a folder, none overwritten unasked; a restarted attempt goes on with what its launch began."""

import os
import signal
import threading
import time
from contextlib import contextmanager, suppress

import pytest
from safetensors.numpy import save
from tiny_run import names, prepare

from w2v2.errors import UserError
from w2v2.train import run_folder
from w2v2.train.checkpoint import FILES
from w2v2.train.run_folder import lock_folder


@contextmanager
def another_process(folder):
    """A run in `folder`, in a process of its own; killed at the end."""
    ready, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        with suppress(BaseException):
            prepare(folder)
            os.write(told, b"x")
            time.sleep(600)
        os._exit(1)
    os.close(told)
    assert os.read(ready, 1)
    try:
        yield pid
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def leave_run(folder, *steps):
    """What a run leaves after some updates, with whole checkpoints after these."""
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("{}\n")
    for step in steps:
        for name in FILES:
            path = folder / f"checkpoint-{step}" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(save({}) if name.endswith(".safetensors") else b"{}")


# The lock


def test_a_folder_that_another_process_writes_is_refused(tmp_path):
    with another_process(tmp_path / "run") as pid:
        with pytest.raises(UserError, match=f"being written by process {pid} on {os.uname().nodename}"):
            lock_folder(tmp_path / "run", wait_seconds=0.1)


def test_a_run_that_is_just_killed_is_waited_for(tmp_path):
    with another_process(tmp_path) as pid:
        threading.Timer(0.5, os.kill, (pid, signal.SIGKILL)).start()
        assert lock_folder(tmp_path)["pid"] == pid


def test_a_folder_that_cannot_be_written_is_a_slip(tmp_path):
    (tmp_path / "file").write_text("")
    for dry_run in (False, True):
        with pytest.raises(UserError, match="is a file"):
            prepare(tmp_path / "file" / "run", dry_run=dry_run)
    with pytest.raises(UserError, match="cannot be written"):
        prepare("/proc/run")


# The flags


def test_a_run_is_overwritten_only_when_asked(tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    leave_run(run, 4)
    leave_run(other, 2)
    for resume in (None, other / "checkpoint-2"):
        with pytest.raises(UserError, match="already holds a run.*--overwrite_output_dir"):
            prepare(run, resume)
    for resume, overwrite in (("auto", False), (run / "checkpoint-4", False), (run / "checkpoint-4", True)):
        assert prepare(run, resume, overwrite) == run / "checkpoint-4"
    assert names(run) == ["checkpoint-4", "metrics.jsonl"]
    assert prepare(run, other / "checkpoint-2", overwrite=True) == other / "checkpoint-2"
    assert names(run) == []
    leave_run(run, 4)
    for name in ("skipped_audio.jsonl", "non_finite_updates.jsonl"):
        (run / name).touch()
    assert prepare(run, "auto", overwrite=True) is None  # `auto` may stand in a YAML file
    assert names(run) == []


def test_a_run_does_not_go_back_behind_a_newer_checkpoint(tmp_path):
    leave_run(tmp_path / "run", 2, 4)
    older = tmp_path / "run" / "checkpoint-2"
    with pytest.raises(UserError, match="checkpoint-4 is newer"):
        prepare(tmp_path / "run", older)
    assert prepare(tmp_path / "elsewhere", older) == older


def test_a_dry_run_changes_nothing(tmp_path):
    leave_run(tmp_path / "run", 2)
    for flags in (dict(overwrite=True), dict(resume="auto"), {}):
        assert prepare(tmp_path / "run", dry_run=True, **flags) is None
        assert prepare(tmp_path / "absent", dry_run=True, **flags) is None
    assert os.listdir(tmp_path) == ["run"] and names(tmp_path / "run") == ["checkpoint-2", "metrics.jsonl"]


@pytest.mark.parametrize("flag", ["model_name_or_path", "config_name"])
@pytest.mark.parametrize("source", ["checkpoint-2", "."])
@pytest.mark.parametrize("resume", [None, "auto"])
def test_overwriting_spares_what_the_run_starts_from(tmp_path, resume, source, flag):
    run = tmp_path / "run"
    leave_run(run, 2, 4)
    with pytest.raises(UserError, match=f"holds .*--{flag}"):
        prepare(run, resume, overwrite=True, **{flag: str(run / source)})
    assert names(run) == ["checkpoint-2", "checkpoint-4", "metrics.jsonl"]
    prepare(tmp_path / "other", overwrite=True, **{flag: str(run / source)})
    prepare(run, overwrite=True, **{flag: "facebook/wav2vec2-base"})
    assert names(run) == []


# Restarts


def attempt(monkeypatch, number, launch="job 1", told_elsewhere=False):
    """What a launcher that restarts tells its processes."""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(number))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", launch)
    monkeypatch.setattr(run_folder, "gather_object", lambda mine: [*mine, mine[0] or told_elsewhere])


@pytest.mark.parametrize("resume", [None, "auto", "elsewhere"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_restarted_attempt_goes_on_whatever_the_flags_say(tmp_path, monkeypatch, resume, overwrite):
    run, source = tmp_path / "run", None
    if resume == "elsewhere":
        leave_run(tmp_path / "elsewhere", 7)
        resume = source = tmp_path / "elsewhere/checkpoint-7"
    if overwrite:
        leave_run(run, 9)  # of long ago
    attempt(monkeypatch, 0)
    assert prepare(run, resume, overwrite) == source
    leave_run(run)  # killed before its first checkpoint
    attempt(monkeypatch, 1)
    assert prepare(run, resume, overwrite) == source
    leave_run(run, 2)
    (run / ".unfinished-checkpoint-4").mkdir()
    attempt(monkeypatch, 0, told_elsewhere=True)  # of several machines, one counts it
    assert prepare(run, resume, overwrite) == run / "checkpoint-2"
    assert names(run) == ["checkpoint-2", "metrics.jsonl"]


def test_a_restart_of_a_launch_that_was_refused_is_refused(tmp_path, monkeypatch):
    run = tmp_path / "run"
    attempt(monkeypatch, 0, launch="none")
    prepare(run)
    leave_run(run, 2)
    for number in range(3):  # of the next launch, whose name is no other
        attempt(monkeypatch, number, launch="none")
        with pytest.raises(UserError, match="already holds a run"):
            prepare(run)
    assert names(run) == ["checkpoint-2", "metrics.jsonl"]


def test_a_restart_of_another_launch_obeys_the_flags(tmp_path, monkeypatch):
    run = tmp_path / "run"
    attempt(monkeypatch, 0, launch="job 1")
    prepare(run)
    leave_run(run, 2)
    attempt(monkeypatch, 1, launch="job 2")
    with pytest.raises(UserError, match="already holds a run"):
        prepare(run)
    assert prepare(run, overwrite=True) is None and names(run) == []
