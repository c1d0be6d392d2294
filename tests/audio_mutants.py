"""Damaged copies of audio files, and what has to hold of each: a program, because a decoder may crash or hang.

    python tests/audio_mutants.py FOLDER SEED COUNT

writes what it is at into FOLDER/last.txt and prints how many mutants were read and how many refused.
"""

import json
import resource
import sys
from pathlib import Path

import numpy as np
import soundfile
from encoding import encode

from w2v2.audio.crops import AudioError, measure_length, read_pcm

RATE, SECONDS = 16_000, 1.5
FORMATS = {
    "int16.wav": dict(subtype="PCM_16"),
    "int24.wav": dict(subtype="PCM_24"),
    "float.wav": dict(subtype="FLOAT"),
    "adpcm.wav": dict(subtype="MS_ADPCM"),
    "a.flac": dict(subtype="PCM_16"),
    "b.flac": dict(subtype="PCM_24", samplerate=44_100),
    "vorbis.ogg": dict(format="OGG", subtype="VORBIS"),
    "opus.opus": dict(format="OGG", subtype="OPUS", samplerate=48_000),
    "a.mp3": dict(format="MP3", subtype="MPEG_LAYER_III"),
    "a.aiff": dict(subtype="PCM_16"),
    "a.au": dict(subtype="ULAW"),
    "a.w64": dict(subtype="PCM_16"),
    "a.caf": dict(subtype="PCM_16"),
    "stereo.wav": dict(subtype="PCM_16", channels=2, samplerate=8_000),
}
ENCODED = {  # by PyAV: codec, container
    "a.m4a": ("aac", "ipod"),
    "a.aac": ("aac", "adts"),
    "a.webm": ("libopus", "webm"),
    "a.mka": ("mp3", "matroska"),
    "a.wma": ("wmav2", "asf"),
    "a.amr": ("libopencore_amrnb", "amr"),
    "a.wv": ("wavpack", "wv"),
    "g722.wav": ("g722", "wav"),
}
LOSSLESS = ("int16.wav", "int24.wav", "float.wav", "a.flac", "a.aiff", "a.w64", "a.caf")
MEMORY = 2 << 30  # that a mutant may make the program ask for, beyond what it has


def speech(num_frames: int, channels: int = 1) -> np.ndarray:
    noise = np.random.default_rng(0).standard_normal((num_frames, channels)) * 0.1
    return (noise * np.sin(np.arange(num_frames) / 900)[:, None]).clip(-1, 1).astype(np.float32)


def write_originals(folder: Path) -> list[Path]:
    """One file of each format."""
    for name, options in FORMATS.items():
        options = dict(samplerate=RATE, channels=1) | options
        samples = speech(round(SECONDS * options["samplerate"]), options.pop("channels"))
        soundfile.write(folder / name, samples, **options)
    for name, (codec, container) in ENCODED.items():
        rate = {"webm": 48_000, "amr": 8_000}.get(container, RATE)
        encode(
            folder / name,
            speech(round(SECONDS * rate)),
            rate,
            codec,
            container,
            bit_rate=12_000 if codec[-1] == "b" else 32_000,
        )
    return [folder / name for name in FORMATS | ENCODED]


def damage(content: bytes, rng: np.random.Generator) -> bytes:
    """Cut off, bits flipped, overwritten, a piece removed, doubled or zeroed; headers more often than their share."""
    data, kind = bytearray(content), rng.integers(8)
    at = int(rng.integers(min(len(data), 200)) if rng.random() < 0.6 else rng.integers(len(data)))
    length = int(rng.integers(1, 2_000))
    if kind == 0:
        return content[:at]
    if kind in (1, 2):
        for _ in range(int(rng.integers(1, 9))):
            data[int(rng.integers(at, len(data)))] ^= 1 << int(rng.integers(8))
            data[at] ^= 1 << int(rng.integers(8))
    elif kind == 3:
        data[at : at + 4] = rng.choice([b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f"])
    elif kind == 4:
        del data[at : at + length]
    elif kind == 5:
        data[at:at] = data[at : at + length]
    elif kind == 6:
        data[at : at + length] = bytes(len(data[at : at + length]))
    else:
        data[at : at + 8] = rng.bytes(8)
    return bytes(data)


def attempt(read, path: str, *window):
    """What the reader gives; None where it refuses, with a reason in one line."""
    try:
        return read(path, *window)
    except AudioError as error:
        assert error.reason and error.reason.isprintable(), error
        return None


def outcome(path: str, start: int, num_samples: int, stop: int) -> np.ndarray | None:
    """As many finite samples as were asked for; None where the reader refuses."""
    samples = attempt(read_pcm, path, start, num_samples, stop)
    assert samples is None or (samples.shape == (num_samples,) and samples.dtype in (np.int16, np.float32))
    assert samples is None or np.isfinite(samples).all()
    return samples


def fuzz(folder: Path, seed: int, count: int) -> dict[str, int]:
    """`count` mutants, one after the other."""
    originals = write_originals(folder)
    contents = {path: path.read_bytes() for path in originals}
    whole = {name: read_pcm(str(folder / name)) for name in LOSSLESS}
    total = {"read": 0, "refused": 0}
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        original = originals[number % len(originals)]
        content = damage(contents[original], rng)
        is_cut = contents[original].startswith(content)
        mutant = folder / "mutants" / original.name
        mutant.parent.mkdir(exist_ok=True)
        (folder / "last.txt").write_text(f"seed {seed}, mutant {number} of {original.name}")
        mutant.write_bytes(content)
        name, expected = str(mutant), round(SECONDS * RATE)
        length = attempt(measure_length, name)
        assert length is None or (isinstance(length, int) and length > 0)
        for start, num_samples in ((0, 4_000), (int(rng.integers(12_000)), 7_777), (16_000, 8_000)):
            samples = outcome(name, start, num_samples, start + num_samples)
            total["refused" if samples is None else "read"] += 1
            if samples is not None and is_cut and original.name in whole and length and length >= start + num_samples:
                assert np.array_equal(samples, whole[original.name][start : start + num_samples]), "other samples"
            checked = outcome(name, start, num_samples, expected)
            assert checked is None or (samples is not None and np.array_equal(checked, samples))
    return total


if __name__ == "__main__":
    with open("/proc/self/statm") as statm:
        taken = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
    print(json.dumps(fuzz(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
