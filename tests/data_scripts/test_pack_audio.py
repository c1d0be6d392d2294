"""`pack_audio.py`: the same utterances from few WAV files, whole after any interruption, and one line for a slip."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pack_audio
import pandas as pd
import pytest
import soundfile
import soxr
from conftest import error_line, run_here, write_csv, write_recipe
from datasets import Dataset

import pretrain
from w2v2.audio.crops import SAMPLING_RATE, read_crop, read_pcm, write_seekable
from w2v2.data.utterances import load_manifest

ROOT = Path(__file__).resolve().parents[2]
SECONDS = [0.5, 0.25, 0.9, 1.3, 0.5, 1.0, 0.3]
SHARD_HOURS = 1.9 / 3600  # three shards: of 3, 2 and 2 utterances


def write_noise(path: Path, seconds=0.5, rate=16_000, channels=1, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = 0.1 * np.random.default_rng(len(str(path))).standard_normal((round(seconds * rate), channels))
    soundfile.write(path, samples.clip(-1, 1), rate, **options)
    return path


@pytest.fixture
def manifest(tmp_path):
    """Seven FLAC files with text and speakers."""
    rows = []
    for number, seconds in enumerate(SECONDS):
        path = write_noise(tmp_path / "audio" / ("x" * number) / f"{number}.flac", seconds)
        rows.append(dict(id=f"u{number}", audio=str(path), duration=seconds, text=f"word {number}", speaker="s"))
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def flags_for(manifest, folder, *more) -> list[str]:
    flags = [manifest, "--output_dir", folder, "--shard_hours", SHARD_HOURS, "--num_workers", 1, *more]
    return list(map(str, flags))


def pack(manifest, folder, *more, status=0):
    assert pack_audio.main(flags_for(manifest, folder, *more)) == status
    return folder


def packed_rows(folder) -> list[dict]:
    return load_manifest([str(folder)], data_root=str(ROOT))[0].to_list()


def read_row(row) -> np.ndarray:
    start = round(row["start"] * SAMPLING_RATE)
    return read_pcm(row["audio"], start, row["num_samples"], stop=start + row["num_samples"])


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# -- what is packed


def test_shards_hold_the_same_utterances_in_the_same_order(manifest, tmp_path):
    folder = pack(manifest, tmp_path / "packed")
    assert len(list(folder.glob("shard-*.wav"))) == 3
    before = load_manifest([str(manifest)])[0].to_list()
    for old, new in zip(before, packed_rows(folder), strict=True):
        assert all(old[name] == new[name] for name in ("id", "num_samples", "text", "speaker"))
        np.testing.assert_array_equal(read_row(new), soundfile.read(old["audio"], dtype="int16")[0])


def test_standard_tools_read_the_folder_wherever_it_is(manifest, tmp_path):
    folder = tmp_path / "else where" / "it's #1"
    folder.parent.mkdir()
    pack(manifest, tmp_path / "packed").rename(folder)
    shutil.rmtree(tmp_path / "audio")
    assert sum(len(read_row(row)) for row in packed_rows(folder)) == round(sum(SECONDS) * SAMPLING_RATE)
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=folder, capture_output=True, check=True)
    for row in pd.read_parquet(folder / "manifest.parquet").itertuples():
        shard, rate = soundfile.read(folder / row.audio, dtype="int16")
        start = row.start * rate
        assert rate == 16_000 and start == int(start) and start + row.num_samples <= len(shard)


def test_other_audio_is_resampled_averaged_rounded_and_clipped(tmp_path, capfd):
    path, loud = write_noise(tmp_path / "cd.wav", 1.0, 44_100, 2), tmp_path / "loud.wav"
    soundfile.write(loud, np.array([0.5, 1.5, -0.5, -1.5, 1.0] * 100), 16_000, subtype="FLOAT")
    decoded, rate = soundfile.read(path, dtype="float32")
    expected = soxr.resample(decoded.mean(axis=1), rate, 16_000, quality="HQ") * 32_768
    first, second = packed_rows(pack(write_csv(tmp_path / "m.csv", [path, loud]), tmp_path / "packed"))
    np.testing.assert_allclose(read_row(first), expected, atol=0.51)
    assert read_row(second)[:5].tolist() == [16_384, 32_767, -16_384, -32_768, 32_767]
    assert "0 utterances are shorter than their manifest says; 200 samples beyond full scale" in capfd.readouterr().out


@pytest.mark.parametrize("suffix", ["flac", "mp3"])
def test_segments_are_packed_from_their_start(tmp_path, suffix, monkeypatch):
    path = write_noise(tmp_path / f"long.{suffix}", 3.0)
    whole = np.rint(read_crop(str(path)) * 32_768)
    decoded = []
    monkeypatch.setattr(pack_audio, "write_seekable", lambda *names: decoded.append(names) or write_seekable(*names))
    (tmp_path / "m.csv").write_text("audio,start,duration\n" + "".join(f"{path},{s},1.0\n" for s in (0.0, 0.5, 2.0)))
    rows = packed_rows(pack(tmp_path / "m.csv", tmp_path / "packed", "--shard_hours", 1))
    for row, begin in zip(rows, (0, 8_000, 32_000), strict=True):
        np.testing.assert_array_equal(read_row(row), whole[begin : begin + 16_000])
    assert len(decoded) == (suffix == "mp3")  # once for all of its segments
    assert not list((tmp_path / "packed").glob("*.w64"))


def test_a_channel_is_packed_alone(tmp_path):
    path = write_noise(tmp_path / "call.wav", 1.0, channels=2)
    table = {
        "id": list("ab"),
        "audio": [str(path)] * 2,
        "start": [0.0] * 2,
        "num_samples": [16_000] * 2,
        "channel": [1, 0],
    }
    pack_audio.pack_shard(tmp_path / "a.wav", Dataset.from_dict(table), range(2))
    sides = soundfile.read(path, dtype="int16")[0].T[::-1]
    np.testing.assert_array_equal(soundfile.read(tmp_path / "a.wav", dtype="int16")[0], np.concatenate(sides))


@pytest.mark.parametrize("overshoot, packed", [(0.005, 32_080), (0.25, 32_000)])
def test_a_rounded_duration_never_reaches_the_next_utterance(tmp_path, overshoot, packed):
    """Up to 10 ms are filled with zeros, as in training; beyond that the utterance gets its true length."""
    paths = [write_noise(tmp_path / f"{name}.flac", 2.0) for name in "ab"]
    folder = pack(write_csv(tmp_path / "m.csv", paths, [2.0 + overshoot] * 2), tmp_path / "packed")
    for path, row in zip(paths, packed_rows(folder), strict=True):
        whole, _ = soundfile.read(path, dtype="int16")
        assert row["num_samples"] == packed
        np.testing.assert_array_equal(read_row(row), np.pad(whole, (0, packed - len(whole))))


def test_unreadable_utterances_are_left_out_and_listed(tmp_path, capsys):
    good = [write_noise(tmp_path / f"{name}.flac") for name in "abc"]
    (tmp_path / "broken.flac").write_bytes(b"no audio")
    audio = [good[0], tmp_path / "broken.flac", good[1], tmp_path / "gone.wav", good[2]]
    manifest = write_csv(tmp_path / "m.csv", audio, [0.5, 0.5, 0.5, 0.5, 9.0])
    folder = pack(manifest, tmp_path / "packed", status=2)
    assert "3 of 5 utterances cannot be read, more than --max_skipped_fraction 0.01" in capsys.readouterr().err
    assert not (folder / "manifest.parquet").exists()
    pack(manifest, folder, "--max_skipped_fraction", 0.6)
    assert [row["id"] for row in packed_rows(folder)] == [str(good[0]), str(good[1])]
    np.testing.assert_array_equal(read_row(packed_rows(folder)[1]), soundfile.read(good[1], dtype="int16")[0])
    skipped = [json.loads(line) for line in (folder / "skipped_audio.jsonl").read_text().splitlines()]
    assert [entry["id"] for entry in skipped] == [str(audio[1]), str(audio[3]), str(audio[4])]
    for entry, reason in zip(skipped, ("not audio", "does not exist", "shorter than its manifest"), strict=True):
        assert reason in entry["reason"]


@pytest.mark.parametrize("num_samples", [[10], [5] * 7, [100, 1, 1, 1], [1, 100, 100, 1], [3, 3, 4, 10, 1]])
def test_shards_partition_the_rows(num_samples):
    parts = list(pack_audio.cut_shards(num_samples, 10 / SAMPLING_RATE / 3600).values())
    assert [row for rows in parts for row in rows] == list(range(len(num_samples)))
    assert all(len(rows) == 1 or sum(num_samples[row] for row in rows) <= 10 for rows in parts)


def test_any_number_of_workers_writes_the_same_bytes(manifest, tmp_path):
    assert contents(pack(manifest, tmp_path / "one")) == contents(pack(manifest, tmp_path / "two", "--num_workers", 3))


# -- verification and slips


def flip(path: Path, byte: int):
    damaged = bytearray(path.read_bytes())
    damaged[byte] ^= 1
    path.write_bytes(damaged)


@pytest.mark.parametrize(
    "damage, named",
    [
        (lambda folder: None, None),
        (lambda folder: flip(folder / "shard-00002.wav", 5_000), "shard-00002.wav"),
        (lambda folder: os.truncate(folder / "shard-00001.wav", 1_000), "shard-00001.wav"),
        (lambda folder: (folder / "shard-00001.wav").unlink(), "shard-00001.wav"),
        (lambda folder: flip(folder / "manifest.parquet", 100), "manifest.parquet"),
        (lambda folder: (folder / "manifest.parquet").unlink(), "no finished packing"),
        (lambda folder: (folder / "SHA256SUMS").unlink(), "no finished packing"),
    ],
)
def test_verification_names_what_is_wrong(manifest, tmp_path, capsys, damage, named):
    folder = pack(manifest, tmp_path / "packed")
    damage(folder)
    capsys.readouterr()
    assert pack_audio.main(["--verify", str(folder)]) == (2 if named else 0)
    if named:
        assert named in error_line(capsys.readouterr().err)
    else:
        assert "3 shards and the manifest are as they were written" in capsys.readouterr().out


def test_other_input_or_settings_are_refused(manifest, tmp_path, capsys):
    folder = pack(manifest, tmp_path / "packed")
    before = contents(folder)
    other = tmp_path / "other.jsonl"
    other.write_text(manifest.read_text().replace("word 6", "another word"))
    for source, more in ((other, []), (manifest, ["--shard_hours", 1])):
        pack(source, folder, *more, status=2)
        assert "--overwrite" in error_line(capsys.readouterr().err)
    assert contents(folder) == before
    pack(other, folder, "--overwrite", "--shard_hours", 1)
    assert packed_rows(folder)[-1]["text"] == "another word" and len(list(folder.glob("*.wav"))) == 1


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        ("train.jsonl --output_dir audio --overwrite", "holds other files or a source"),
        ("packed --output_dir packed --overwrite", "holds other files or a source"),
        ("none.csv --output_dir new", "none.csv"),
        ("train.jsonl", "give manifests and --output_dir"),
    ],
)
def test_a_slip_is_one_line_and_deletes_nothing(manifest, tmp_path, monkeypatch, capsys, command, complaint):
    pack(manifest, tmp_path / "packed")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert pack_audio.main(command.split()) == 2
    assert complaint in error_line(capsys.readouterr().err)
    assert sorted(path for path in tmp_path.rglob("*") if path.name != "new") == before


# -- training on it


def test_a_run_may_change_over_to_the_packed_folder(tmp_path):
    settings = dict(max_steps=2, save_steps=1, use_cpu=True, report_to=["none"], dataloader_num_workers=0)
    config = write_recipe(tmp_path, {}, batch_hours=0.002, micro_batch_seconds=4, **settings)
    packed, weights = pack(tmp_path / "train.csv", tmp_path / "packed"), {}
    for name in ("train.csv", "packed"):
        run = tmp_path / f"run on {name}"
        assert run_here(pretrain.main, config, "--train_data", tmp_path / name, "--output_dir", run) == 0
        weights[name] = (run / "model.safetensors").read_bytes()
    assert weights["train.csv"] == weights["packed"]
    resumed = tmp_path / "run on train.csv"
    shutil.rmtree(resumed / "checkpoint-2")
    (resumed / "model.safetensors").unlink()
    flags = ["--train_data", packed, "--output_dir", resumed, "--resume_from_checkpoint", "auto"]
    assert run_here(pretrain.main, config, *flags) == 0
    assert (resumed / "model.safetensors").read_bytes() == weights["packed"]
