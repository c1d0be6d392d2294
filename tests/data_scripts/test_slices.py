"""`--slice I/N`: any number of parts, in any order, killed or not, join to the bytes that one process writes."""

import json
import os

import measure_audio
import numpy as np
import pack_audio
import pyarrow.parquet as pq
import pytest
import segment
import soundfile
from conftest import error_line
from slices import Slice, find_logs, read_records
from test_pack_audio import contents, manifest, pack

from w2v2.manifests.manifest import read_manifests

__all__ = ["manifest"]  # a fixture


def run(script, *arguments, status=0):
    assert script.main(list(map(str, arguments))) == status


@pytest.mark.parametrize("count", [1, 3, 8])
def test_slices_share_the_items_out(count):
    parts = [Slice(index, count).take(range(20)) for index in range(count)]
    assert sorted(item for part in parts for item in part) == list(range(20))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("channels", ["B", "BC", "AB", "C "])
def test_measured_channels_are_those_of_the_manifest(tmp_path, channels):
    soundfile.write(tmp_path / "a.wav", np.zeros((16_000, 4), np.float32), 16_000)
    rows = [f"u{n},a.wav,{start},{letter}" for n, (start, letter) in enumerate(zip((0, 0.5), channels, strict=False))]
    (tmp_path / "a.csv").write_text("\n".join(["id,audio,start,channel", *rows]) + "\n")
    run(measure_audio, tmp_path / "a.csv", "--output", tmp_path / "a.parquet")
    expected = read_manifests([tmp_path / "a.csv"])[0]["channel"].to_pylist()
    assert read_manifests([tmp_path / "a.parquet"])[0]["channel"].to_pylist() == expected
    assert expected[0] == "ABC".index(channels[0])


@pytest.mark.parametrize("text", ["3/3", "1", "1/2/3", "a/b", "0/0"])
def test_what_is_no_slice_is_refused(text, manifest, tmp_path, capsys):
    with pytest.raises(SystemExit):
        pack(manifest, tmp_path / "packed", "--slice", text)
    assert "write I/N" in error_line(capsys.readouterr().err)


@pytest.mark.parametrize("order", [["0/1"], ["1/2", "0/2"], ["4/5", "0/5", "2/5", "1/5", "3/5"], ["0/3", "1/2"]])
def test_packed_slices_join_to_the_same_bytes(manifest, tmp_path, order):
    """The last order lacks parts: the join packs what is missing."""
    whole, folder = contents(pack(manifest, tmp_path / "whole")), tmp_path / "packed"
    for part in order:
        pack(manifest, folder, "--slice", part)
        assert not (folder / "manifest.parquet").exists()
    assert contents(pack(manifest, folder)) == whole


def test_a_slice_keeps_what_it_has(manifest, tmp_path, monkeypatch):
    folder = pack(manifest, tmp_path / "packed", "--slice", "0/2")
    log, written = find_logs(folder / "packing.jsonl")[0], (folder / "shard-00000.wav").stat().st_mtime_ns
    with open(log, "a") as file:
        file.write('{"shard": "shard-0000')  # a kill
    pack(manifest, folder, "--slice", "0/2")
    assert (folder / "shard-00000.wav").stat().st_mtime_ns == written
    assert [record["shard"] for record in read_records([log])[1:]] == ["shard-00000.wav", "shard-00002.wav"]
    monkeypatch.setattr(pack_audio, "pack_shard", lambda path, *_: pytest.fail(f"{path.name} is there already"))
    pack(manifest, folder, "--slice", "2/4")  # another number of parts


@pytest.mark.parametrize(
    ("more", "said"),
    [(["--overwrite"], "would delete what other slices"), (["--shard_hours", 1], "holds another packing")],
)
def test_slices_of_other_packings_are_refused(manifest, tmp_path, capsys, more, said):
    folder = pack(manifest, tmp_path / "packed", "--slice", "0/2")
    before = contents(folder)
    pack(manifest, folder, "--slice", "1/2", *more, status=2)
    assert said in error_line(capsys.readouterr().err) and contents(folder) == before


@pytest.fixture
def corpus(tmp_path):
    """Files of unknown length; one is broken."""
    for number in range(7):
        soundfile.write(tmp_path / f"{number}.flac", np.zeros(16_000 + number), 16_000)
    (tmp_path / "4.flac").write_bytes(b"no audio")
    lines = [json.dumps({"audio": f"{number}.flac", "text": f"t{number}"}) for number in range(7)]
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    return tmp_path


def test_measuring_takes_as_many_processes_as_it_is_told(corpus, monkeypatch):
    told, measure_lengths = [], measure_audio.measure_lengths

    def measure(*args):
        told.append(args[-1])
        return measure_lengths(*args)

    monkeypatch.setattr(measure_audio, "measure_lengths", measure)
    run(measure_audio, corpus / "m.jsonl", "--output", corpus / "whole.parquet")
    run(measure_audio, corpus / "m.jsonl", "--output", corpus / "parts.parquet", "--num_workers", "1")
    assert told == [1]
    assert len(read_records([corpus / "parts.measuring" / "lengths.jsonl"])) == 6  # each once, the broken one apart
    assert (corpus / "parts.parquet").read_bytes() == (corpus / "whole.parquet").read_bytes()


def test_measured_slices_join_to_the_same_manifest(corpus):
    run(measure_audio, corpus / "m.jsonl", "--output", corpus / "whole.parquet")
    for part in ("2/3", "0/3", "1/3"):
        run(measure_audio, corpus / "m.jsonl", "--output", corpus / "parts.parquet", "--slice", part)
    assert not (corpus / "parts.parquet").exists()
    logs = find_logs(corpus / "parts.measuring" / "lengths.jsonl")
    assert sorted(os.path.basename(record[0]) for record in read_records(logs)) == [
        f"{n}.flac" for n in (0, 1, 2, 3, 5, 6)
    ]
    run(measure_audio, corpus / "m.jsonl", "--output", corpus / "parts.parquet")
    assert (corpus / "parts.parquet").read_bytes() == (corpus / "whole.parquet").read_bytes()
    assert (corpus / "parts.skipped.jsonl").read_bytes() == (corpus / "whole.skipped.jsonl").read_bytes()
    table = pq.read_table(corpus / "parts.parquet")
    assert table["num_samples"].to_pylist() == [16_000 + number for number in range(7) if number != 4]
    assert table["text"][4].as_py() == "t5"


@pytest.mark.parametrize("script", [pack_audio, segment])
def test_slices_need_lengths(corpus, capsys, script):
    output = ["--output_dir", corpus / "out"] if script is pack_audio else ["--output", corpus / "out.csv"]
    run(script, corpus / "m.jsonl", *output, "--slice", "0/2", status=2)
    assert "7 rows have none: run measure_audio.py first" in error_line(capsys.readouterr().err)
