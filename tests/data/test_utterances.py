"""`w2v2.data.utterances`: rows of a fitting length; their table is mapped from a file and costs a run no memory."""

import math
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import soundfile
from conftest import write_csv
from ranks import SECONDS, Program, environment
from transformers import Wav2Vec2Config

from w2v2.audio.crops import SAMPLING_RATE
from w2v2.data.collate import Framing
from w2v2.data.utterances import Utterances, inspect_some, load_manifest, load_utterances, map_table
from w2v2.errors import UserError


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
    return write_csv(path, [f"{n}.wav" for n in range(rows)], [1 + n / 1e4 for n in range(rows)])


def test_ids_and_paths_are_not_held_in_memory(tmp_path):
    manifest, before = write_manifest(tmp_path / "a.csv"), pa.total_allocated_bytes()
    data, _ = load_manifest([manifest], cache_dir=tmp_path / "cache")
    assert data.data.nbytes > 20 * len(data) and pa.total_allocated_bytes() - before < len(data)


def test_processes_that_start_together_agree(tmp_path):
    manifest = write_manifest(tmp_path / "a.csv")
    script, logs = tmp_path / "load.py", [tmp_path / f"{n}.log" for n in range(3)]
    script.write_text(
        "import sys; from w2v2.data.utterances import load_manifest\n"
        "print(load_manifest([sys.argv[1]], cache_dir=sys.argv[2])[0]._fingerprint)"
    )
    processes = [Program([script, manifest, tmp_path / "cache"], log, environment()) for log in logs]
    assert [process.wait(SECONDS) for process in processes] == [0, 0, 0], [log.read_text() for log in logs]
    [path] = (tmp_path / "cache").iterdir()
    assert {f"utterances-{log.read_text().split()[-1]}.arrow" for log in logs} == {path.name}


def load(path, framing=None, **changes):
    """The utterances of a manifest, in the folder beside it."""
    args = dict(output_dir=path.parent / "run", data_root=None, dry_run=False, min_seconds=2.0, max_seconds=None)
    args |= dict(crop_seconds=8.0, length_grid_seconds=0.32) | changes
    return load_utterances([str(path)], SimpleNamespace(**args), framing or make_framing())[0]


def make_framing(mask_length=10):
    return Framing(Wav2Vec2Config(mask_time_length=mask_length), normalize=False)


@pytest.mark.parametrize("most", [None, 12.0])
@pytest.mark.parametrize("least", [0.0, 2.0])
def test_rows_of_a_fitting_length_stay_in_their_order(tmp_path, least, most):
    seconds = np.random.default_rng(0).uniform(0.1, 14, 61).round(3).tolist()
    samples = [round(length * SAMPLING_RATE) for length in seconds]
    names = [f"/data/{row}.wav" for row in range(61)]
    found = load(write_csv(tmp_path / "a.csv", names, seconds), min_seconds=least, max_seconds=most)
    short = [n < max(least * SAMPLING_RATE, make_framing().min_samples) for n in samples]
    long = [n > (most or math.inf) * SAMPLING_RATE for n in samples]
    kept = [row for row in range(61) if not short[row] and not long[row]]
    assert found.table["audio"][:] == [names[row] for row in kept]
    assert found.num_samples.tolist() == found.table["num_samples"][:] == [samples[row] for row in kept]
    assert found.num_samples.dtype == np.int32
    assert found.dropped == {"too_short": sum(short), "too_long": sum(long), "unreadable": 0}
    lost = [sum(n for n, is_lost in zip(samples, rows, strict=True) if is_lost) for rows in (short, long)]
    assert [found.dropped_hours[why] * 3600 * SAMPLING_RATE for why in ("too_short", "too_long")] == pytest.approx(lost)
    assert [file["filename"] for file in found.table.cache_files] == list(map(str, (tmp_path / "run/cache").iterdir()))


def test_deep_crops_of_compressed_files_are_told_of_once(tmp_path, caplog):
    rows = [("/a/talk.mp3", 0), ("/a/talk.mp3", 290), ("/a/talk.MP3", 900), ("/a/talk.wav", 900), ("/a/short.opus", 0)]
    path = tmp_path / "a.csv"
    path.write_text("audio,start,duration\n" + "".join(f"{name},{start},20\n" for name, start in rows))
    found = load(path)
    (record,) = [one for one in caplog.records if "compressed" in one.getMessage()]
    assert record.getMessage() in found.warnings
    assert record.getMessage().startswith("2 of 5 utterances end more than 5 minutes into a compressed file")
    assert "pack_audio.py" in record.getMessage()


def test_a_channel_that_a_file_lacks_is_found_at_the_start(tmp_path):
    soundfile.write(tmp_path / "mono.wav", np.full(16_000, 0.1), SAMPLING_RATE)
    table = pa.table({"id": ["a", "b"], "audio": [str(tmp_path / "mono.wav")] * 2, "channel": [0, 1]})
    (found,) = inspect_some(map_table(table, None))
    assert (found["id"], found["reason"]) == ("b", "has 1 channels, and the manifest asks for number 2")


@pytest.mark.parametrize("with_channel", [False, True])
def test_stereo_that_cancels_out_is_counted_and_told_of(tmp_path, caplog, with_channel):
    for name, right in (("a", 1), ("b", -1), ("c", 0.5), ("d", -0.9)):
        side = np.sin(np.arange(48_000) / 20) / 2
        soundfile.write(tmp_path / f"{name}.wav", np.stack([side, right * side], 1), SAMPLING_RATE)
    table = pa.table({"id": list("abcde"), "audio": [str(tmp_path / f"{name}.wav") for name in "abcde"]})
    table = table.append_column("channel", pa.array([0] * 5)) if with_channel else table
    utterances = Utterances(map_table(table, None), np.full(5, 48_000, np.int32), {})
    assert inspect_some(utterances.table) == [{"id": "e", "audio": str(tmp_path / "e.wav"), "reason": "does not exist"}]
    messages = [record.getMessage() for record in caplog.records]
    assert [message[:12] for message in messages] == ([] if with_channel else ["2 of 5 files"])
    assert with_channel or ("cancel out" in messages[0] and "b.wav" in messages[0] and "`channel`" in messages[0])


def test_a_dry_run_leaves_no_table_behind(tmp_path):
    manifest = write_manifest(tmp_path / "a.csv", rows=5)
    assert len(load(manifest, min_seconds=0.0, dry_run=True).table) == 5 and not (tmp_path / "run").exists()


def test_a_crop_too_short_for_a_masked_span_is_too_short(tmp_path):
    """0.45 s holds a span of 20 frames and one beside it, but on a grid of 0.3 s only 0.32 s of it is heard."""
    manifest, framing = write_csv(tmp_path / "a.csv", ["/a.wav", "/b.wav"], [0.45, 0.75]), make_framing(mask_length=20)
    found = load(manifest, framing, min_seconds=0.0, length_grid_seconds=0.3)
    assert 0.32 < framing.min_samples / SAMPLING_RATE < 0.45
    assert found.table["audio"][:] == ["/b.wav"] and found.dropped["too_short"] == 1


def test_nothing_left_is_a_slip_that_counts_the_reasons(tmp_path):
    manifest = write_csv(tmp_path / "a.csv", ["/a.wav", "/b.wav", "/c.wav"], [1.0, 1.5, 30.0])
    with pytest.raises(UserError, match=r"left of 3 \(2 shorter than 2 s, 1 longer than --max_seconds .*0 unreadable"):
        load(manifest, max_seconds=20.0)


def test_utterances_beyond_int32_count_as_too_long(tmp_path):
    found = load(write_csv(tmp_path / "a.csv", ["/a.wav", "/endless.wav"], [3.0, 40 * 3600.0]))
    assert found.table["audio"][:] == ["/a.wav"] and found.dropped["too_long"] == 1


def test_the_hours_of_many_long_files_do_not_overflow():
    lengths = np.full(200, 2**31 - 1, np.int32)
    assert Utterances(None, lengths, {}).hours == pytest.approx(200 * (2**31 - 1) / SAMPLING_RATE / 3600)
