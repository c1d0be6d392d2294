"""Checksums: no bit of a folder changes unnoticed."""

import builtins
import io
import os

import pytest
from tiny_run import contents, flip

from w2v2.train.checksums import find_damage, seal

RECORD = "inner/sums.json"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "weights").write_bytes(bytes(range(16)))
    (tmp_path / "empty").touch()
    (tmp_path / "inner/state").write_text('{"step": 3}')
    seal(tmp_path, RECORD)
    return tmp_path


def test_a_sealed_folder_is_whole_and_sealed_again_alike(folder):
    before = contents(folder)
    assert find_damage(folder, RECORD, ["weights", "inner/state"]) is None
    seal(folder, RECORD)
    assert contents(folder) == before
    (folder / "notes.txt").write_text("mine")  # what is not recorded does not matter
    assert find_damage(folder, RECORD) is None


def test_every_flipped_bit_is_found_and_its_file_named(folder):
    """All bits of all files; of the record's own every fifth, where a flip accuses some file, which is as good."""
    required = ["weights", "empty", "inner/state"]
    for name, whole in contents(folder).items():
        for bit in range(0, 8 * len(whole), 5 if name == RECORD else 1):
            flip(folder / name, bit)
            damage = find_damage(folder, RECORD, required)
            assert damage is not None, (name, bit)
            assert name == RECORD or damage.startswith(f"{name} has changed")
            (folder / name).write_bytes(whole)
    assert find_damage(folder, RECORD, required) is None


@pytest.mark.parametrize("name", ["weights", "empty", "inner/state"])
def test_sizes_alone_tell_what_is_missing_torn_or_longer(folder, name):
    whole = (folder / name).read_bytes()
    changes = [whole + b"x"] + ([whole[:-1], b""] if whole else [])
    for changed in changes:
        (folder / name).write_bytes(changed)
        damage = find_damage(folder, RECORD, contents=False)
        assert damage == f"{name} has {len(changed)} bytes, was saved with {len(whole)}"
    (folder / name).unlink()
    assert find_damage(folder, RECORD, contents=False) == f"{name} is missing"


@pytest.mark.parametrize("text", ["", "[]", "3", '{"weights": 3}', '{"weights": {"size": "40", "sha256": ""}}', None])
def test_a_record_that_is_none_accuses_itself(folder, text):
    (folder / RECORD).unlink()
    if text is not None:
        (folder / RECORD).write_text(text)
    assert find_damage(folder, RECORD, ["weights"]) == f"{RECORD} is damaged"


@pytest.mark.parametrize("name", ["weights", RECORD])
@pytest.mark.parametrize("call", ["open", "read", "stat"])
def test_a_file_that_cannot_be_read_is_named_and_not_accused(folder, monkeypatch, name, call):
    class Failing(io.BytesIO):
        def readinto(self, *_):
            raise OSError(116, "Stale file handle")

        read = readinto

    def fail(file, *rest, **more):
        if str(file) != str(folder / name):
            return original(file, *rest, **more)
        if call == "read":
            return Failing()
        raise OSError(116, "Stale file handle", str(file))

    original = os.stat if call == "stat" else open
    for module in [os] if call == "stat" else [builtins, io]:
        monkeypatch.setattr(module, "stat" if call == "stat" else "open", fail)
    with pytest.raises(OSError) as error:
        find_damage(folder, RECORD)
    assert error.value.filename == str(folder / name) and error.value.errno == 116


def test_sealing_waits_for_the_disk_with_every_file_and_folder(folder, monkeypatch):
    synced, fsync = set(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (synced.add(os.fstat(descriptor).st_ino), fsync(descriptor)))
    seal(folder, RECORD)
    assert {path.stat().st_ino for path in [folder, *folder.rglob("*")]} <= synced
