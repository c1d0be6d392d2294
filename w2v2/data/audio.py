"""Audio files → exactly the crop that is asked for: 16 kHz, mono, int16 where the source holds 16 bits, else float32.

libsndfile (through soundfile) decodes. A file gives exactly the samples that were asked for, or an `AudioError`. Only
regular files are opened, because a pipe would be waited for. A header is believed within bounds, because time and
memory follow from it.

Only the crop is decoded. soxr resamples other rates: the crop and a margin around it, cut where both rates have a
sample at the same instant. The result equals that part of the whole resampled file, but for the filter's far tails.

Shapes: S samples at 16 kHz.
"""

import contextlib
import errno
import io
import os
import stat
import time
from collections.abc import Iterator
from math import gcd

import numpy as np
import soundfile
import soxr

SAMPLING_RATE = 16_000

MARGIN = 1_600  # samples at 16 kHz on either side of a crop: many times the resampling filter's half-length
MAX_SHIFT = SAMPLING_RATE // 2  # a duration rounded to whole seconds overshoots the end by at most this
MAX_PADDING = SAMPLING_RATE // 100  # a duration rounded to two decimals: shorter than one latent frame
FITS_INT16 = frozenset("PCM_16 PCM_S8 PCM_U8 ULAW ALAW ALAC_16".split())  # every sample is a 16-bit number
PREROLL_SECONDS = {"VORBIS": 10, "MP3": 1}  # decoded and thrown away, see `_AudioFile._seek_read`
BLOCK = 1 << 20  # samples decoded at once where a header does not tell the length
MAX_FRAMES_PER_BYTE = 1_000  # a header that claims more is not believed
SAMPLING_RATES = range(1_000, 768_001)  # of recordings; margins and filters follow from the rate
MAX_AMPLITUDE = 2.0**31  # of floats on the scale of 32-bit integers; anything larger would only spoil an update
TRANSIENT = frozenset((errno.ESTALE, errno.ETIMEDOUT, errno.EIO, errno.EAGAIN, errno.EMFILE, errno.ENFILE))
PAUSES = (1.0, 4.0)  # seconds before another try to open a file, after a transient error
REFUSALS = {
    **dict.fromkeys((FileNotFoundError, NotADirectoryError), "does not exist"),
    IsADirectoryError: "is a folder, not an audio file",
    PermissionError: "may not be read (permissions)",
    UnicodeEncodeError: "has a name that is not UTF-8 text, as a manifest has to be: rename it",
}


class AudioError(Exception):
    """One audio file that cannot be used: `path` and `reason`. Callers skip the file, count it and list it."""

    def __init__(self, path: str, reason: str):
        super().__init__(path, reason)  # both in `args`, so that a DataLoader worker's pickle holds both
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def probe(path: str) -> int:
    """Length of a file in samples at 16 kHz (rounded down), from its header.

    Raises AudioError for a file that is missing, empty, no audio, or without a single sample.
    """
    with _open_sound(os.fsdecode(path)) as file:
        return file.length


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
    with _open_sound(path) as file:
        rate = file.rate
        start, num_samples, padding = _fit_window(path, start, num_samples, file.length, stop)
        first, last, skip = _source_window(start, num_samples, rate, file.num_frames)
        samples = file.read(first, last)  # (last - first,) at the file's rate
    if rate != SAMPLING_RATE:
        samples = soxr.resample(samples, rate, SAMPLING_RATE, quality="HQ")  # → (skip + num_samples + margin,)
    crop = samples[skip : skip + num_samples]
    return np.ascontiguousarray(np.pad(crop, (0, padding)) if padding else crop)


def _fit_window(path: str, start: int, num_samples: int | None, length: int, stop: int | None) -> tuple[int, int, int]:
    """Start, samples to take and zeros to append, for a file of `length` samples at 16 kHz."""
    has, short = f"has {length} samples at 16 kHz", "shorter than its manifest says"  # for messages
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


class _AudioFile:
    """An open file: its `rate`, `num_frames`, `length` in samples at 16 kHz, and the `dtype` that holds its samples.

    A file whose header does not tell its length, such as a FLAC written to a pipe, is decoded and counted.
    """

    def __init__(self, path: str, file: soundfile.SoundFile):
        self._path, self._file = path, file
        self.rate = file.samplerate
        is_exact = self.rate == SAMPLING_RATE and file.channels == 1 and file.subtype in FITS_INT16
        self.dtype = "int16" if is_exact else "float32"
        if self.rate not in SAMPLING_RATES:
            raise AudioError(path, f"claims {self.rate} samples a second, as no recording has: its header is damaged")
        # libsndfile gives an unknown length as 0 or as about 2**63.
        self._is_told = 0 < file.frames <= MAX_FRAMES_PER_BYTE * os.fstat(file.name).st_size
        self.num_frames = file.frames if self._is_told else sum(map(len, self._decode_blocks("int16")))
        self.length = self.num_frames * SAMPLING_RATE // self.rate
        if not self.length:
            raise AudioError(path, "holds no audio")

    def read(self, first: int, last: int) -> np.ndarray:
        """Frames `first` to `last`, channels averaged, shape (last - first,).

        Raises AudioError where decoding fails or ends early, and for float samples that no recording has.
        """
        samples = self._seek_read(first, last) if self._is_told else self._scan_read(first, last)
        peak = 0 if self.dtype == "int16" else np.maximum(samples.max(), -samples.min())  # NaN where there is one
        if not peak <= MAX_AMPLITUDE:
            loud = f"samples up to {peak:.3g}, where full scale is 1: damaged"
            raise AudioError(self._path, f"holds {loud if np.isfinite(peak) else 'NaN or infinite samples'}")
        return samples

    def _seek_read(self, first: int, last: int) -> np.ndarray:
        """Seek, then decode.

        Right after a seek, libsndfile 1.2 returns wrong samples in the last page of an OGG Vorbis file (up to 8 s) and
        in an MP3's first frames. Decoding from somewhat earlier gives exactly what decoding from the start gives.
        """
        seconds = PREROLL_SECONDS.get(self._file.subtype, PREROLL_SECONDS.get(self._file.format, 0))
        preroll = min(seconds * self.rate, first)
        try:
            self._file.seek(first - preroll)
            frames = self._file.read(preroll + last - first, dtype=self.dtype, always_2d=True)[preroll:]
        except (soundfile.SoundFileError, RuntimeError) as error:
            reason = f"cannot be decoded from {first / self.rate:.2f} s (damaged or truncated): {error}"
            raise AudioError(self._path, reason) from None
        if len(frames) < last - first:
            claimed = self._file.frames / self.rate
            raise AudioError(self._path, f"holds less audio than the {claimed:.2f} s that its header claims: truncated")
        return _mix_down(frames)

    def _scan_read(self, first: int, last: int) -> np.ndarray:
        """Decode from the start, for a file without seeking; only frames `first` to `last` stay in memory."""
        parts, at = [np.empty(0, self.dtype)], 0
        for block in self._decode_blocks(self.dtype):
            parts.append(block[max(0, first - at) : max(0, last - at)].copy())
            at += len(block)
            if at >= last:
                return np.concatenate(parts)
        raise AudioError(self._path, "changed while it was read")

    def _decode_blocks(self, dtype: str) -> Iterator[np.ndarray]:
        """All frames that can be decoded, mono, in blocks."""
        try:
            with _open_regular(self._path) as descriptor, _Stream(descriptor.fileno(), closefd=False) as file:
                while len(block := file.read(BLOCK // file.channels, dtype=dtype, always_2d=True)):
                    yield _mix_down(block)
        except (soundfile.SoundFileError, RuntimeError) as error:
            raise AudioError(self._path, f"cannot be decoded: {error}") from None


class _Stream(soundfile.SoundFile):
    """soundfile seeks to its own position after each read, which libsndfile refuses for a FLAC of unknown length."""

    def seekable(self) -> bool:
        return False


def _mix_down(frames: np.ndarray) -> np.ndarray:
    """(S, channels) → (S,)"""
    if frames.shape[1] == 1:
        return frames[:, 0]
    with np.errstate(over="ignore", invalid="ignore"):  # of damaged floats, which `_AudioFile.read` refuses
        return frames.mean(axis=1, dtype=np.float32)


@contextlib.contextmanager
def _open_sound(path: str) -> Iterator[_AudioFile]:
    """Open through a descriptor: by name, libsndfile waits for pipes, trusts suffixes, takes at most 1,024 bytes."""
    with _open_regular(path) as descriptor:
        try:
            sound = soundfile.SoundFile(descriptor.fileno(), closefd=False)
        except soundfile.LibsndfileError as error:
            reason = f"is not audio that libsndfile reads (WAV, FLAC, OGG, Opus, MP3 …): {error.error_string}"
            raise AudioError(path, reason) from None
        with sound:
            yield _AudioFile(path, sound)


def _open_regular(path: str) -> io.FileIO:
    """A regular file that holds something; AudioError for anything else. Transient errors are tried again."""
    for pause in (*PAUSES, None):
        try:
            path.encode()
            file = open(path, "rb", buffering=0, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))
            break
        except (OSError, ValueError) as error:  # ValueError: a null character
            if pause is None or getattr(error, "errno", None) not in TRANSIENT:
                why = f"cannot be opened: {getattr(error, 'strerror', None) or error}"
                raise AudioError(path, REFUSALS.get(type(error), why)) from None
            time.sleep(pause)
    status = os.fstat(file.fileno())
    if stat.S_ISREG(status.st_mode) and status.st_size:
        return file
    file.close()
    raise AudioError(path, "is an empty file" if stat.S_ISREG(status.st_mode) else "is a pipe or a device, not a file")
