"""Checksums find every changed bit of a folder, and folders are whole or absent under their names."""

import os

import pytest
from tiny_run import contents, flip

from w2v2.train.durable import find_mismatch, publish, unfinished, write_checksums

RECORD = "inner/sums.json"


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    (folder / "weights").write_bytes(bytes(range(16)))
    (folder / "empty").touch()
    (folder / "inner/state").write_text('{"step": 3}')
    write_checksums(folder, RECORD)
    return folder


def test_a_folder_as_it_was_written_is_whole(folder):
    before = contents(folder)
    assert find_mismatch(folder, RECORD, ["weights", "inner/state"]) is None
    write_checksums(folder, RECORD)
    assert contents(folder) == before
    (folder / "notes.txt").write_text("mine")  # a file without a checksum does not matter
    assert find_mismatch(folder, RECORD) is None


def test_every_flipped_bit_is_found_and_its_file_named(folder):
    """All bits of all files; of the record's own every fifth: a flip there accuses some file, which is as good."""
    required = ["weights", "empty", "inner/state"]
    for name, whole in contents(folder).items():
        for bit in range(0, 8 * len(whole), 5 if name == RECORD else 1):
            flip(folder / name, bit)
            damage = find_mismatch(folder, RECORD, required)
            assert damage is not None, (name, bit)
            assert name == RECORD or damage.startswith(f"{name} has changed")
            (folder / name).write_bytes(whole)
    assert find_mismatch(folder, RECORD, required) is None


@pytest.mark.parametrize("text", ["", "{}", '{"weights": {}}', '{"other": {"size": 40, "sha256": ""}}'])
def test_a_record_that_is_none_accuses_itself(folder, text):
    (folder / RECORD).write_text(text)
    assert find_mismatch(folder, RECORD, ["weights"]) == f"{RECORD} is damaged"


def test_a_new_folder_replaces_the_old_one_or_goes(folder):
    with pytest.raises(ZeroDivisionError), unfinished(folder) as new:
        (new / "half").touch()
        raise ZeroDivisionError
    assert (folder / "weights").exists() and os.listdir(folder.parent) == ["folder"]
    with unfinished(folder) as new:
        (new / "other").touch()
        publish(new, folder)
    assert os.listdir(folder) == ["other"] and os.listdir(folder.parent) == ["folder"]
