"""Decode just the crop that is asked for: 16 kHz, mono, 16-bit where the source is, else float32.

libsndfile (through soundfile) decodes WAV, FLAC, OGG/Opus, MP3 and its other formats, and seeks to the crop, so that 15 s
out of an hour cost 15 s of decoding. Several channels are averaged. Other sampling rates are resampled by soxr on the
crop and a margin around it, cut where both rates have a sample at the same instant; the crop then equals the same crop
of the whole resampled file but for the filter's far tails. An address in a packed folder (`packed.py`) serves as a path
everywhere.
"""

import os
from collections.abc import Iterator
from math import gcd

import numpy as np
import soundfile
import soxr

from w2v2.packed import Address, ShardError, check, parse_address, read_samples

SAMPLING_RATE = 16_000

MARGIN = 1_600  # samples at 16 kHz on either side of a crop: many times the resampling filter's half-length
MAX_SHIFT = SAMPLING_RATE // 2  # a duration rounded to whole seconds overshoots the end by at most this
MAX_PADDING = SAMPLING_RATE // 100  # a duration rounded to two decimals: shorter than one latent frame
FITS_INT16 = frozenset(
    "PCM_16 PCM_S8 PCM_U8 ULAW ALAW ALAC_16".split()
)  # subtypes whose every sample is a 16-bit number
PREROLL_SECONDS = {"VORBIS": 10, "MP3": 1}  # decoded and thrown away: see _read
BLOCK = 1 << 20  # frames decoded at once where a header does not tell the length
MAX_FRAMES_PER_BYTE = 1_000  # no plausible file beats this, so a header that claims more is not believed


class AudioError(Exception):
    """One audio file that cannot be used: `path` and `reason`. Callers skip the file, count it and list it."""

    def __init__(self, path: str, reason: str):
        super().__init__(path, reason)  # both in `args`, so that it comes whole through a DataLoader worker's pickle
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def probe(path: str) -> int:
    """Length of a file in samples at 16 kHz (rounded down), from its header.

    Only where the header does not say, as in a FLAC written to a pipe, is the file decoded and counted.
    Raises AudioError for a file that is missing, empty, no audio, or without a single sample.
    """
    path = os.fsdecode(path)
    if address := parse_address(path):
        return _packed_length(path, address)
    with _opened(path) as file:
        num_frames = file.frames if _trusted(file, path) else sum(map(len, _blocks(path, "int16")))
        length = num_frames * SAMPLING_RATE // file.samplerate
    if length < 1:
        raise AudioError(path, "holds no audio")
    return length


def read_crop(path: str, start: int = 0, num_samples: int | None = None) -> np.ndarray:
    """As `read_pcm`, always float32 in [-1, 1]: 16-bit samples are divided by 32,768, which is exact."""
    samples = read_pcm(path, start, num_samples)
    return samples if samples.dtype == np.float32 else samples * np.float32(1 / 32_768)


def read_pcm(path: str, start: int = 0, num_samples: int | None = None) -> np.ndarray:
    """`num_samples` from `start` (both in samples at 16 kHz; None: to the end), mono, shape (S,), without any loss.

    int16 where the source is mono at 16 kHz and no sample needs more than 16 bits, else float32 (other rates, several channels,
    24-bit, float and lossy files).
    The array is exactly `num_samples` long. Durations in manifests are often rounded, so a window that overshoots the end of
    the file by up to half a second moves back, and up to 10 ms that the whole file lacks are filled with zeros.
    Raises AudioError where more is missing, where decoding fails or ends early (a truncated file), and on NaN or infinity.
    """
    path = os.fsdecode(path)
    if start < 0 or (num_samples is not None and num_samples < 1):
        raise ValueError(
            f"{path}: start={start}, num_samples={num_samples}: a crop starts at 0 or later and is not empty"
        )
    if address := parse_address(path):
        return _read_packed(path, address, start, num_samples)
    with _opened(path) as file:
        rate = file.samplerate
        exact = rate == SAMPLING_RATE and file.channels == 1 and file.subtype in FITS_INT16
        dtype = "int16" if exact else "float32"
        whole = None if _trusted(file, path) else np.concatenate([np.empty(0, dtype), *_blocks(path, dtype)])
        num_frames = file.frames if whole is None else len(whole)
        start, num_samples, padding = _fit(path, start, num_samples, num_frames * SAMPLING_RATE // rate)
        first, last, skip = _window(start, num_samples, rate, num_frames)
        samples = _read(file, path, first, last, dtype) if whole is None else whole[first:last]
    if not exact and not np.isfinite(samples).all():
        raise AudioError(path, "holds NaN or infinite samples")
    if rate != SAMPLING_RATE:
        samples = soxr.resample(samples, rate, SAMPLING_RATE, quality="HQ")
    crop = samples[skip : skip + num_samples]
    return np.ascontiguousarray(np.pad(crop, (0, padding)) if padding else crop, dtype=dtype)


def _read_packed(path: str, address: Address, start: int, num_samples: int | None) -> np.ndarray:
    start, num_samples, padding = _fit(path, start, num_samples, address.num_samples)
    try:
        crop = read_samples(address, start, num_samples)
    except ShardError as error:
        raise AudioError(path, str(error)) from None
    return np.pad(crop, (0, padding)) if padding else crop


def _packed_length(path: str, address: Address) -> int:
    try:
        check(address)
    except ShardError as error:
        raise AudioError(path, str(error)) from None
    if address.num_samples < 1:
        raise AudioError(path, "holds no audio")
    return address.num_samples


def _fit(path: str, start: int, num_samples: int | None, length: int) -> tuple[int, int, int]:
    """Start, samples to take and zeros to append, for a file of `length` samples at 16 kHz."""
    if length < 1:
        raise AudioError(path, "holds no audio")
    if num_samples is None:
        if start >= length:
            raise AudioError(
                path, f"has {length} samples at 16 kHz, so nothing at {start}: shorter than its manifest says"
            )
        return start, length - start, 0
    missing = start + num_samples - length
    if missing <= 0:
        return start, num_samples, 0
    padding = max(0, num_samples - length)
    if padding > MAX_PADDING or missing > MAX_SHIFT + MAX_PADDING:
        reason = f"has {length} samples at 16 kHz, of which {start} to {start + num_samples} were asked for"
        raise AudioError(path, f"{reason}: shorter than its manifest says")
    return max(0, start - missing), num_samples - padding, padding


def _window(start: int, num_samples: int, rate: int, num_frames: int) -> tuple[int, int, int]:
    """First and last frame (at the file's `rate`) that the crop needs, and how many resampled samples precede the crop.

    The first frame lies on the common grid of both rates (every 441 frames = 160 samples for 44.1 kHz), so the resampled
    margin is a whole number of samples and no fraction shifts the crop.
    """
    if rate == SAMPLING_RATE:
        return start, start + num_samples, 0
    common = gcd(rate, SAMPLING_RATE)
    samples_per_cell, frames_per_cell = SAMPLING_RATE // common, rate // common
    cell = max(0, start - MARGIN) // samples_per_cell
    last = -(-(start + num_samples + MARGIN) * rate // SAMPLING_RATE)
    return cell * frames_per_cell, min(last, num_frames), start - cell * samples_per_cell


def _opened(path: str) -> soundfile.SoundFile:
    try:
        return soundfile.SoundFile(path)
    except (soundfile.SoundFileError, OSError, TypeError) as error:  # TypeError: headerless .raw
        raise AudioError(path, _why_unreadable(path, error)) from None


def _why_unreadable(path: str, error: Exception) -> str:
    if not os.path.exists(path):
        return "does not exist"
    if os.path.isdir(path):
        return "is a folder, not an audio file"
    if not os.access(path, os.R_OK):
        return "may not be read (permissions)"
    if os.path.getsize(path) == 0:
        return "is an empty file"
    return f"is not audio that libsndfile reads (WAV, FLAC, OGG, Opus, MP3 …): {getattr(error, 'error_string', error)}"


def _trusted(file: soundfile.SoundFile, path: str) -> bool:
    """Whether the header's length can be true: unknown lengths show up as 0 or as about 2**63."""
    return 0 < file.frames <= MAX_FRAMES_PER_BYTE * os.path.getsize(path)


def _read(file: soundfile.SoundFile, path: str, first: int, last: int, dtype: str) -> np.ndarray:
    """Frames `first` to `last`, channels averaged, shape (last - first,).

    Right after a seek libsndfile 1.2 returns wrong samples in the last page of an OGG Vorbis file (a page holds up to 8 s),
    and in the first frames of an MP3; decoding from somewhat earlier gives exactly what decoding from the start gives.
    """
    preroll = PREROLL_SECONDS.get(file.subtype, PREROLL_SECONDS.get(file.format, 0)) * file.samplerate
    preroll = min(preroll, first)
    try:
        file.seek(first - preroll)
        frames = file.read(preroll + last - first, dtype=dtype, always_2d=True)[preroll:]
    except (soundfile.SoundFileError, RuntimeError) as error:
        raise AudioError(
            path, f"cannot be decoded from {first / file.samplerate:.2f} s (damaged or truncated): {error}"
        ) from None
    if len(frames) < last - first:
        seconds = file.frames / file.samplerate
        raise AudioError(path, f"holds less audio than the {seconds:.2f} s that its header claims: truncated")
    return _mono(frames)


class _Stream(soundfile.SoundFile):
    """soundfile seeks to where it is after each read, which libsndfile refuses where a FLAC does not tell its length."""

    def seekable(self) -> bool:
        return False


def _blocks(path: str, dtype: str) -> Iterator[np.ndarray]:
    """Everything that can be decoded, mono, in blocks: for files whose header does not tell their length."""
    try:
        with _Stream(path) as file:
            while len(block := file.read(BLOCK, dtype=dtype, always_2d=True)):
                yield _mono(block)
    except (soundfile.SoundFileError, RuntimeError) as error:
        raise AudioError(path, f"cannot be decoded: {error}") from None


def _mono(frames: np.ndarray) -> np.ndarray:
    return frames[:, 0] if frames.shape[1] == 1 else frames.mean(axis=1, dtype=np.float32)
