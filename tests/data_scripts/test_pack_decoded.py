"""Packing audio that has to be decoded: what stands in the shard is what training hears, all of it, and one side alone."""

import tarfile

import numpy as np
import pack_audio
import pandas as pd
import pytest
import soundfile
from conftest import write_csv
from encoding import encode, whole
from test_pack_audio import pack, packed_rows, read_row

from w2v2.audio.crops import read_crop
from w2v2.audio.decoding import AudioError


@pytest.mark.parametrize(
    ("name", "codec", "rate", "options"),
    [
        ("a.webm", "libopus", 48_000, {}),
        ("a.m4a", "aac", 44_100, {}),
        ("a.mp3", "libmp3lame", 32_000, dict(container="mp3", piped=True)),
        ("a.mp3", "libmp3lame", 16_000, dict(container="mp3", bit_rate=64_000, write_xing="0")),
    ],
)
def test_compressed_files_are_packed_to_their_end(tmp_path, name, codec, rate, options):
    noise = 0.1 * np.random.default_rng(0).standard_normal(3 * rate)
    path = encode(tmp_path / name, noise, rate, codec, **options)
    (row,) = packed_rows(pack(write_csv(tmp_path / "m.csv", [path]), tmp_path / "packed"))
    decoded, _ = whole(path)
    assert row["num_samples"] == len(decoded) * 16_000 // rate >= 48_000
    np.testing.assert_array_equal(read_row(row), np.rint(read_crop(path) * 32_768).clip(-32_768, 32_767))


def test_both_sides_of_a_call_are_packed_apart(tmp_path):
    sides = np.random.default_rng(0).integers(-9_000, 9_000, (16_000, 2)).astype(np.int16)
    soundfile.write(tmp_path / "call.wav", sides, 16_000)
    (tmp_path / "m.csv").write_text("audio,channel,speaker\ncall.wav,A,a\ncall.wav,B,b\n")
    folder = pack(tmp_path / "m.csv", tmp_path / "packed")
    for row, side in zip(packed_rows(folder), sides.T, strict=True):
        np.testing.assert_array_equal(read_row(row), side)
    assert "channel" not in pd.read_parquet(folder / "manifest.parquet").columns


def test_a_file_that_fails_spoils_no_other(tmp_path, monkeypatch):
    """Two files of two utterances each, in turn: the second cannot be decoded to its end."""
    paths = [encode(tmp_path / f"{n}.mp3", np.full(48_000, 0.1 * n), 16_000, "libmp3lame") for n in (1, 2)]
    write = pack_audio.write_seekable

    def fail_late(audio, copy):
        write(audio, copy)
        if audio == paths[1]:
            raise AudioError(audio, "is damaged")

    monkeypatch.setattr(pack_audio, "write_seekable", fail_late)
    rows = "".join(f"{path},{start},1.0\n" for start in (0.5, 1.5) for path in paths)
    (tmp_path / "m.csv").write_text("audio,start,duration\n" + rows)
    flags = ["--shard_hours", 1, "--max_skipped_fraction", 0.5]
    found = packed_rows(pack(tmp_path / "m.csv", tmp_path / "packed", *flags))
    assert len(found) == 2
    for row in found:
        assert np.abs(read_row(row) / 32_768 - 0.1).max() < 0.01


def test_members_of_a_tar_are_packed_as_files_are(tmp_path, monkeypatch):
    """Segments of an MP3, which is decoded once, and of a WAV, which is not copied."""
    path = encode(tmp_path / "a.mp3", np.linspace(0, 0.5, 48_000), 16_000, "libmp3lame")
    soundfile.write(tmp_path / "b.wav", np.linspace(-0.5, 0.5, 48_000), 16_000)
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        for name in ("a.mp3", "b.wav"):
            tar.add(tmp_path / name, name)
    with tarfile.open(tmp_path / "all.tar") as tar:
        members = {path.name: f"all.tar:{path.offset_data}:{path.size}" for path in tar}
    write, copied = pack_audio.write_seekable, []
    monkeypatch.setattr(pack_audio, "write_seekable", lambda audio, copy: copied.append(audio) or write(audio, copy))
    shards = []
    for form, audio in (("files", dict.fromkeys(members)), ("members", members)):
        rows = [f"{n}{at},{audio[n] or n},{at},1.0\n" for n in members for at in (0.25, 1.5)]
        (tmp_path / f"{form}.csv").write_text("id,audio,start,duration\n" + "".join(rows))
        folder = pack(tmp_path / f"{form}.csv", tmp_path / form, "--shard_hours", 1)
        shards.append((folder / "shard-00000.wav").read_bytes())
    assert shards[0] == shards[1] and len(shards[0]) == 44 + 2 * 4 * 16_000
    assert copied == [path, f"{tmp_path}/{members['a.mp3']}"]
