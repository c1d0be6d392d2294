"""Decode just the crop that is asked for: 16 kHz, mono, 16-bit where the source is, else float32.

libsndfile (through soundfile) decodes WAV, FLAC, OGG/Opus, MP3 and its other formats, and seeks to the crop, so that 15 s
out of an hour cost 15 s of decoding. Several channels are averaged. Other sampling rates are resampled by soxr on the
crop and a margin around it, cut where both rates have a sample at the same instant; the crop then equals the same crop
of the whole resampled file but for the filter's far tails. An address in a packed folder (`packed.py`) serves as a path
everywhere. What the system refuses for the moment, as of a file server that does not answer, is tried again shortly.
"""

import os
from math import gcd

import numpy as np
import soxr

from w2v2.data.packed import Address, ShardError, check, parse_address, read_samples
from w2v2.data.retries import is_passing, retried
from w2v2.data.sound_file import AudioError, AudioFile

__all__ = ["SAMPLING_RATE", "AudioError", "probe", "read_crop", "read_pcm"]

SAMPLING_RATE = 16_000

MARGIN = 1_600  # samples at 16 kHz on either side of a crop: many times the resampling filter's half-length
MAX_SHIFT = SAMPLING_RATE // 2  # a duration rounded to whole seconds overshoots the end by at most this
MAX_PADDING = SAMPLING_RATE // 100  # a duration rounded to two decimals: shorter than one latent frame
FITS_INT16 = frozenset(
    "PCM_16 PCM_S8 PCM_U8 ULAW ALAW ALAC_16".split()
)  # subtypes whose every sample is a 16-bit number


def probe(path: str) -> int:
    """Length of a file in samples at 16 kHz (rounded down), from its header.

    Raises AudioError for a file that is missing, empty, no audio, or without a single sample.
    """
    path = os.fsdecode(path)
    return retried(lambda: _probe(path), is_passing)


def _probe(path: str) -> int:
    if address := parse_address(path):
        return _packed_length(path, address)
    with AudioFile(path) as file:
        length = file.num_frames * SAMPLING_RATE // file.rate
    if length < 1:
        raise AudioError(path, "holds no audio")
    return length


def read_crop(path: str, start: int = 0, num_samples: int | None = None) -> np.ndarray:
    """As `read_pcm`, always float32 in [-1, 1]: 16-bit samples are divided by 32,768, which is exact."""
    samples = read_pcm(path, start, num_samples)
    return samples if samples.dtype == np.float32 else samples * np.float32(1 / 32_768)


def read_pcm(path: str, start: int = 0, num_samples: int | None = None, stop: int | None = None) -> np.ndarray:
    """`num_samples` from `start` (both in samples at 16 kHz; None: to the end), mono, shape (S,), without any loss.

    int16 where the source is mono at 16 kHz and no sample needs more than 16 bits, else float32 (other rates, several channels,
    24-bit, float and lossy files).
    The array is exactly `num_samples` long. Durations in manifests are often rounded, so a window that overshoots the end of
    the file by up to half a second moves back, and up to 10 ms that the whole file lacks are filled with zeros.
    Raises AudioError where more is missing, where decoding fails or ends early (a truncated file), and on samples that no recording
    has: NaN, infinity, or beyond 2³¹. With `stop`, where the whole utterance ends by its manifest, also where the file ends more than
    half a second before that: whether a file is used then does not hang on which crop of it is drawn.
    """
    path = os.fsdecode(path)
    if start < 0 or (num_samples is not None and num_samples < 1):
        raise ValueError(
            f"{path}: start={start}, num_samples={num_samples}: a crop starts at 0 or later and is not empty"
        )
    return retried(lambda: _read(path, start, num_samples, stop), is_passing)


def _read(path: str, start: int, num_samples: int | None, stop: int | None) -> np.ndarray:
    if address := parse_address(path):
        return _read_packed(path, address, start, num_samples, stop)
    with AudioFile(path) as file:
        rate = file.rate
        exact = rate == SAMPLING_RATE and file.num_channels == 1 and file.subtype in FITS_INT16
        dtype = "int16" if exact else "float32"
        start, num_samples, padding = _fit(path, start, num_samples, file.num_frames * SAMPLING_RATE // rate, stop)
        first, last, skip = _window(start, num_samples, rate, file.num_frames)
        samples = file.read(first, last, dtype)
    if rate != SAMPLING_RATE:
        samples = soxr.resample(samples, rate, SAMPLING_RATE, quality="HQ")
    crop = samples[skip : skip + num_samples]
    return np.ascontiguousarray(np.pad(crop, (0, padding)) if padding else crop, dtype=dtype)


def _read_packed(path: str, address: Address, start: int, num_samples: int | None, stop: int | None) -> np.ndarray:
    start, num_samples, padding = _fit(path, start, num_samples, address.num_samples, stop)
    try:
        crop = read_samples(address, start, num_samples)
    except ShardError as error:
        raise AudioError(path, str(error), error.errno) from None
    return np.pad(crop, (0, padding)) if padding else crop


def _packed_length(path: str, address: Address) -> int:
    try:
        check(address)
    except ShardError as error:
        raise AudioError(path, str(error), error.errno) from None
    if address.num_samples < 1:
        raise AudioError(path, "holds no audio")
    return address.num_samples


def _fit(path: str, start: int, num_samples: int | None, length: int, stop: int | None) -> tuple[int, int, int]:
    """Start, samples to take and zeros to append, for a file of `length` samples at 16 kHz."""
    if length < 1:
        raise AudioError(path, "holds no audio")
    if stop is not None and stop - length > MAX_SHIFT + MAX_PADDING:
        raise AudioError(
            path, f"has {length} samples at 16 kHz of {stop} in its manifest: shorter than its manifest says"
        )
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
