"""Errors of reading that pass: no whole checkpoint is given up for one, and a start that cannot read ends with a line."""

import builtins
import errno
import io
import json
import os
from pathlib import Path

import pytest
from tiny_run import CHECKSUMS, MODEL, OPTIMIZER, STATE, Run, contents, flip, names

from w2v2 import patience
from w2v2.errors import UserError
from w2v2.resuming import checkpoints, claim_output_dir, find_checkpoint, find_damage

PASSING = [errno.ESTALE, errno.ETIMEDOUT, errno.EACCES, errno.EMFILE, errno.ENOMEM]
TRIES = 3


@pytest.fixture(scope="module")
def run():
    return Run()


@pytest.fixture
def saved(run, tmp_path):
    """A run's folder with checkpoint-2 and checkpoint-4."""
    folder = tmp_path / "run"
    for step in (2, 4):
        run.save(folder, step)
    return folder


@pytest.fixture
def slept(monkeypatch):
    """The pauses, which take no time."""
    pauses = []
    monkeypatch.setattr(patience.time, "sleep", pauses.append)
    return pauses


def fail_at(patch, path, number, times=10**6, call="open"):
    """The next calls for `path` fail with this error."""
    left = [times]

    def failing(original):
        def made(file, *rest, **more):
            if not isinstance(file, int) and Path(file) == path and left[0] > 0:
                left[0] -= 1
                raise OSError(number, os.strerror(number), str(file))
            return original(file, *rest, **more)

        return made

    for module in (builtins, io) if call == "open" else (os,):
        patch.setattr(module, call, failing(getattr(module, call)))


@pytest.mark.parametrize("name", ["config.json", MODEL, OPTIMIZER, STATE, CHECKSUMS])
@pytest.mark.parametrize("number", [*PASSING, errno.EIO], ids=errno.errorcode.get)
def test_an_error_that_passes_changes_nothing(saved, monkeypatch, slept, caplog, number, name):
    before = contents(saved)
    with monkeypatch.context() as patch:
        fail_at(patch, saved / "checkpoint-4" / name, number, times=TRIES - 1)
        assert find_checkpoint(saved, "auto") == saved / "checkpoint-4"
    assert len(slept) == TRIES - 1 and "passed over" not in caplog.text
    assert names(saved) == ["checkpoint-2", "checkpoint-4"] and contents(saved) == before


@pytest.mark.parametrize("resume_from", ["auto", "checkpoint-4"])
@pytest.mark.parametrize("call", ["open", "stat"])
@pytest.mark.parametrize("name", ["config.json", MODEL, OPTIMIZER, STATE, CHECKSUMS])
@pytest.mark.parametrize("number", PASSING, ids=errno.errorcode.get)
def test_one_that_does_not_pass_ends_the_start_with_a_line_and_changes_nothing(
    saved, monkeypatch, slept, number, name, call, resume_from
):
    before, file = contents(saved), saved / "checkpoint-4" / name
    with monkeypatch.context() as patch:
        fail_at(patch, file, number, call=call)
        with pytest.raises(UserError) as error:
            find_checkpoint(saved, resume_from if resume_from == "auto" else str(saved / resume_from))
    assert str(file) in str(error.value) and os.strerror(number) in str(error.value) and "\n" not in str(error.value)
    assert slept == [1.0, 4.0]
    assert names(saved) == ["checkpoint-2", "checkpoint-4"] and contents(saved) == before


def test_a_failing_disk_is_passed_over_but_not_set_aside(saved, monkeypatch, slept, caplog):
    with monkeypatch.context() as patch:
        fail_at(patch, saved / "checkpoint-4" / MODEL, errno.EIO)
        assert find_checkpoint(saved, "auto") == saved / "checkpoint-2"
    assert f"passed over: {MODEL} cannot be read (Input/output error)" in caplog.text
    assert names(saved) == ["checkpoint-2", "checkpoint-4"]
    assert find_checkpoint(saved, "auto") == saved / "checkpoint-4"


def test_a_difference_is_damage_whatever_cannot_be_read_beside_it_at_first(saved, monkeypatch, slept):
    flip(saved / "checkpoint-4" / MODEL, 100)
    with monkeypatch.context() as patch:
        fail_at(patch, saved / "checkpoint-4" / OPTIMIZER, errno.ESTALE, times=1)
        assert find_checkpoint(saved, "auto") == saved / "checkpoint-2"
    assert names(saved) == ["checkpoint-2", "checkpoint-4.damaged"]


def test_a_folder_that_cannot_be_listed_is_not_taken_for_an_empty_one(saved, monkeypatch, slept):
    with monkeypatch.context() as patch:
        fail_at(patch, saved, errno.EACCES, call="scandir")
        with pytest.raises(UserError, match="Permission denied"):
            find_checkpoint(saved, "auto")
        assert checkpoints(saved) == []
    assert len(slept) == TRIES - 1


@pytest.mark.parametrize("name", [MODEL, OPTIMIZER, STATE])
def test_so_it_is_with_checkpoints_without_checksums(saved, monkeypatch, slept, name):
    for folder in checkpoints(saved):
        (folder / CHECKSUMS).unlink()
        state = json.loads((folder / STATE).read_text())
        state.pop("has_checksums")
        (folder / STATE).write_text(json.dumps(state))
    with monkeypatch.context() as patch:
        fail_at(patch, saved / "checkpoint-4" / name, errno.EMFILE)
        with pytest.raises(UserError, match="Too many open files"):
            find_checkpoint(saved, "auto")
    assert find_checkpoint(saved, "auto") == saved / "checkpoint-4"


def test_a_newer_checkpoint_that_cannot_be_looked_at_is_not_overlooked(saved, monkeypatch, slept):
    with monkeypatch.context() as patch:
        fail_at(patch, saved / "checkpoint-4" / MODEL, errno.ESTALE, call="stat")
        with pytest.raises(UserError, match="checkpoint-4/model.safetensors cannot be read"):
            claim_output_dir(saved, False, str(saved / "checkpoint-2"))


def test_a_save_goes_on_beside_an_older_one_that_cannot_be_looked_at(run, saved, monkeypatch, slept):
    with monkeypatch.context() as patch:
        fail_at(patch, saved / "checkpoint-4" / MODEL, errno.ESTALE, call="stat")
        folder = run.save(saved, 6, keep=1)
    assert names(saved) == ["checkpoint-4", "checkpoint-6"] and slept == [] and find_damage(folder) is None
