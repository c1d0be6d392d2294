"""Crops equal the same part of the whole file, and no bad file gives an array."""

import contextlib
import errno
import os
import pickle

import numpy as np
import pytest
import soundfile
import soxr

from w2v2.audio import files
from w2v2.audio.crops import SAMPLING_RATE, AudioError, measure_length, read_crop, read_pcm

FORMATS = [
    ("wav", {}),
    ("flac", {}),
    ("ogg", {}),  # Vorbis
    ("mp3", {}),
]


def noise(num_frames: int, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(num_frames)).clip(-1, 1).astype(np.float32)


def write(path, samples, rate=SAMPLING_RATE, **options):
    soundfile.write(str(path), samples, rate, **options)
    return str(path)


def set_flac_length(path, num_frames: int):
    """Overwrite the 36-bit number of samples in the FLAC's STREAMINFO block."""
    content = bytearray(path.read_bytes())
    content[21] = (content[21] & 0xF0) | (num_frames >> 32)
    content[22:26] = (num_frames & 0xFFFFFFFF).to_bytes(4, "big")
    path.write_bytes(content)


@pytest.mark.parametrize("suffix, options", FORMATS, ids=[suffix for suffix, _ in FORMATS])
@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100, 48_000])
def test_a_crop_equals_that_part_of_the_resampled_file(tmp_path, suffix, options, rate):
    path = write(tmp_path / f"speech.{suffix}", noise(4 * rate), rate, **options)
    decoded, _ = soundfile.read(path, dtype="float32")
    whole = soxr.resample(decoded, rate, SAMPLING_RATE, quality="HQ")
    assert measure_length(path) == len(read_crop(path)) == len(decoded) * SAMPLING_RATE // rate
    for start in (0, 1, 777, 16_001, 31_999, measure_length(path) - 5_000):
        crop = read_crop(path, start, 5_000)
        assert crop.dtype == np.float32 and crop.shape == (5_000,)
        np.testing.assert_allclose(crop, whole[start : start + 5_000], atol=1e-5)


@pytest.mark.parametrize("num_channels", [2, 8])
def test_channels_are_averaged(tmp_path, num_channels):
    channels = np.stack([noise(16_000, seed) for seed in range(num_channels)], axis=1)
    path = write(tmp_path / "a.wav", channels, subtype="FLOAT")
    np.testing.assert_allclose(read_crop(path, 100, 500), channels[100:600].mean(axis=1), atol=1e-7)


@pytest.mark.parametrize("subtype", ["PCM_16", "FLOAT"])
def test_a_rounded_duration_shifts_or_pads_the_crop(tmp_path, subtype):
    path = write(tmp_path / "a.wav", noise(15_950), subtype=subtype)
    whole, _ = soundfile.read(path, dtype="int16" if subtype == "PCM_16" else "float32")
    padded, shifted = read_pcm(path, 0, 16_000, 16_000), read_pcm(path, 15_000, 1_100, 16_100)
    assert padded.dtype == shifted.dtype == whole.dtype
    np.testing.assert_array_equal(padded, np.pad(whole, (0, 50)))
    np.testing.assert_array_equal(shifted, whole[-1_100:])


@pytest.mark.parametrize(
    "window, zeros", [((0, 16_000), 50), ((15_000, 1_100), 150), ((15_000, 1_200), 0), ((15_000, 8_950), 0)]
)
def test_a_whole_utterance_ends_with_its_file(tmp_path, window, zeros):
    """A labelled segment must not hear what was said before it, which its text lacks."""
    path = write(tmp_path / "a.wav", noise(15_950))
    whole, _ = soundfile.read(path, dtype="int16")
    np.testing.assert_array_equal(read_pcm(path, *window), np.pad(whole[window[0] :], (0, zeros)))


@pytest.mark.parametrize(
    "window",
    [(0, 16_200, 16_200), (0, 24_200), (15_000, 12_000), (16_000, 1_000), (50_000, 1_000), (16_000, None),
     (0, 8_000, 24_200), (0, 8_000, 10**12)],
)  # fmt: skip
def test_a_file_shorter_than_its_manifest_says_is_an_error(tmp_path, window):
    path = write(tmp_path / "a.wav", noise(16_000))
    with pytest.raises(AudioError, match="shorter than its manifest says"):
        read_pcm(path, *window)


@pytest.mark.parametrize("suffix", ["flac", "mp3", "wav", "ogg"])
def test_a_truncated_file_never_gives_a_short_array(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    write(path, noise(320_000))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(AudioError):
        read_crop(str(path), 0, 320_000)
    with pytest.raises(AudioError):
        read_crop(str(path), 300_000, 4_000)
    assert len(read_crop(str(path), 0, 16_000)) == 16_000  # the part that is whole serves


@pytest.mark.parametrize(
    ("claimed", "held", "length"),
    [(32_000, 16_000, None), (32_000, 31_999, 15_999), (2**32 - 1, 16_000, 8_000), (2**31 - 4_096, 16_000, 8_000)],
)
def test_a_wav_that_was_cut_short_has_no_length(tmp_path, claimed, held, length):
    """Streams do not know their size beforehand, and claim the largest."""
    path = tmp_path / "a.wav"
    write(path, noise(16_000))
    content = path.read_bytes()
    path.write_bytes(content[:40] + claimed.to_bytes(4, "little") + content[44 : 44 + held])
    if length is None:
        with pytest.raises(AudioError, match="is cut short: 16,000 of the 32,000 bytes"):
            measure_length(str(path))
    else:
        assert measure_length(str(path)) == length


def test_a_flac_damaged_in_the_middle_is_an_error(tmp_path):
    path = tmp_path / "a.flac"
    write(path, noise(320_000))
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 3_000] = bytes(3_000)
    path.write_bytes(content)
    with pytest.raises(AudioError, match="damaged"):
        read_crop(str(path))


@pytest.mark.parametrize("claimed", [0, 2**36 - 1])
def test_an_unknown_or_absurd_length_is_not_believed(tmp_path, claimed):
    path = tmp_path / "a.flac"
    write(path, noise(40_000))
    whole, _ = soundfile.read(path, dtype="int16")
    set_flac_length(path, claimed)
    assert measure_length(str(path)) == len(read_crop(str(path))) == 40_000
    np.testing.assert_array_equal(read_pcm(str(path), 5_000, 777), whole[5_000:5_777])
    set_flac_length(path, 50_000)
    with pytest.raises(AudioError):
        read_crop(str(path), 0, 50_000)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rate", [16_000, 8_000])
def test_nan_and_infinity_are_errors_inside_the_crop(tmp_path, bad, rate):
    samples = noise(4 * rate)
    samples[100] = bad
    path = write(tmp_path / "a.wav", samples, rate, subtype="FLOAT")
    with pytest.raises(AudioError, match="NaN or infinite"):
        read_crop(path, 0, 4_000)
    assert np.isfinite(read_crop(path, 40_000, 4_000)).all()


def test_an_audio_error_survives_pickling():
    error = pickle.loads(pickle.dumps(AudioError("a b.wav", "is gone")))
    assert (error.path, error.reason, str(error)) == ("a b.wav", "is gone", "a b.wav: is gone")


EXACT = "wav PCM_16, flac PCM_16, aiff PCM_16, wav PCM_U8, flac PCM_S8, au ULAW, wav ALAW".split(", ")


@pytest.mark.parametrize("kind", EXACT)
def test_16_bit_samples_stay_as_they_stand(tmp_path, kind):
    suffix, subtype = kind.split()
    path = write(tmp_path / f"a.{suffix}", 8 * noise(40_000), subtype=subtype)  # full scale, both ends clipped
    as_int16, _ = soundfile.read(path, dtype="int16")
    as_float, _ = soundfile.read(path, dtype="float32")
    crop = read_pcm(path, 777, 30_000)
    assert crop.dtype == np.int16 and crop.flags.c_contiguous
    np.testing.assert_array_equal(crop, as_int16[777:30_777])
    np.testing.assert_array_equal(read_crop(path, 777, 30_000), as_float[777:30_777])
    np.testing.assert_array_equal(crop / 32_768, as_float[777:30_777])


@pytest.mark.parametrize(
    "suffix, rate, channels, options",
    [
        ("wav", 16_000, 1, dict(subtype="PCM_24")),
        ("wav", 16_000, 1, dict(subtype="FLOAT")),
        ("flac", 16_000, 1, dict(subtype="PCM_24")),
        ("wav", 16_000, 2, dict(subtype="PCM_16")),
        ("flac", 8_000, 1, dict(subtype="PCM_16")),
        ("mp3", 16_000, 1, {}),
        ("ogg", 16_000, 1, {}),
    ],
)
def test_what_16_bits_would_not_hold_is_float32(tmp_path, suffix, rate, channels, options):
    samples = np.stack([noise(2 * rate, seed) for seed in range(channels)], axis=1)
    path = write(tmp_path / f"a.{suffix}", samples, rate, **options)
    crop = read_pcm(path, 100, 5_000)
    assert crop.dtype == np.float32
    assert (np.rint(crop * 32_768) != crop * 32_768).any()
    np.testing.assert_array_equal(crop, read_crop(path, 100, 5_000))


@pytest.mark.parametrize(("number", "num_tries"), [(errno.ESTALE, 3), (errno.EMFILE, 3), (errno.ENOENT, 1)])
@pytest.mark.parametrize("failures", [1, 2, 3])
def test_a_transient_error_of_opening_is_tried_again(tmp_path, monkeypatch, number, num_tries, failures):
    path, opened, tries = write(tmp_path / "a.wav", noise(16_000)), os.open, []

    def fail_first(name, *rest):
        tries.append(name)
        if len(tries) <= failures:
            raise OSError(number, os.strerror(number), name)
        return opened(name, *rest)

    monkeypatch.setattr(files, "PAUSES", (0, 0))
    monkeypatch.setattr(os, "open", fail_first)
    with pytest.raises(AudioError) if failures >= num_tries else contextlib.nullcontext():
        assert measure_length(path) == 16_000
    assert len(tries) == min(failures + 1, num_tries)
