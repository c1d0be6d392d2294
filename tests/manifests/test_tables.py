"""`w2v2.manifests.tables`: what is done batch by batch is what would be done at once, and text lies in a file."""

import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from w2v2.audio.crops import AudioError
from w2v2.data import utterances
from w2v2.errors import UserError
from w2v2.manifests import manifest, readers, tables
from w2v2.manifests.manifest import read_manifests
from w2v2.manifests.tables import by_batch, filter_rows, find_repeated, map_tables, take_rows


@pytest.fixture
def small_batches(monkeypatch):
    for module in (tables, readers, manifest, utterances):
        monkeypatch.setattr(module, "BATCH_ROWS", 4)
    monkeypatch.setattr(tables, "HASHED_ROWS", 4)


def text(*values, chunk=3):
    return pa.chunked_array([pa.array(values[at : at + chunk], pa.string()) for at in range(0, len(values), chunk)])


def test_tables_of_several_schemas_are_mapped_in_order():
    parts = [pa.table({"a": ["x", None]}), pa.table({"a": ["é" * 900], "b": [1.5]}), pa.table({"b": [2]})]
    before = pa.total_allocated_bytes()
    found = map_tables(iter(parts))
    assert [table.to_pydict() for table in found] == [table.to_pydict() for table in parts]
    assert pa.total_allocated_bytes() == before
    assert map_tables(iter(parts[:1]))[0] is parts[0] and map_tables([]) == []


def test_text_that_stays_is_not_copied(small_batches):
    names = text(*[f"{n}" for n in range(8)], " padded ", "end")
    trimmed = by_batch(pc.utf8_trim_whitespace, names)
    assert trimmed.to_pylist() == [*map(str, range(8)), "padded", "end"]
    assert trimmed.chunk(0).buffers()[2].address == names.chunk(0).buffers()[2].address
    assert by_batch(lambda a, b: pc.equal(a, b), names, trimmed).to_pylist() == [True] * 8 + [False, True]


@pytest.mark.parametrize("seed", range(5))
def test_repeated_rows_are_those_of_pandas(small_batches, seed):
    rng = np.random.default_rng(seed)
    columns = {
        "audio": rng.choice(list("abc"), 40),
        "start": rng.choice([0.0, 0.5, 1 / 3], 40),
        "n": rng.integers(4, size=40),
    }
    frame = pd.DataFrame(columns)
    maybe = find_repeated(text(*frame["audio"]), pa.array(frame["start"]), pa.array(frame["n"]))
    assert maybe.tolist() == frame.duplicated(keep=False).tolist()
    assert not find_repeated(text(*map(str, range(40)))).any()


def test_starts_of_one_file_do_not_pass_for_repeated():
    """Floats of few digits differ in a few bits alone, which the hash has to spread."""
    starts, lengths = (grid.ravel() for grid in np.meshgrid(np.arange(500) / 4, np.arange(1, 401) * 160))
    maybe = find_repeated(text(*["a.wav"] * len(starts), chunk=50_000), pa.array(starts), pa.array(lengths))
    assert maybe.sum() < 10


def test_filtered_and_taken_rows(small_batches):
    table = pa.table({"n": range(11), "name": [f"{n}" for n in range(11)]})
    kept = np.arange(11) % 5 > 0
    assert filter_rows(table, kept).equals(table.filter(pa.array(kept)))
    assert take_rows(table, [0, 9]) == [{"n": 0, "name": "0"}, {"n": 9, "name": "9"}]


def refuse_measuring(path):
    raise AudioError(path, "is not measured, for its length is known")


def write_rows(folder, suffix, rows):
    frame, path = pd.DataFrame(rows), folder / f"many{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pandas(frame), path, row_group_size=5)
    elif suffix == ".jsonl":
        path.write_text("".join(json.dumps({k: v for k, v in row.items() if v != ""}) + "\n" for row in rows))
    else:
        frame.to_csv(path, index=False)
    return str(path)


ROWS = [
    {
        "audio": f"{n % 7}.wav",
        "start": n // 7 * 2.0,
        "duration": 1.5,
        "speaker": f" s{n}" if n % 3 else "",
        "channel": "AB"[n % 2],
    }
    for n in range(23)
]


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
@pytest.mark.parametrize("with_ids", [True, False])
def test_a_manifest_of_many_batches_reads_as_one_of_one(tmp_path, request, suffix, with_ids):
    rows = [row | ({"id": f"u{n} "} if with_ids else {}) for n, row in enumerate(ROWS)]
    path = write_rows(tmp_path, suffix, rows)
    whole, *notes = read_manifests([path], measure=refuse_measuring)
    request.getfixturevalue("small_batches")
    assert read_manifests([path], measure=refuse_measuring) == (whole, *notes)
    assert whole["id"][9].as_py() == ("u9" if with_ids else "2.wav:32000")
    assert whole["channel"].to_pylist() == [n % 2 for n in range(23)]


@pytest.mark.parametrize(
    ("row", "change", "said"),
    [
        (17, {"audio": " "}, "row 18 (line 19): audio is ''"),
        (21, {"id": "u4"}, "row 22 (line 23): id is 'u4'"),
        (22, {"audio": "1.wav", "start": 0, "channel": "B"}, "the first: row 23 (line 24), "),
        (20, {"channel": "third"}, "row 21 (line 22): channel is 'THIRD'"),
        (19, {"duration": "long"}, "row 20 (line 21): duration is 'long'"),
    ],
)
def test_a_slip_far_down_is_named_by_its_row(tmp_path, small_batches, row, change, said):
    rows = [values | {"id": f"u{n}"} for n, values in enumerate(ROWS)]
    rows[row] = rows[row] | change
    with pytest.raises(UserError) as error:
        read_manifests([write_rows(tmp_path, ".csv", rows)], measure=refuse_measuring)
    assert said in str(error.value)


def test_paths_that_come_twice_are_numbered(tmp_path, small_batches):
    """Two channels of a file have the same path and start."""
    rows = [{"audio": f"{n // 2}.wav", "duration": 1.0, "channel": n % 2} for n in range(14)]
    table, *_ = read_manifests([write_rows(tmp_path, ".csv", rows)], measure=refuse_measuring)
    assert table["id"].to_pylist() == [f"{n // 2}.wav" + "#2" * (n % 2) for n in range(14)]
