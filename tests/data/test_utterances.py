"""`w2v2.data.utterances`: the table is mapped from a file, shared by processes, and costs a run no memory."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from w2v2.data.utterances import load_manifest, map_table


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


@pytest.mark.parametrize("in_memory", [True, False])
def test_the_data_set_holds_the_rows_of_the_table(tmp_path, in_memory):
    table = make_table()
    data = map_table(table, None if in_memory else tmp_path)
    assert data.to_list() == table.to_pylist() and data[np.int64(31)] == table.to_pylist()[31]
    assert [Path(file["filename"]).parent for file in data.cache_files] == ([] if in_memory else [tmp_path])


def test_the_same_rows_share_a_file_and_others_do_not(tmp_path):
    first = map_table(make_table(), tmp_path)
    [path] = tmp_path.iterdir()
    written = path.stat()
    again, other = map_table(make_table(), tmp_path), map_table(make_table(first=1), tmp_path)
    assert first._fingerprint == again._fingerprint != other._fingerprint
    assert path.stat() == written and len(list(tmp_path.iterdir())) == 2


def test_a_worker_gets_the_files_name_and_not_the_table(tmp_path):
    data = map_table(make_table(rows=5_000, chunk=1_000), tmp_path)
    sent = pickle.dumps(data)
    assert len(sent) < 20_000 < data.data.nbytes
    assert pickle.loads(sent)[4_321] == data[4_321]


def write_manifest(path, rows=20_000):
    path.write_text("".join(json.dumps({"audio": f"{n}.wav", "duration": 1 + n / 1e4}) + "\n" for n in range(rows)))
    return path


def test_ids_and_paths_are_not_held_in_memory(tmp_path):
    manifest, before = write_manifest(tmp_path / "a.jsonl"), pa.total_allocated_bytes()
    data, _ = load_manifest([manifest], cache_dir=tmp_path / "cache")
    assert data.data.nbytes > 20 * len(data) and pa.total_allocated_bytes() - before < len(data)


def test_processes_that_start_together_agree(tmp_path):
    manifest = write_manifest(tmp_path / "a.jsonl")
    program = (
        "import sys; from w2v2.data.utterances import load_manifest\n"
        "print(load_manifest([sys.argv[1]], cache_dir=sys.argv[2])[0]._fingerprint)"
    )
    command = [sys.executable, "-c", program, manifest, tmp_path / "cache"]
    root = Path(__file__).parents[2]
    processes = [subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    found = {process.communicate(timeout=120)[0] for process in processes}
    [path] = (tmp_path / "cache").iterdir()
    assert [path.name] == [f"utterances-{name.strip()}.arrow" for name in found]
