"""Every kind of audio file is heard from its first sample to its last: against FFmpeg's whole decode, written apart."""

import os
import signal
import struct
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
from encoding import encode, whole

from w2v2.audio.crops import SAMPLING_RATE, AudioError, measure_length, measure_rate, read_crop, read_pcm
from w2v2.audio.decoding import DecodedFile, SeekableFile, open_sound
from w2v2.audio.inspection import inspect_audio, inspect_files, map_files
from w2v2.data.loader import explain_loss

FRAGMENTS = {"movflags": "frag_keyframe+empty_moov"}
KINDS = """
mp3 mp3 16000 1, mp3 mp3 44100 2, mp3 mp3 16000 1 piped, mp3 mp3 48000 1 piped, mp2 mp2 16000 1 piped, mp3 avi 16000 1,
mp3 wav 16000 1, mp3 matroska 16000 1 piped, aac adts 16000 1 piped, aac ipod 16000 1, aac mp4 44100 2, aac mp4 16000 1 piped,
aac matroska 22050 1, aac flv 44100 1 piped, aac mpegts 16000 1 piped, libopus ogg 16000 1, libopus ogg 48000 2 piped,
libopus webm 48000 1, libopus webm 48000 1 piped, libopus matroska 16000 1, vorbis ogg 44100 2, vorbis ogg 16000 2 piped,
vorbis webm 48000 2, wmav2 asf 16000 1, wmav1 asf 44100 2 piped, libopencore_amrnb amr 8000 1, libopencore_amrnb 3gp 8000 1,
adpcm_ms wav 16000 1, adpcm_ms wav 8000 2 piped, adpcm_ima_wav wav 16000 2, adpcm_yamaha wav 16000 1, adpcm_ima_qt mov 16000 1,
adpcm_ima_qt aiff 16000 1, g722 wav 16000 1, g722 g722 16000 1 piped, g726 wav 8000 1, g723_1 wav 8000 1, real_144 rm 8000 1,
nellymoser flv 16000 1, wavpack wv 16000 1, wavpack wv 44100 2 piped, tta tta 16000 1, alac ipod 16000 1, ac3 ac3 48000 2,
eac3 eac3 48000 6 piped, flac flac 16000 1, flac flac 44100 2 piped, pcm_s16le wav 16000 1 piped, pcm_s24le wav 16000 1,
pcm_alaw wav 8000 1 piped, pcm_s16be aiff 16000 1, pcm_f32le w64 16000 2, pcm_mulaw au 8000 1, pcm_s16le mov 16000 1,
pcm_s24le matroska 16000 1 piped, pcm_s16be caf 16000 1
"""


def speech(num_frames: int, rate: int, channels: int = 1, seed: int = 0) -> np.ndarray:
    seconds, noise = np.arange(num_frames) / rate, np.random.default_rng(seed).standard_normal((num_frames, channels))
    pitch = 150 * (1 + np.arange(channels)) + 30 * seed
    return (
        0.4 * np.sin(2 * np.pi * pitch * seconds[:, None]) * np.sin(3 * seconds[:, None]) ** 2 + 0.02 * noise
    ).astype("f4")


def make(folder, kind: str, seconds: float = 3.1, seed: int = 0) -> str:
    codec, container, rate, channels, *piped = kind.split()
    options = {"vorbis": {"strict": "-2"}}.get(codec, {}) | (FRAGMENTS if container == "mp4" and piped else {})
    bit_rate = {"wmav1": 64_000, "wmav2": 32_000, "g723_1": 6_300}.get(codec)
    samples, path = (
        speech(round(seconds * int(rate)), int(rate), int(channels), seed),
        folder / f"{codec}{seed}.{container}",
    )
    return encode(path, samples, int(rate), codec, container, bool(piped), bit_rate, **options)


def check(path: str, frames: np.ndarray, rate: int) -> None:
    """Length, samples and crops of a file against its whole decode, (S, C)."""
    mixed = frames[:, 0] if frames.shape[1] == 1 else frames.mean(axis=1, dtype=np.float32)
    expected = mixed if rate == SAMPLING_RATE else soxr.resample(mixed, rate, SAMPLING_RATE, quality="HQ")
    length = len(frames) * SAMPLING_RATE // rate
    assert measure_length(path) == length == inspect_audio(path).num_samples
    heard = read_crop(path)
    np.testing.assert_array_equal(heard, expected[:length])
    for start in (0, 1, length // 3, length // 2 + 77, length - 5_000):
        for stop in (None, length):
            crop = read_pcm(path, start, 5_000, stop)
            crop = crop / np.float32(32_768) if crop.dtype == np.int16 else crop
            tolerance = 0 if rate == SAMPLING_RATE else 1e-6  # of the resampling filter's tails
            np.testing.assert_allclose(crop, heard[start : start + 5_000], rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", [kind.strip() for kind in KINDS.split(",")])
def test_a_file_is_what_ffmpeg_decodes_of_it(tmp_path, kind):
    path = make(tmp_path, kind)
    frames, rate = whole(path)
    assert abs(len(frames) / rate - 3.1) < 0.15  # encoders add a frame or two
    check(path, frames, rate)
    check_address(path)


def pack(path: str) -> str:
    """The address of a file between two copies of it in a tar."""
    tar_path, name = f"{path}.tar", os.path.basename(path)
    with tarfile.open(tar_path, "w") as tar:
        for folder in "abc":
            tar.add(path, f"{folder}/{name}")
    with tarfile.open(tar_path) as tar:
        member = tar.getmember(f"b/{name}")
    return f"{tar_path}:{member.offset_data}:{member.size}"


def check_address(path: str) -> None:
    """The bytes at an address are heard as the file of these bytes is."""
    address = pack(path)
    assert measure_length(address) == (length := measure_length(path)) and measure_rate(address) == measure_rate(path)
    assert inspect_audio(address) == replace(inspect_audio(path), path=address)
    for window in ((0, None), (0, 5_000), (length // 2 + 77, 5_000, length)):
        ours, theirs = read_pcm(address, *window), read_pcm(path, *window)
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


JOINED = ["mp3 mp3 16000 1", "mp3 mp3 16000 1 piped", "libopus ogg 16000 1", "vorbis ogg 16000 2", "flac flac 16000 1",
          "flac flac 16000 1 piped", "aac adts 16000 1", "flac flac 48000 1", "flac flac 48000 2"]  # fmt: skip


@pytest.mark.parametrize("seconds", [(2.5, 1.7, 0.9), (2.1, 2.1, 2.1), (1.5, 4.0, 6.0)])
@pytest.mark.parametrize("kind", JOINED)
def test_joined_files_are_heard_to_their_end(tmp_path, kind, seconds):
    parts = [make(tmp_path, kind, length, seed) for seed, length in enumerate(seconds)]
    path = tmp_path / "joined"
    path.write_bytes(b"".join(open(part, "rb").read() for part in parts))
    frames, rate = whole(path)
    apart = [whole(part)[0] for part in parts]
    assert abs(len(frames) - sum(map(len, apart))) < 0.25 * rate  # the delay of MP3's encoder is heard at each joint
    check(str(path), frames, rate)
    check_address(str(path))
    first = apart[0][: len(apart[0]) // 2]
    np.testing.assert_array_equal(frames[: len(first)], first)
    if "flac" in kind:
        np.testing.assert_array_equal(frames, np.concatenate(apart))
    end = apart[2][-rate // 4 :, 0][:1_000]
    windows = np.lib.stride_tricks.sliding_window_view(frames[-rate // 2 :, 0], len(end))
    assert np.abs(windows - end).max(axis=1).min() < 0.05  # the last part ends it


@pytest.mark.parametrize("num_bytes", range(4))
def test_a_joint_is_found_at_every_byte(tmp_path, num_bytes):
    """The words of four bytes that are compared begin at all of them."""
    part = Path(make(tmp_path, "flac flac 16000 1")).read_bytes()
    (tmp_path / "joined").write_bytes(part + bytes(num_bytes) + part)
    for path, kind in ((str(tmp_path / "joined"), DecodedFile), (make(tmp_path, "flac flac 16000 1"), SeekableFile)):
        for name in (path, pack(path)):
            with open_sound(name) as sound:
                assert type(sound) is kind


def test_joined_wav_files_are_refused(tmp_path):
    path = make(tmp_path, "pcm_s16le wav 16000 1")
    content = open(path, "rb").read()
    open(path, "wb").write(content + content)
    with pytest.raises(AudioError, match="holds several WAV files"):
        read_pcm(path, 0, 16_000)


def test_large_joined_flac_of_equal_parts_is_heard(tmp_path):
    """A seek to the first stream's last frame finds that of the second, which ends the file."""
    parts = [np.random.default_rng(seed).uniform(-0.5, 0.5, 40 * 16_000) for seed in (0, 1)]
    for number, samples in enumerate(parts):
        soundfile.write(tmp_path / f"{number}.flac", samples, 16_000)
    path = tmp_path / "joined.flac"
    path.write_bytes(b"".join((tmp_path / f"{number}.flac").read_bytes() for number in (0, 1)))
    assert path.stat().st_size > 1 << 21 and measure_length(str(path)) == 80 * 16_000
    for start in range(0, 40 * 16_000, 80_000):
        found = read_pcm(str(path), start, 8_000, stop=start + 8_000) / 32_768
        np.testing.assert_allclose(found, parts[0][start : start + 8_000], atol=1e-4)


def test_tags_are_no_audio(tmp_path):
    path = make(tmp_path, "mp3 mp3 16000 1 piped")
    frames, rate = whole(path)
    picture = b"\xff\xfb\x90\x64" * 3_000  # looks like frames of MP3
    size = len(picture) + 10
    id3 = (
        b"ID3\x03\0\0"
        + bytes(size >> shift & 127 for shift in (21, 14, 7, 0))
        + b"APIC"
        + struct.pack(">IH", len(picture), 0)
    )
    tagged = tmp_path / "tagged.mp3"
    tagged.write_bytes(id3 + picture + open(path, "rb").read() + b"TAG" + bytes(125))
    check(str(tagged), *whole(tagged))
    assert abs(measure_length(str(tagged)) - len(frames)) <= 1_152


def test_a_wav_whose_header_was_not_closed_is_heard(tmp_path):
    path = tmp_path / "piped.wav"
    soundfile.write(path, speech(40_000, 16_000)[:, 0], 16_000)
    expected = read_pcm(str(path))
    for size in (0, 2**32 - 1):
        content = bytearray(path.read_bytes())
        content[4:8] = content[40:44] = struct.pack("<I", size)
        path.write_bytes(content)
        np.testing.assert_array_equal(read_pcm(str(path)), expected)
        assert measure_length(str(path)) == 40_000


@pytest.mark.parametrize(
    "kind", ["pcm_s16le wav 16000 2", "flac flac 16000 2 piped", "aac mp4 16000 2", "wavpack wv 8000 2"]
)
def test_a_channel_picks_its_side(tmp_path, kind):
    path = make(tmp_path, kind)
    frames, rate = whole(path)
    for side in (0, 1):
        heard = read_crop(path, 0, 20_000, side)
        own = frames[:, side]
        own = own if rate == SAMPLING_RATE else soxr.resample(own, rate, SAMPLING_RATE, quality="HQ")
        np.testing.assert_allclose(heard, own[:20_000], rtol=0, atol=0 if rate == SAMPLING_RATE else 1e-6)
    assert read_pcm(path, 0, 500, channel=1).dtype == (np.float32 if "aac" in kind or rate == 8_000 else np.int16)
    with pytest.raises(AudioError, match="has 2 channels"):
        read_pcm(path, 0, 500, channel=2)


def test_facts_tell_what_is_in_a_file(tmp_path):
    side = speech(32_000, 16_000)[:, 0]
    other = speech(32_000, 16_000, seed=3)[:, 0]
    kinds = {"plain": side, "two": np.stack([side, other], 1), "opposite": np.stack([side, -0.9 * side], 1)}
    kinds |= {"half": np.stack([side, 0 * side], 1), "silent": 1e-5 * side, "clipped": (9 * side).clip(-1, 1)}
    for name, samples in kinds.items():
        soundfile.write(tmp_path / f"{name}.wav", samples, 16_000)
        encode(
            tmp_path / f"{name}.mka", samples, 16_000, "flac" if name == "clipped" else "wavpack", "matroska"
        ) if name != "clipped" else 0
    paths = sorted(str(path) for path in tmp_path.iterdir())
    (tmp_path / "gone.wav").write_bytes(b"these are words")
    for facts in inspect_files(paths):
        name = facts.path.rpartition("/")[2].partition(".")[0]
        assert (facts.num_samples, facts.sample_rate, facts.error) == (32_000, 16_000, None)
        assert facts.channels == kinds[name].reshape(32_000, -1).shape[1]
        flags = facts.is_silent, facts.is_clipped, facts.is_antiphase
        assert flags == (name == "silent", name == "clipped", name == "opposite"), facts
        assert facts.peak == pytest.approx(np.abs(kinds[name]).max(), abs=1e-4)
    assert "not audio" in inspect_audio(str(tmp_path / "gone.wav")).error


def test_the_beginning_tells_the_length_only_by_a_header(tmp_path):
    looked = (
        inspect_audio(make(tmp_path, "flac flac 16000 1"), 1.0),
        inspect_audio(make(tmp_path, "mp3 mp3 16000 1"), 1.0),
    )
    assert [facts.num_samples for facts in looked] == [49_600, None]


def test_a_decoder_that_crashes_takes_no_run_with_it(tmp_path):
    """The worker is lost, and a line says what to look for."""
    with pytest.raises(RuntimeError) as caught:
        list(map_files(["a", "b"], lambda path: os.kill(os.getpid(), signal.SIGSEGV), "Crashing"))
    assert "a damaged file crashed the decoder" in explain_loss(caught.value)


PLAYLISTS = {
    "a.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\n{secret}\n#EXT-X-ENDLIST\n",
    "b.mp3": "ffconcat version 1.0\nfile '{secret}'\n",
    "c.wav": "#EXTM3U\n#EXTINF:3,\nhttp://127.0.0.1:9/x.mp3\n",
    "d.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 5004 RTP/AVP 0\n",
}


@pytest.mark.parametrize("name", PLAYLISTS)
def test_no_file_makes_others_be_opened(tmp_path, name):
    secret = make(tmp_path, "aac adts 16000 1")
    path = tmp_path / name
    path.write_text(PLAYLISTS[name].format(secret=secret))
    with pytest.raises(AudioError, match="not audio"):
        read_pcm(str(path))


def test_names_are_never_addresses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(tmp_path, "mp3 mp3 16000 1")
    for name in (
        "concat:mp30.mp3|mp30.mp3",
        "http://127.0.0.1:9/a.mp3",
        "lavfi:sine",
        "data:audio/mp3;base64,AAAA",
        "-",
    ):
        with pytest.raises(AudioError, match="does not exist"):
            measure_length(name)


@pytest.mark.parametrize("kind", ["mp3 mp3 16000 1", "libopus ogg 48000 1", "aac adts 16000 1"])
def test_a_cut_compressed_file_is_as_long_as_its_rest(tmp_path, kind):
    """A crop beyond it is refused, and so is every crop of an utterance that should go on."""
    path = make(tmp_path, kind, seconds=10)
    content = open(path, "rb").read()
    open(path, "wb").write(content[: len(content) // 2])
    frames, rate = whole(path)
    check(path, frames, rate)
    assert 3.5 < len(frames) / rate < 6
    for window in ((0, 16_000, 160_000), (100_000, 16_000)):
        with pytest.raises(AudioError, match="shorter than its manifest says"):
            read_pcm(path, *window)
