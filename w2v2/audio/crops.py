"""Audio files → the crop that is asked for: 16 kHz, mono, int16 where the source holds 16 bits, else float32.

A file gives the samples that were asked for (near its end as `read_pcm` says), or an `AudioError`. libsndfile decodes
only the crop. soxr resamples other rates: the crop and a margin, cut where both rates have a sample at the same
instant. The result equals that part of the whole resampled file, but for the filter's far tails.
"""

import os
import sys
from math import gcd

import numpy as np
import soundfile
import soxr

from w2v2.audio.decoding import SAMPLING_RATE, AudioError, open_sound
from w2v2.audio.files import open_regular, split_address

SEEKABLE_SUFFIXES = (
    ".wav .wave .w64 .rf64 .flac .aif .aiff .aifc .au .snd .caf .sph .nist .voc .ircam .sf .pvf .avr .svx .iff .paf .sds"
).split()
AUDIO_SUFFIXES = frozenset(
    SEEKABLE_SUFFIXES
    + ".ogg .oga .ogx .ogv .opus .spx .mp3 .mp2 .mp1 .mpa .mpga .m4a .m4b .m4r .mp4 .m4v .f4v .mov .3gp .3g2 .aac .adts "
    ".webm .weba .mka .mkv .wma .asf .wmv .amr .awb .gsm .g722 .g729 .ilbc .wv .ape .mac .tta .tak .shn .ac3 .eac3 .ec3 "
    ".dts .thd .mlp .mpc .avi .flv .mpg .mpeg .ts .m2ts .ra .rm".split()
)
SEEKABLE_HEADS = (b"RIFF", b"RF64", b"riff", b"fLaC", b"FORM", b"caff", b".snd", b"NIST")  # how such files begin
MARGIN = 1_600  # samples at 16 kHz on either side of a crop: many times the resampling filter's half-length
MAX_SHIFT = SAMPLING_RATE // 2  # a duration rounded to whole seconds overshoots the end by at most this
MAX_PADDING = SAMPLING_RATE // 100  # a duration rounded to two decimals: shorter than one latent frame
MAX_AMPLITUDE = 2.0**31  # of floats on the scale of 32-bit integers; anything larger would only spoil an update


def measure_length(path: str) -> int:
    """Length of a file in samples at 16 kHz (rounded down), by its header where that can be relied on, else decoded.

    Raises AudioError.
    """
    path = os.fsdecode(path)
    with open_sound(path) as file:
        if file.num_frames is None:
            num_frames = sum(frame.samples for frame in file.frames())
        else:
            file.check_whole()
            num_frames = file.num_frames
        if num_frames * SAMPLING_RATE < file.rate:
            raise AudioError(path, "holds no audio")
        return num_frames * SAMPLING_RATE // file.rate


def measure_rate(path: str) -> int:
    """Frames a second of a file. Raises AudioError."""
    with open_sound(os.fsdecode(path), 0, 0) as file:
        return file.rate


def read_crop(path: str, start: int = 0, num_samples: int | None = None, channel: int | None = None) -> np.ndarray:
    """As `read_pcm`, always float32 in [-1, 1]: 16-bit samples are divided by 32,768, which is exact."""
    samples = read_pcm(path, start, num_samples, channel=channel)
    return samples if samples.dtype == np.float32 else samples * np.float32(1 / 32_768)


def read_pcm(
    path: str,
    start: int = 0,
    num_samples: int | None = None,
    stop: int | None = None,
    channel: int | None = None,
) -> np.ndarray:
    """`num_samples` from `start` (both in samples at 16 kHz; None: to the end), one channel or their mean, (S,).

    int16 where the source is at 16 kHz and no sample needs more than 16 bits, else float32. Manifests often round
    durations: a window may overshoot the file's end by 10 ms, which are filled with zeros, or by up to half a second,
    and is then shorter. For crops of a fixed length give `stop`, the end of the whole utterance by its manifest: such a
    window moves back, but for up to 10 ms that the whole file lacks. A file that ends more than half a second before
    `stop` is refused, so whether a file is used does not depend on the crop that is drawn.

    Raises AudioError where more is missing, where decoding fails or ends early, and for samples that no recording has.
    """
    path = os.fsdecode(path)
    assert start >= 0 and (num_samples is None or num_samples > 0), (path, start, num_samples)
    end = None if num_samples is None else max(start + num_samples, stop or 0)
    with open_sound(path, start, end) as file:
        rate = file.rate
        if channel is not None and channel >= file.channels:
            raise AudioError(path, f"has {file.channels} channels, and the manifest asks for number {channel + 1}")
        is_mono = file.channels == 1 or channel is not None
        dtype = "int16" if is_mono and rate == SAMPLING_RATE and file.fits_int16 else "float32"
        num_frames, frames, offset = file.num_frames, None, 0
        if num_frames is None:
            # Decode to the utterance's end, and keep what the window needs wherever it moves.
            earliest = max(0, start - MAX_SHIFT - MAX_PADDING)
            offset, last, _ = _source_window(earliest, start - earliest + (num_samples or 0), rate, sys.maxsize)
            last = last if end else sys.maxsize
            frames, num_frames = file.decode(offset, last, max(last, -(-(end or 0) * rate // SAMPLING_RATE)), dtype)
        length = num_frames * SAMPLING_RATE // rate
        start, num_samples, padding = _fit_window(path, start, num_samples, length, stop)
        first, last, skip = _source_window(start, num_samples, rate, num_frames)
        frames = file.read(first, last, dtype) if frames is None else frames[first - offset : last - offset]
    samples = mix_down(frames, channel)  # (last - first,) at the file's rate
    if dtype == "float32":
        check_peak(path, np.maximum(samples.max(), -samples.min()))  # NaN where there is one
    if rate != SAMPLING_RATE:
        samples = soxr.resample(samples, rate, SAMPLING_RATE, quality="HQ")  # → (skip + num_samples + margin,)
    samples = samples[skip : skip + num_samples]
    return np.ascontiguousarray(np.pad(samples, (0, padding)) if padding else samples)


def mix_down(frames: np.ndarray, channel: int | None = None) -> np.ndarray:
    """(S, C) → (S,): one channel, or their mean."""
    if channel is not None or frames.shape[1] == 1:
        return frames[:, channel or 0]
    with np.errstate(over="ignore", invalid="ignore"):  # of damaged floats, which `read_pcm` refuses
        return frames.mean(axis=1, dtype=np.float32)


def check_peak(path: str, peak: float) -> None:
    """AudioError for float samples that no recording has."""
    if not peak <= MAX_AMPLITUDE:
        loud = f"samples up to {peak:.3g}, where full scale is 1: it is damaged"
        raise AudioError(path, f"holds {loud if np.isfinite(peak) else 'NaN or infinite samples'}")


def _fit_window(path: str, start: int, num_samples: int | None, length: int, stop: int | None) -> tuple[int, int, int]:
    """Start, samples to take and zeros to append, for a file of `length` samples at 16 kHz."""
    has, short = f"has {length} samples at 16 kHz", "shorter than its manifest says"  # for messages
    if stop is not None and stop - length > MAX_SHIFT + MAX_PADDING:
        raise AudioError(path, f"{has} of {stop} in its manifest: {short}")
    if num_samples is None:
        if start >= length:
            raise AudioError(path, f"{has}, so nothing at {start}: {short}")
        return start, length - start, 0
    missing = max(0, start + num_samples - length)
    padding = max(0, num_samples - length) if stop else 0
    if padding > MAX_PADDING or missing > MAX_SHIFT + MAX_PADDING or start >= length and not stop:
        raise AudioError(path, f"{has}, of which {start} to {start + num_samples} were asked for: {short}")
    if not stop:
        return start, num_samples - missing, missing if missing <= MAX_PADDING else 0
    return max(0, start - missing), num_samples - padding, padding


def _source_window(start: int, num_samples: int, rate: int, num_frames: int) -> tuple[int, int, int]:
    """First and last frame (at the file's `rate`) that the crop needs, and the resampled samples before the crop.

    The first frame lies on the common grid of both rates (every 441 frames = 160 samples for 44.1 kHz), so no fraction
    of a sample shifts the crop.
    """
    if rate == SAMPLING_RATE:
        return start, start + num_samples, 0
    common = gcd(rate, SAMPLING_RATE)
    samples_per_cell, frames_per_cell = SAMPLING_RATE // common, rate // common
    cell = max(0, start - MARGIN) // samples_per_cell
    last = -(-(start + num_samples + MARGIN) * rate // SAMPLING_RATE)
    return cell * frames_per_cell, min(last, num_frames), start - cell * samples_per_cell


def is_compressed(path: str) -> bool:
    """A crop decodes the file from its beginning: by its suffix, or by the first bytes at an address."""
    if split_address(path)[2] is None:
        return os.path.splitext(path)[1].lower() not in SEEKABLE_SUFFIXES
    try:
        with open_regular(path) as file:
            return not file.peek(4).startswith(SEEKABLE_HEADS)
    except AudioError:
        return False


def write_seekable(path: str, copy: str | os.PathLike) -> None:
    """Write a WAV (W64, 32-bit floats) with the samples of a file. Raises AudioError."""
    with open_sound(path) as file:
        with soundfile.SoundFile(copy, "w", file.rate, file.channels, "FLOAT", format="W64") as out:
            for block in file.blocks():
                out.write(block)
