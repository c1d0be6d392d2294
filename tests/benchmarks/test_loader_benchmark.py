"""The benchmark of reading and waiting runs on what it synthesizes and on a given manifest; what its numbers are is not tested."""

import json
import sys
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, PartialState
from conftest import tiny_config, write_csv, write_tones

sys.path[:0] = [str(Path(__file__).resolve().parents[2] / folder) for folder in ("benchmarks", "data_scripts")]

import corpus  # noqa: E402
import loader  # noqa: E402
import report  # noqa: E402


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Flags of a run that takes seconds."""
    AcceleratorState._reset_state(True)
    PartialState._reset_state()
    monkeypatch.setattr(loader, "LEAST_SECONDS", 0.0)
    tiny_config().save_pretrained(tmp_path / "model")
    flags = ["--config_name", str(tmp_path / "model"), "--pairs", "2", "--updates", "1", "--num_workers", "0"]
    return [*flags, "--device", "cpu", "--batch_hours", "0.005", "--micro_batch_seconds", "16"]


def run(flags, capsys) -> dict:
    assert loader.main(flags) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_synthesized_audio_is_measured_in_every_format(small, capsys):
    values = run([*small, "--hours", "0.01"], capsys)
    assert values["pcm_over_flac"] > 0 and 0 <= values["wait_fraction"] <= 1
    assert {"flac", "packed"} <= values["audio_seconds_per_cpu_second"].keys()
    assert values["audio_seconds_per_cpu_second"]["packed"]["megabytes_per_hour"] == pytest.approx(115.2)
    assert {"date", "command", "cpu", "cores", "versions", "settings"} <= values.keys()


def test_a_manifest_is_measured_and_a_slip_is_one_line(small, capsys, tmp_path):
    seconds = [2.5, 3.0, 2.0, 4.0]
    manifest = write_csv(tmp_path / "m.csv", write_tones(tmp_path / "audio", seconds), seconds)
    values = run([*small, "--manifest", str(manifest)], capsys)
    assert values["settings"]["utterances"] == 4
    assert loader.main([*small, "--pairs", "0"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_formats_hold_the_same_utterances(tmp_path):
    (tmp_path / "wav").mkdir()
    rows = corpus.synthesize(tmp_path / "wav", 0.005)
    assert sum(row["num_samples"] for row in rows) >= 0.005 * 3600 * 16_000
    manifests = corpus.make_formats(rows, tmp_path)
    tables = {name: corpus.load_manifest(path, probe=corpus.probe)[0] for name, path in manifests.items()}
    assert all(table["num_samples"] == [row["num_samples"] for row in rows] for table in tables.values())
    for original, flac, packed in zip(rows, tables["flac"], tables["packed"], strict=True):
        samples = corpus.read_pcm(original["audio"])
        assert (corpus.read_pcm(flac["audio"]) == samples).all() and (corpus.read_pcm(packed["audio"]) == samples).all()


def test_medians_and_tables(capsys):
    assert report.median_spread([3, 1, 2]) == {"median": 2.0, "min": 1.0, "max": 3.0}
    with pytest.raises(ValueError, match="no value"):
        report.median_spread([])
    report.print_table([["a", 1234.5, None], ["bcd", 0.00012345, 7]], ["name", "x", "n"])
    assert capsys.readouterr().out.splitlines() == [
        "name          x  n",
        "----  ---------  -",
        "a         1,234  –",
        "bcd   0.0001234  7",
    ]
