"""`w2v2.table_file`: the mapped table equals the one in memory, and only a whole file is ever trusted."""

import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from w2v2.data import table_file
from w2v2.data.table_file import KEPT, hold
from w2v2.errors import UserError

REPOSITORY = Path(__file__).parents[2]


def make_table(rows=50, chunk=7, first=0):
    """Several chunks, as readers give them."""
    numbers = range(first, first + rows)
    whole = pa.table(
        {
            "id": [f"é{i}" for i in numbers],
            "audio": [f"/data/{i}.flac" for i in numbers],
            "start": [i / 8 for i in numbers],
            "num_samples": pa.array([16_000 + i for i in numbers], pa.int64()),
        }
    )
    return pa.concat_tables([whole.slice(at, chunk) for at in range(0, rows, chunk)])


def files(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(table_file, "BATCH_ROWS", 5)


@pytest.mark.parametrize("kept", ["all", "some", "none of the first batch", "one"])
def test_the_mapped_table_equals_the_one_in_memory_and_the_rows_it_was_given(tmp_path, kept):
    table = make_table()
    mask = {
        "all": None,
        "some": np.random.default_rng(0).random(50) < 0.5,
        "none of the first batch": np.arange(50) >= 6,
        "one": np.arange(50) == 31,
    }[kept]
    expected = [row for row, keep in zip(table.to_pylist(), np.ones(50) if mask is None else mask, strict=True) if keep]
    mapped, memory = hold(table, tmp_path, mask), hold(table, None, mask)
    for data in (mapped, memory):
        assert len(data) == len(expected) and [data[i] for i in range(len(data))] == expected
        assert data[np.int64(0)] == expected[0] and data[-1] == expected[-1]
        assert data["num_samples"][:] == [row["num_samples"] for row in expected]
    assert mapped.features == memory.features and mapped._fingerprint == memory._fingerprint
    assert not memory.cache_files and [Path(file["filename"]).parent for file in mapped.cache_files] == [tmp_path]
    assert mapped._indices is None, "an index of the rows costs eight bytes each"


def test_a_worker_gets_the_files_name_and_not_the_table(tmp_path):
    data = hold(make_table(rows=5_000, chunk=1_000), tmp_path)
    sent = pickle.dumps(data)
    assert len(sent) < 20_000 < data.data.nbytes
    assert pickle.loads(sent)[4_321] == data[4_321]


def test_a_file_is_written_once_for_the_same_rows_and_again_for_others(tmp_path, monkeypatch):
    hold(make_table(), tmp_path)
    (name,) = files(tmp_path)
    written = []
    monkeypatch.setattr(table_file, "_write_aside", lambda *arguments: written.append(arguments))
    hold(make_table(), tmp_path)
    assert files(tmp_path) == [name] and not written
    monkeypatch.undo()
    hold(make_table(first=1), tmp_path)
    hold(make_table(), tmp_path, np.arange(50) > 0)
    assert len(files(tmp_path)) == 3


@pytest.mark.parametrize("remains", [0, 8, 0.3, 0.99, "all but 8 bytes"])
def test_a_torn_file_is_not_trusted(tmp_path, remains):
    table = make_table()
    hold(table, tmp_path)
    (name,) = files(tmp_path)
    content = (tmp_path / name).read_bytes()
    size = len(content) - 8 if isinstance(remains, str) else round(remains if remains >= 1 else remains * len(content))
    (tmp_path / name).write_bytes(content[:size])
    assert hold(table, tmp_path).to_list() == table.to_pylist()
    assert (tmp_path / name).read_bytes() == content


def test_a_writer_that_ends_midway_leaves_nothing_that_could_be_taken_for_the_table(tmp_path, monkeypatch):
    def interrupted(table, kept, file):
        whole(table.slice(0, 20), kept, file)
        if not isinstance(file, table_file._Digest):
            raise KeyboardInterrupt

    whole = table_file._write
    monkeypatch.setattr(table_file, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        hold(make_table(), tmp_path)
    assert files(tmp_path) == []


def test_another_process_that_writes_the_same_in_the_meantime_does_no_harm(tmp_path, monkeypatch):
    table, others = make_table(), []

    def interleaved(table, kept, file):
        if not isinstance(file, table_file._Digest) and not others:
            others.append(None)
            file.write(b"half")  # our own file is begun,
            others[0] = hold(table, tmp_path, kept)  # another's is written from beginning to end,
            file.seek(0)
        whole(table, kept, file)  # and then ours

    whole = table_file._write
    monkeypatch.setattr(table_file, "_write", interleaved)
    ours = hold(table, tmp_path)
    assert ours.to_list() == others[0].to_list() == table.to_pylist()
    assert len(files(tmp_path)) == 1


def test_processes_that_start_together_agree(tmp_path):
    program = (
        "import sys, test_table_file as t\n"
        "table = t.make_table(rows=20_000, chunk=3_000)\n"
        "assert t.hold(table, sys.argv[1]).to_list() == table.to_pylist()"
    )
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
    command, environment = [sys.executable, "-c", program, str(tmp_path)], os.environ | {"PYTHONPATH": path}
    processes = [subprocess.Popen(command, env=environment) for _ in range(3)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0, 0]
    assert len(files(tmp_path)) == 1


def test_old_tables_do_not_pile_up_and_one_in_use_stays(tmp_path):
    used, hour = make_table(first=1_000), 3_600
    hold(used, tmp_path)
    (in_use,) = tmp_path.iterdir()
    for number in range(KEPT + 3):
        hold(make_table(first=number), tmp_path)
        assert in_use.exists()
        for path in tmp_path.iterdir():  # an hour goes by
            os.utime(path, (path.stat().st_mtime - hour,) * 2)
        hold(used, tmp_path)
    assert len(files(tmp_path)) == KEPT


def test_what_a_killed_process_left_unfinished_goes_after_a_day(tmp_path):
    old, young = tmp_path / "utterances-0.arrow.1.tmp", tmp_path / "utterances-0.arrow.2.tmp"
    foreign = tmp_path / "durations.jsonl"
    for path in (old, young, foreign):
        path.write_text("")
    for path in (old, foreign):
        os.utime(path, (time.time() - 2 * 86_400,) * 2)
    hold(make_table(), tmp_path)
    assert not old.exists() and young.exists() and foreign.exists()


def test_a_folder_that_cannot_be_written_is_a_slip(tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match="cache: the table of utterances .* cannot be written: File exists"):
        hold(make_table(), tmp_path / "cache")
