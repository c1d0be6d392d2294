"""One run at a time in a folder; a restarted attempt goes on with what its launch began, and with nothing else."""

import json
import os
import signal
import threading
import time
from contextlib import contextmanager, suppress
from types import SimpleNamespace

import pytest
from safetensors.numpy import save

from w2v2.errors import UserError
from w2v2.train import run_folder
from w2v2.train.resuming import _FILES
from w2v2.train.run_folder import LOCK_FILE, NOTE_BYTES, claim, lock


@contextmanager
def another_process(folder, *, with_child=False):
    """A process that has locked `folder`, perhaps with a child that outlives it; killed at the end."""
    ready, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            lock(folder)
            child = os.fork() if with_child else 1
            if child:
                os.write(told, b"%d" % child)
            time.sleep(600)
        finally:
            os._exit(1)
    os.close(told)
    child = int(os.read(ready, 20))
    try:
        yield pid
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(pid, 0)
        if with_child:
            os.kill(child, 0)  # still there
            os.kill(child, signal.SIGKILL)


def test_a_folder_that_another_process_writes_is_refused_with_its_name(tmp_path):
    with another_process(tmp_path / "run") as pid:
        with pytest.raises(UserError, match=f"being written by process {pid} on {os.uname().nodename}"):
            lock(tmp_path / "run", wait_seconds=0.1)


def test_a_killed_run_leaves_its_folder_free_at_once_even_where_its_loaders_live_on(tmp_path):
    with another_process(tmp_path, with_child=True) as pid:
        os.kill(pid, signal.SIGKILL)
        assert lock(tmp_path)["pid"] == pid


def test_a_run_that_is_just_ending_is_waited_for(tmp_path):
    with another_process(tmp_path) as pid:
        threading.Timer(0.5, os.kill, (pid, signal.SIGKILL)).start()
        assert lock(tmp_path)["pid"] == pid


def test_a_folder_that_cannot_be_written_is_a_slip(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        lock(tmp_path / "file")


def attempt(monkeypatch, number, launch="job 1", agent="A", others=()):
    """What a launcher tells the main process, counting restarts; `others` are ranks elsewhere, as (whether counted, agent)."""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(number))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", launch)
    monkeypatch.setattr(run_folder, "agent", lambda: agent)
    monkeypatch.setattr(run_folder, "gather_object", lambda mine: [*mine, *others])


def claimed(folder, resume=None, overwrite=False, **source):
    args = SimpleNamespace(
        output_dir=str(folder), overwrite_output_dir=overwrite, resume_from_checkpoint=resume, dry_run=False
    )
    args.model_name_or_path, args.config_name = source.get("model_name_or_path"), source.get("config_name")
    claim(args, SimpleNamespace(is_main_process=True))
    return args.resume_from_checkpoint


def leave_run(folder, *steps):
    """What a run leaves after some updates, with whole checkpoints after these."""
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("{}\n")
    for step in steps:
        for name in _FILES:
            path = folder / f"checkpoint-{step}" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(save({}) if name.endswith(".safetensors") else b"{}")


@pytest.mark.parametrize("resume", [None, "auto", "elsewhere"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_restarted_attempt_goes_on_whatever_the_flags_say(tmp_path, monkeypatch, resume, overwrite):
    run, other = tmp_path / "run", tmp_path / "elsewhere"
    leave_run(other, 7)
    resume = str(other / "checkpoint-7") if resume == "elsewhere" else resume
    attempt(monkeypatch, 0)
    assert claimed(run, resume, overwrite) == resume
    leave_run(run)  # killed before its first checkpoint
    attempt(monkeypatch, 1)
    assert claimed(run, resume, overwrite) == (resume or "auto")
    leave_run(run, 2)
    (run / ".unfinished-checkpoint-4").mkdir()
    attempt(monkeypatch, 2)
    assert claimed(run, resume, overwrite) == "auto"
    assert sorted(path.name for path in run.iterdir()) == [LOCK_FILE, "checkpoint-2", "metrics.jsonl"]


def test_an_attempt_whose_launch_had_not_come_that_far_does_as_the_flags_say(tmp_path, monkeypatch):
    """Its first attempt died before it took the folder: what is there is the run of somebody else."""
    leave_run(tmp_path / "run", 2)
    attempt(monkeypatch, 0, launch="job 0", agent="B")
    claimed(tmp_path / "run", "auto")
    attempt(monkeypatch, 1, launch="job 1")
    with pytest.raises(UserError, match="already holds a run"):
        claimed(tmp_path / "run")
    # The refusal is no claim.
    with pytest.raises(UserError, match="already holds a run"):
        claimed(tmp_path / "run")
    claimed(tmp_path / "run", overwrite=True)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK_FILE]


def test_a_new_launch_is_no_restart(tmp_path, monkeypatch):
    attempt(monkeypatch, 0)
    claimed(tmp_path / "run")
    leave_run(tmp_path / "run", 2)
    attempt(monkeypatch, 0, agent="B")  # the same `--rdzv_id` once more
    with pytest.raises(UserError, match="already holds a run"):
        claimed(tmp_path / "run")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")  # without a launcher
    with pytest.raises(UserError, match="already holds a run"):
        claimed(tmp_path / "run")
    claimed(tmp_path / "run", overwrite=True)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK_FILE]


RESTARTS = {
    "counted elsewhere": dict(agent="A", others=[(True, "B")]),
    "counted elsewhere, rank 0 has moved": dict(agent="B", others=[(True, "A")]),
    "counted on another machine than before": dict(agent="C", others=[(True, "D")]),
    "a machine has come": dict(agent="A", others=[(False, "B"), (False, "C")]),
    "a machine has gone, rank 0 has moved": dict(agent="B"),
}


@pytest.mark.parametrize("which", RESTARTS)
def test_on_several_machines_a_restart_is_one_wherever_it_is_counted(tmp_path, monkeypatch, which):
    run = tmp_path / "run"
    leave_run(run, 9)  # of long ago
    attempt(monkeypatch, 0, agent="A", others=[(False, "B")])
    claimed(run, overwrite=True)
    leave_run(run, 2)
    for _ in range(2):
        attempt(monkeypatch, 0, **RESTARTS[which])
        assert claimed(run, overwrite=True) == "auto"
        assert sorted(path.name for path in run.iterdir()) == [LOCK_FILE, "checkpoint-2", "metrics.jsonl"]


def test_without_a_name_of_its_own_a_launch_is_known_by_its_agents_alone(tmp_path, monkeypatch):
    run = tmp_path / "run"
    attempt(monkeypatch, 0, launch="none")
    claimed(run)
    leave_run(run, 2)
    attempt(monkeypatch, 1, launch="none", agent="B")
    with pytest.raises(UserError, match="already holds a run"):
        claimed(run)
    attempt(monkeypatch, 1, launch="none", agent="A")
    assert claimed(run, overwrite=True) == "auto"


@pytest.mark.parametrize("note", [b"", bytes(200), b'{"pid": 17, "host": "a', b"[]"])
def test_a_restart_whose_note_cannot_be_read_overwrites_nothing(tmp_path, monkeypatch, caplog, note):
    run = tmp_path / "run"
    attempt(monkeypatch, 0)
    claimed(run)
    leave_run(run, 2)
    (run / LOCK_FILE).write_bytes(note)
    attempt(monkeypatch, 1)
    assert claimed(run, overwrite=True) == "auto"
    assert (run / "checkpoint-2").is_dir() and f"{run / LOCK_FILE} cannot be read" in caplog.text
    (run / LOCK_FILE).write_bytes(note)
    attempt(monkeypatch, 0)  # a new launch does as it is told
    claimed(run, overwrite=True)
    assert [path.name for path in run.iterdir()] == [LOCK_FILE]


@pytest.mark.parametrize("mishap", ["a full disk", "a kill"])
def test_a_note_is_there_even_where_the_next_one_cannot_be_written(tmp_path, monkeypatch, mishap):
    """Seen by the next attempt."""
    run = tmp_path / "run"
    attempt(monkeypatch, 0)
    child = os.fork()
    if child == 0:
        with suppress(BaseException):
            claimed(run)
            leave_run(run, 2)
            os._exit(0)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    child = os.fork()
    if child == 0:
        with suppress(BaseException):
            attempt(monkeypatch, 1)
            os.pwrite = full if mishap == "a full disk" else lambda *_: os.kill(os.getpid(), signal.SIGKILL)
            claimed(run, overwrite=True)
        os._exit(1)
    os.waitpid(child, 0)
    assert json.loads((run / LOCK_FILE).read_bytes())["launch"] == "job 1"
    attempt(monkeypatch, 2)
    assert claimed(run, overwrite=True) == "auto"
    assert (run / "checkpoint-2").is_dir()


def full(descriptor, text, offset):
    raise OSError(28, "No space left on device")


def test_a_note_fits_whatever_names_there_are_and_is_durable(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (synced.append(os.fstat(descriptor).st_ino), fsync(descriptor)))
    attempt(monkeypatch, 0, launch="ü" * 500, others=[(False, f"{number:012x}") for number in range(1_000)])
    claimed(tmp_path / "run")
    path = tmp_path / "run" / LOCK_FILE
    note = json.loads(path.read_bytes())
    assert path.stat().st_size == NOTE_BYTES and path.stat().st_ino in synced
    assert note["pid"] == os.getpid() and note["agents"][0] == "A" and len(note["agents"]) > 100


def test_an_agent_has_a_name_of_its_own(tmp_path):
    child = os.fork()
    if child == 0:
        (tmp_path / "name").write_text(run_folder.agent())
        os._exit(0)
    os.waitpid(child, 0)
    assert run_folder.agent() == run_folder.agent() != (tmp_path / "name").read_text() != ""


@pytest.mark.parametrize("flag", ["model_name_or_path", "config_name"])
@pytest.mark.parametrize("source", ["checkpoint-2", "."])
@pytest.mark.parametrize("resume", [None, "auto"])
def test_overwriting_does_not_remove_what_the_run_is_to_start_from(tmp_path, resume, source, flag):
    run = tmp_path / "run"
    leave_run(run, 2, 4)
    with pytest.raises(UserError, match=f"checkpoint|holds .*--{flag}"):
        claimed(run, resume, overwrite=True, **{flag: str(run / source)})
    assert {"checkpoint-2", "checkpoint-4"} <= {path.name for path in run.iterdir()}
    claimed(tmp_path / "other", overwrite=True, **{flag: str(run / source)})
    claimed(run, overwrite=True, **{flag: "facebook/wav2vec2-base"})
    assert not list(run.glob("checkpoint-*"))
