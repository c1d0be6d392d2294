"""Checkpoints under torn files, flipped bits, full disks, failing system calls and kills: never one lost, never a
damaged one taken.
"""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from safetensors import SafetensorError
from tiny_run import (
    CHECKSUMS,
    MODEL,
    OPTIMIZER,
    STATE,
    Run,
    Tap,
    contents,
    file_size_limit,
    flip,
    names,
    prepare,
    same,
    tensors,
)

from w2v2.errors import UserError
from w2v2.train.checkpoint import checkpoints, find_checkpoint, find_damage, save_model

FILES = ["config.json", MODEL, "preprocessor_config.json", OPTIMIZER, STATE, CHECKSUMS]


@pytest.fixture(scope="module")
def run():
    return Run()


@pytest.fixture(scope="module")
def two_saved(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    run.save(folder, 2)
    run.update(3)
    run.save(folder, 4)
    run.update(4)
    return folder


@pytest.fixture
def saved(two_saved, tmp_path):
    """A run's folder with checkpoint-2 and checkpoint-4, which differ."""
    return Path(shutil.copytree(two_saved, tmp_path / "run"))


def truncate(path):
    os.truncate(path, path.stat().st_size - 1)


def empty(path):
    os.truncate(path, 0)


def flip_in_the_middle(path):
    flip(path, 4 * path.stat().st_size)


# Damage


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [truncate, empty, flip_in_the_middle, Path.unlink])
def test_auto_passes_over_a_damaged_checkpoint(saved, caplog, name, damage):
    damage(saved / "checkpoint-4" / name)
    assert find_checkpoint(saved, "auto") == saved / "checkpoint-2"
    said = [record.getMessage() for record in caplog.records]
    assert "checkpoint-4 is damaged, so the one before it is tried" in said[0] and "\n" not in said[0]
    if name != CHECKSUMS:  # a flip there accuses one of the others
        assert name in said[0]
    assert len(said) == 1


def test_a_run_never_starts_anew_beside_damaged_checkpoints(saved):
    truncate(saved / "checkpoint-2" / MODEL)
    flip_in_the_middle(saved / "checkpoint-4" / OPTIMIZER)
    before = contents(saved)
    with pytest.raises(UserError, match="no checkpoint.*checkpoint-4.*optimizer.safetensors has changed.*--overwrite"):
        find_checkpoint(saved, "auto")
    assert contents(saved) == before
    assert prepare(saved, overwrite=True) is None and names(saved) == []


def test_rotation_neither_counts_nor_removes_what_is_torn(run, saved):
    truncate(saved / "checkpoint-4" / MODEL)
    run.save(saved, 6, keep=2)
    assert names(saved) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    run.save(saved, 8, keep=1)
    assert names(saved) == ["checkpoint-4", "checkpoint-8"]
    assert find_checkpoint(saved, "auto").name == "checkpoint-8"


def test_a_checkpoint_of_the_first_versions_has_no_checksums(saved):
    """It is whole if its files are there; a later one says in its state that it had checksums."""
    (saved / "checkpoint-4" / CHECKSUMS).unlink()
    assert find_damage(saved / "checkpoint-4") == f"{CHECKSUMS} is missing"
    state = json.loads((saved / "checkpoint-4" / STATE).read_text())
    assert state.pop("has_checksums")
    (saved / "checkpoint-4" / STATE).write_text(json.dumps(state))
    for resume_from in ("auto", str(saved / "checkpoint-4")):
        assert find_checkpoint(saved, resume_from) == saved / "checkpoint-4"
    (saved / "checkpoint-4" / OPTIMIZER).unlink()
    assert find_checkpoint(saved, "auto") == saved / "checkpoint-2"


# Failures while saving


FULL = OSError(28, "No space left on device")


@pytest.mark.parametrize("step", [5, 6])
def test_whatever_call_fails_the_save_is_whole_or_undone(run, saved, monkeypatch, step):
    """Step 5 replaces a torn checkpoint, step 6 rotates one away; one call after another fails."""

    def fail(name, tap):
        raise SafetensorError("I/O error: No space left on device") if name == "save_file" else FULL

    old, new = tensors(saved / "checkpoint-4"), tensors(run.save(saved.with_name("new"), step))
    leave_torn(saved, 5)
    whole, at, failed = contents(saved / "checkpoint-4"), 0, set()
    while True:
        folder = Path(shutil.copytree(saved, saved.with_name(f"run{at}")))
        with monkeypatch.context() as patch:
            tap = Tap(patch, at, fail)
            try:
                final = run.save(folder, step, keep=2)
            except UserError as error:
                assert "No space left on device" in str(error)
                final = None
        found = find_checkpoint(folder, "auto")
        assert contents(folder / "checkpoint-4") == whole and (folder / "checkpoint-2").is_dir() or final
        assert found.name == f"checkpoint-{step}" if final else same(tensors(found), old) or tap.made[at] == "fsync"
        assert same(tensors(found), new if found.name == f"checkpoint-{step}" else old), tap.made[at]
        shutil.rmtree(folder)
        failed |= set(tap.made[at : at + 1])
        if at >= len(tap.made):
            break
        at += 1
    assert failed == {"replace", "mkdir", "rmdir", "unlink", "fsync", "save_file", "open"}
    assert not same(new, old)


def test_a_final_model_that_cannot_be_saved_leaves_the_old_one(run, tmp_path):
    save_model(tmp_path, run.accelerator, run.model, run.feature_extractor)
    before = contents(tmp_path)
    expected = "the model could not be saved.*File too large.*auto"
    with file_size_limit(100_000), pytest.raises(UserError, match=expected) as error:
        save_model(tmp_path, run.accelerator, run.model, run.feature_extractor)
    assert "\n" not in str(error.value)
    assert contents(tmp_path) == before


# Kills


def leave_torn(folder, step):
    """A checkpoint that lost a byte."""
    shutil.copytree(folder / "checkpoint-4", folder / f"checkpoint-{step}")
    truncate(folder / f"checkpoint-{step}" / MODEL)


def tear_what_is_not_durable(folder, tap, known):
    """As a power cut may: of files that nobody waited for, half is there."""
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_ino not in tap.synced | known:
            os.truncate(path, path.stat().st_size // 2)


def save_until(run, folder, step, at, power_cut):
    """Save in a process of its own, which is killed at the call numbered `at`; whether there was such a call."""
    known = {path.stat().st_ino for path in folder.rglob("*") if path.is_file()}

    def die(name, tap):
        if power_cut:
            tear_what_is_not_durable(folder, tap, known)
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            Tap(pytest.MonkeyPatch(), at, die)
            run.save(folder, step, keep=2)
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("power_cut", [False, True], ids=["kill", "power cut"])
@pytest.mark.parametrize("step", [5, 6])
def test_whenever_a_save_is_killed_auto_finds_old_or_new(run, saved, step, power_cut):
    old = tensors(saved / "checkpoint-4")
    leave_torn(saved, 5)
    new = tensors(run.save(saved.with_name("new"), step))
    assert not same(new, old)
    at, found_new, was_killed = 0, [], True
    while was_killed:
        folder = Path(shutil.copytree(saved, saved.with_name(f"run{at}")))
        was_killed = save_until(run, folder, step, at, power_cut)
        found = prepare(folder, "auto")
        found_new.append(same(tensors(found), new))
        assert found_new[-1] or same(tensors(found), old), at
        assert len(checkpoints(folder)) >= 2 and not list(folder.glob(".unfinished-*"))
        shutil.rmtree(folder)
        at += 1
    assert found_new == sorted(found_new) and found_new[-1] and not found_new[0]
    assert at > 20


# Several processes


def test_all_ranks_agree_on_saves_and_checkpoints(tmp_path):
    run_ranks(tmp_path / "logs", (Path(__file__).parents[1] / "two_ranks_saving.py"), tmp_path)
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert "File too large" in first["stop"] and "checkpoint-2" in first["stop"]
    assert first["warn"] is None and first["saved"] == "checkpoint-4"
    assert "the model could not be saved" in first["model"]
    assert "checkpoint-4" in first["named"] and "has changed" in first["named"]
    assert first["auto"] == "checkpoint-2"
    assert "all machines share" in first["unseen"]
