"""`benchmarks/loader.py` runs on what it synthesizes and on a given manifest; what its numbers are is not tested."""

import json

import common
import loader
import pytest
from conftest import run_here, tiny_config, write_csv, write_tones

from w2v2.audio.crops import read_pcm
from w2v2.manifests.manifest import read_manifests


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Flags of a run that takes seconds."""
    monkeypatch.setattr(loader, "LEAST_SECONDS", 0.0)
    tiny_config().save_pretrained(tmp_path / "model")
    flags = ["--config_name", str(tmp_path / "model"), "--pairs", "2", "--updates", "1", "--num_workers", "0"]
    return [*flags, "--device", "cpu", "--batch_hours", "0.005", "--micro_batch_seconds", "16"]


def test_synthesized_audio_is_measured_in_every_format(small, capsys):
    loader.main([*small, "--hours", "0.01"])
    values = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert values["pcm_over_flac"] > 0 and 0 <= values["wait_fraction"] <= 1
    assert {"benchmark", "date", "command", "cpu", "cores", "versions", "settings", "files_to_gpu"} <= values.keys()
    assert values["waiting"].keys() == {"flac", "packed"}
    assert values["packed_over_flac"].keys() == set(loader.WAYS)
    formats = values["audio_seconds_per_cpu_second"]
    assert formats.keys() == {*loader.FORMATS, "packed"}
    for figures in formats.values():
        others = {"megabytes_per_hour", "whole_files", "microseconds_per_crop", "decoding_share"}
        assert figures.keys() == {*loader.WAYS, *others}
        assert 0 < figures["decoding_share"] <= 1
    assert formats["packed"]["megabytes_per_hour"] == pytest.approx(115.2, rel=1e-3)


def test_shards_are_streamed_beside_packed_ones(small, capsys):
    loader.main([*small, "--hours", "0.01", "--form", "parquet"])
    values = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert values["waiting"].keys() == {"flac", "packed", "streamed"}
    assert values["streamed_over_packed"].keys() == set(loader.WAYS)
    assert all(ratio["min"] > 0 for ratio in values["streamed_over_packed"].values())
    found = values["audio_seconds_per_cpu_second"]["streamed"]
    assert found["megabytes_per_hour"] == pytest.approx(115.2, rel=0.05)


def test_a_manifest_is_measured_and_a_slip_is_one_line(small, capsys, tmp_path):
    seconds = [2.5, 3.0, 2.0, 4.0]
    manifest = write_csv(tmp_path / "m.csv", write_tones(tmp_path / "audio", seconds), seconds)
    loader.main([*small, "--manifest", str(manifest)])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["settings"]["utterances"] == 4
    assert run_here(lambda: loader.main([*small, "--pairs", "0"])) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_formats_hold_the_same_utterances(tmp_path):
    rows = common.synthesize(tmp_path / "wav", 0.01)
    assert sum(row["num_samples"] for row in rows) >= 0.01 * 3600 * 16_000
    expected = [read_pcm(row["audio"]).tolist() for row in rows]
    shards = common.write_shards(rows, tmp_path / "shards", "tar", per_shard=3) + "/*.tar"
    for manifest in (common.write_files(rows, tmp_path, ".flac", None), common.pack(rows, tmp_path), shards):
        table, *_ = read_manifests([manifest])
        found = [read_pcm(r["audio"], round(r["start"] * 16_000), r["num_samples"]).tolist() for r in table.to_pylist()]
        assert found == expected
