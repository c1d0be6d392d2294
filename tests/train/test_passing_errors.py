"""Errors of reading that pass: no whole checkpoint is given up for one, and a start that cannot read ends with a line."""

import builtins
import errno
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import write_tones
from tiny_run import CHECKSUMS, MODEL, OPTIMIZER, STATE, Run, contents, flip, names

from w2v2.data import packed, retries
from w2v2.data.audio import AudioError, probe, read_crop, read_pcm
from w2v2.data.durations import measure_lengths
from w2v2.errors import UserError
from w2v2.train.resuming import checkpoints, claim_output_dir, find_checkpoint, find_damage

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
    monkeypatch.setattr(retries.time, "sleep", pauses.append)
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


# -- audio


def fail_to_open(patch, path, number, times=10**6):
    left, opened = [times], os.open

    def failing(file, *rest, **more):
        if file == str(path) and left[0] > 0:
            left[0] -= 1
            raise OSError(number, os.strerror(number), file)
        return opened(file, *rest, **more)

    patch.setattr(os, "open", failing)


@pytest.fixture
def tone(tmp_path):
    (path,) = write_tones(tmp_path / "audio", [1.0])
    return path


@pytest.mark.parametrize("number", sorted(retries.PASSING), ids=errno.errorcode.get)
def test_audio_that_cannot_be_opened_for_the_moment_is_read_all_the_same(tone, monkeypatch, slept, number):
    expected = read_crop(str(tone), 100, 5_000)
    for read in (lambda: read_crop(str(tone), 100, 5_000), lambda: probe(str(tone))):
        slept.clear()
        with monkeypatch.context() as patch:
            fail_to_open(patch, tone, number, times=TRIES - 1)
            found = read()
        assert slept == [1.0, 4.0] and np.array_equal(found, expected if np.ndim(found) else 16_000)
    with monkeypatch.context() as patch, pytest.raises(AudioError, match=os.strerror(number)):
        fail_to_open(patch, tone, number)
        read_crop(str(tone))


def test_what_is_wrong_with_a_file_is_not_waited_for(tmp_path, slept):
    (tmp_path / "text.wav").write_text("no audio")
    for name in ("text.wav", "absent.wav", "."):
        with pytest.raises(AudioError):
            probe(str(tmp_path / name))
    assert not slept


def test_a_shard_whose_descriptor_has_become_stale_is_opened_again(tmp_path, monkeypatch, slept):
    samples = np.arange(1_000, dtype=np.int16)
    shard = tmp_path / "shard-00000.arrow"
    packed.write_shard(shard, [("a", samples)])
    address = f"{shard}#{shard.read_bytes().index(samples.tobytes())}+1000"
    assert np.array_equal(read_pcm(address), samples)
    opened, read, left = [], os.preadv, [1]

    def refuse_once(*rest):
        if left.pop() if left else 0:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return read(*rest)

    original = os.open
    monkeypatch.setattr(os, "open", lambda path, *rest: opened.append(path) or original(path, *rest))
    monkeypatch.setattr(os, "preadv", refuse_once)
    assert np.array_equal(read_pcm(address, 5, 90), samples[5:95])
    assert slept == [1.0] and opened == [str(shard)]


@pytest.mark.parametrize("call", ["stat", "open"])
def test_a_file_that_cannot_be_measured_for_the_moment_is_not_left_out(tone, monkeypatch, slept, call):
    measured = measure_lengths([str(tone)], probe)
    for times, lasting in ((TRIES - 1, False), (10**6, True)):
        with monkeypatch.context() as patch:
            if call == "stat":
                fail_at(patch, tone, errno.ESTALE, times, call)
            else:
                fail_to_open(patch, tone, errno.ESTALE, times)
            if lasting:
                with pytest.raises(UserError, match="start again when it can be read"):
                    measure_lengths([str(tone)], probe)
            else:
                assert measure_lengths([str(tone)], probe) == measured == {str(tone): 16_000}


@pytest.mark.parametrize("call", ["pread", "fstat"])
def test_audio_that_opens_and_cannot_be_read_for_the_moment_is_tried_again(tone, monkeypatch, slept, call):
    """As a failing disk's: libsndfile then says that it is no audio."""
    expected, original, left = read_crop(str(tone)), getattr(os, call), [TRIES - 1]

    def refuse(descriptor, *rest):
        if os.readlink(f"/proc/self/fd/{descriptor}") == str(tone) and left[0] > 0:
            left[0] -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return original(descriptor, *rest)

    def refuse_too(*args, **kwargs):
        if call == "pread" and left[0] > 0:
            raise soundfile.LibsndfileError(2)
        return opened(*args, **kwargs)

    opened = soundfile.SoundFile._open
    monkeypatch.setattr(os, call, refuse)
    monkeypatch.setattr(soundfile.SoundFile, "_open", refuse_too)
    descriptors = len(os.listdir("/proc/self/fd"))
    assert np.array_equal(read_crop(str(tone)), expected)
    assert slept == [1.0, 4.0] and len(os.listdir("/proc/self/fd")) == descriptors


def test_what_was_measured_before_a_file_that_could_not_be_is_kept(tmp_path, monkeypatch, slept):
    paths = list(map(str, write_tones(tmp_path / "audio", [1.0, 0.5, 0.5])))
    with monkeypatch.context() as patch, pytest.raises(UserError):
        fail_to_open(patch, paths[2], errno.ESTALE)
        measure_lengths(paths, probe, tmp_path / "cache", num_workers=1)
    asked = []
    measure_lengths(paths, lambda path: asked.append(path) or probe(path), tmp_path / "cache")
    assert asked == [paths[2]]
