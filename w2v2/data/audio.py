"""Audio files → exactly the crop that is asked for: 16 kHz, mono, int16 where the source holds 16 bits, else float32.

Only the crop is decoded (`sound_file.py`), so 15 s out of an hour cost 15 s of decoding. soxr resamples other rates:
the crop and a margin around it, cut where both rates have a sample at the same instant. The result equals that part of
the whole resampled file, but for the filter's far tails.

Shapes: S samples at 16 kHz.
"""

import os
from math import gcd

import numpy as np
import soxr

from w2v2.data.sound_file import AudioError, AudioFile

__all__ = ["SAMPLING_RATE", "AudioError", "probe", "read_crop", "read_pcm"]

SAMPLING_RATE = 16_000

MARGIN = 1_600  # samples at 16 kHz on either side of a crop: many times the resampling filter's half-length
MAX_SHIFT = SAMPLING_RATE // 2  # a duration rounded to whole seconds overshoots the end by at most this
MAX_PADDING = SAMPLING_RATE // 100  # a duration rounded to two decimals: shorter than one latent frame
FITS_INT16 = frozenset("PCM_16 PCM_S8 PCM_U8 ULAW ALAW ALAC_16".split())  # every sample is a 16-bit number


def probe(path: str) -> int:
    """Length of a file in samples at 16 kHz (rounded down), from its header.

    Raises AudioError for a file that is missing, empty, no audio, or without a single sample.
    """
    path = os.fsdecode(path)
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

    int16 where the source is mono at 16 kHz and no sample needs more than 16 bits, else float32 (other rates, several
    channels, 24-bit, float and lossy files).

    The array is exactly `num_samples` long. Manifests often round durations. A window that overshoots the file's end by
    up to half a second therefore moves back, and up to 10 ms that the whole file lacks are filled with zeros.

    `stop` is the end of the whole utterance by its manifest. A file that ends more than half a second before `stop` is
    refused, so whether a file is used does not depend on the crop that is drawn.

    Raises AudioError where more is missing, where decoding fails or ends early (a truncated file), and for samples that
    no recording has: NaN, infinity, or beyond 2³¹.
    """
    path = os.fsdecode(path)
    assert start >= 0 and (num_samples is None or num_samples > 0), (path, start, num_samples)
    with AudioFile(path) as file:
        rate = file.rate
        is_exact = rate == SAMPLING_RATE and file.num_channels == 1 and file.subtype in FITS_INT16
        dtype = "int16" if is_exact else "float32"
        length = file.num_frames * SAMPLING_RATE // rate
        start, num_samples, padding = _fit_window(path, start, num_samples, length, stop)
        first, last, skip = _source_window(start, num_samples, rate, file.num_frames)
        samples = file.read(first, last, dtype)  # (last - first,) at the file's rate
    if rate != SAMPLING_RATE:
        samples = soxr.resample(samples, rate, SAMPLING_RATE, quality="HQ")  # → (skip + num_samples + margin,)
    crop = samples[skip : skip + num_samples]
    return np.ascontiguousarray(np.pad(crop, (0, padding)) if padding else crop, dtype=dtype)


def _fit_window(path: str, start: int, num_samples: int | None, length: int, stop: int | None) -> tuple[int, int, int]:
    """Start, samples to take and zeros to append, for a file of `length` samples at 16 kHz."""
    if length < 1:
        raise AudioError(path, "holds no audio")
    has, short = f"has {length} samples at 16 kHz", "shorter than its manifest says"
    if stop is not None and stop - length > MAX_SHIFT + MAX_PADDING:
        raise AudioError(path, f"{has} of {stop} in its manifest: {short}")
    if num_samples is None:
        if start >= length:
            raise AudioError(path, f"{has}, so nothing at {start}: {short}")
        return start, length - start, 0
    missing = start + num_samples - length
    if missing <= 0:
        return start, num_samples, 0
    padding = max(0, num_samples - length)
    if padding > MAX_PADDING or missing > MAX_SHIFT + MAX_PADDING:
        raise AudioError(path, f"{has}, of which {start} to {start + num_samples} were asked for: {short}")
    return max(0, start - missing), num_samples - padding, padding


def _source_window(start: int, num_samples: int, rate: int, num_frames: int) -> tuple[int, int, int]:
    """First and last frame (at the file's `rate`) that the crop needs, and the resampled samples before the crop.

    The first frame lies on the common grid of both rates (every 441 frames = 160 samples for 44.1 kHz). The resampled
    margin is then a whole number of samples, and no fraction shifts the crop.
    """
    if rate == SAMPLING_RATE:
        return start, start + num_samples, 0
    common = gcd(rate, SAMPLING_RATE)
    samples_per_cell, frames_per_cell = SAMPLING_RATE // common, rate // common
    cell = max(0, start - MARGIN) // samples_per_cell
    last = -(-(start + num_samples + MARGIN) * rate // SAMPLING_RATE)
    return cell * frames_per_cell, min(last, num_frames), start - cell * samples_per_cell
