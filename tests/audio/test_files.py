"""`w2v2.audio.files`: addresses `PATH:OFFSET:SIZE` give these bytes alone, and a wrong one is named."""

import io
import os

import numpy as np
import pytest
import soundfile

from w2v2.audio.crops import AudioError, is_compressed, measure_length, read_pcm
from w2v2.audio.files import AudioRange, open_regular
from w2v2.audio.inspection import measure_lengths
from w2v2.manifests.manifest import read_manifests


def encode(num_samples, kind="wav", seed=0):
    out = io.BytesIO()
    soundfile.write(out, np.random.default_rng(seed).uniform(-0.5, 0.5, num_samples), 16_000, format=kind)
    return out.getvalue()


def join(path, *parts):
    """Write parts one after another. Returns the address of each."""
    path.write_bytes(b"".join(parts))
    ends = np.cumsum(list(map(len, parts)))
    return [f"{path}:{end - len(part)}:{len(part)}" for end, part in zip(ends, parts, strict=True)]


def test_a_range_reads_as_a_file_of_its_bytes(tmp_path):
    content = bytes(range(200))
    [_, address, _] = join(tmp_path / "all", b"x" * 37, content, b"y" * 50)
    rng, oracle = np.random.default_rng(0), io.BytesIO(content)
    with open_regular(address) as file:
        assert file.peek(5) == content[:5] and file.peek(9, 198) == content[198:] and file.peek(4, 300) == b""
        for _ in range(500):
            if rng.integers(2):
                whence = int(rng.integers(3))
                base = (0, oracle.tell(), len(content))[whence]
                place = int(rng.integers(0, 260))
                assert file.seek(place - base, whence) == oracle.seek(place)
            if rng.integers(2):
                size = int(rng.integers(-1, 90))
                assert file.read(size) == oracle.read(size)
            else:
                ours, theirs = bytearray(30), bytearray(30)
                assert (file.readinto(ours), ours) == (oracle.readinto(theirs), theirs)
            assert file.tell() == oracle.tell()
        before = file.tell()
        assert file.seek(-1) == file.seek(-300, os.SEEK_END) == -1 and file.tell() == before


def test_neighbours_are_not_heard(tmp_path):
    """WAV after WAV, FLAC after FLAC, without a byte between them."""
    parts = [encode(length, kind, seed) for seed, (length, kind) in enumerate(
        [(16_000, "wav"), (20_000, "wav"), (24_000, "flac"), (28_000, "flac")]
    )]  # fmt: skip
    for part, address in zip(parts, join(tmp_path / "shard", *parts), strict=True):
        expected, _ = soundfile.read(io.BytesIO(part), dtype="int16")
        assert measure_length(address) == len(expected)
        np.testing.assert_array_equal(read_pcm(address), expected)


def test_only_the_range_is_read(tmp_path, monkeypatch):
    read = []
    own = AudioRange.readinto
    monkeypatch.setattr(AudioRange, "readinto", lambda self, view: read.append(own(self, view)) or read[-1])
    [_, address, _] = join(tmp_path / "shard", bytes(1 << 20), encode(16_000 * 60), bytes(1 << 20))
    assert len(read_pcm(address, 16_000 * 30, 16_000)) == 16_000
    assert sum(read) < 100_000  # of 1.9 MB, the crop is 32,000


@pytest.mark.parametrize(
    "range_, reason",
    [
        ("0:0", "asked for 0 bytes"),
        ("100:32000", "holds 32,044 bytes"),
        ("999999999999999999:999999999999999999", "holds 32,044 bytes"),
        ("10:4000", "not audio"),
        ("9999999999999999999:4", "does not exist"),  # no address: offsets have 18 digits at most
        ("-1:5", "does not exist"),
    ],
)
def test_a_wrong_range_is_named(tmp_path, range_, reason):
    (tmp_path / "a.tar").write_bytes(encode(16_000))
    with pytest.raises(AudioError, match=reason) as caught:
        measure_length(f"{tmp_path}/a.tar:{range_}")
    assert caught.value.path == f"{tmp_path}/a.tar:{range_}"


@pytest.mark.parametrize(
    "make, reason",
    [
        (lambda path: None, "which does not exist"),
        (os.mkdir, "which is a folder"),
        (os.mkfifo, "which is a pipe"),
        (lambda path: path.touch(), "which is an empty file"),
    ],
)
def test_a_container_has_to_be_a_file(tmp_path, make, reason):
    make(tmp_path / "a.tar")
    with pytest.raises(AudioError, match=f"a.tar:512:100: lies in .*a.tar, {reason}"):
        measure_length(f"{tmp_path}/a.tar:512:100")


def test_a_file_may_be_named_like_an_address(tmp_path):
    (tmp_path / "a.wav").write_bytes(encode(16_000))
    (tmp_path / "a.wav:0:32044").write_bytes(encode(4_000))
    assert measure_length(f"{tmp_path}/a.wav:0:32044") == 4_000


def test_manifests_may_hold_addresses(tmp_path):
    parts = [encode(16_000), encode(24_000, "flac"), encode(32_000, "ogg")]
    names = [os.path.basename(address) for address in join(tmp_path / "all.tar", *parts)]
    (tmp_path / "a.csv").write_text("audio\n" + "\n".join(names))
    table, skipped, _ = read_manifests([tmp_path / "a.csv"])
    assert table["audio"].to_pylist() == [f"{tmp_path}/{name}" for name in names] and not skipped
    assert table["num_samples"].to_pylist() == [16_000, 24_000, 32_000] and table["id"].to_pylist() == names
    assert list(map(is_compressed, table["audio"].to_pylist())) == [False, False, True]


def test_lengths_are_measured_anew_when_the_container_changes(tmp_path):
    addresses = join(tmp_path / "all", encode(16_000), encode(16_000))
    for _ in range(2):
        assert set(measure_lengths(addresses, measure_length, tmp_path / "cache").values()) == {16_000}
    log = (tmp_path / "cache" / "lengths.jsonl").read_text().splitlines()
    assert len(log) == 2
    join(tmp_path / "all", encode(16_000), encode(16_000), b"more")
    measure_lengths(addresses, measure_length, tmp_path / "cache")
    assert len((tmp_path / "cache" / "lengths.jsonl").read_text().splitlines()) == 4
