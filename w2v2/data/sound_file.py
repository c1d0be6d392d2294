"""Audio files as libsndfile (through soundfile) decodes them: WAV, FLAC, OGG/Opus, MP3 and more, behind checks.

A file gives exactly the frames that were asked for, or an `AudioError` with the reason. Only regular files are opened,
because a pipe would be waited for. A header is believed within bounds, because time and memory follow from it.
"""

import contextlib
import errno
import os
import stat
import time
from collections.abc import Iterator

import numpy as np
import soundfile

PREROLL_SECONDS = {"VORBIS": 10, "MP3": 1}  # decoded and thrown away, see `AudioFile._seek_read`
BLOCK = 1 << 20  # samples decoded at once where a header does not tell the length
MAX_FRAMES_PER_BYTE = 1_000  # a header that claims more is not believed
SAMPLING_RATES = range(1_000, 768_001)  # of recordings; margins and filters follow from the rate
MAX_AMPLITUDE = 2.0**31  # of floats on the scale of 32-bit integers; anything larger would only spoil an update
TRANSIENT = frozenset((errno.ESTALE, errno.ETIMEDOUT, errno.EIO, errno.EAGAIN, errno.EMFILE, errno.ENFILE))
PAUSES = (1.0, 4.0)  # seconds before another try to open a file, after a transient error


class AudioError(Exception):
    """One audio file that cannot be used: `path` and `reason`. Callers skip the file, count it and list it."""

    def __init__(self, path: str, reason: str):
        super().__init__(path, reason)  # both in `args`, so that a DataLoader worker's pickle holds both
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class AudioFile:
    """An open file of at least one frame: its `rate`, `num_channels`, `subtype` (libsndfile's name) and `num_frames`.

    A file whose header does not tell its length, such as a FLAC written to a pipe, is decoded and counted.
    Use it as a context manager. Raises AudioError for anything that is not a file of audio.
    """

    def __init__(self, path: str):
        self.path = path
        with contextlib.ExitStack() as stack:
            self._file = stack.enter_context(_open_sound(path))
            self.rate, self.num_channels, self.subtype = self._file.samplerate, self._file.channels, self._file.subtype
            if self.rate not in SAMPLING_RATES:
                raise AudioError(
                    path, f"claims {self.rate} samples a second, as no recording has: its header is damaged"
                )
            # libsndfile gives an unknown length as 0 or as about 2**63.
            self._is_told = 0 < self._file.frames <= MAX_FRAMES_PER_BYTE * os.fstat(self._file.name).st_size
            self.num_frames = self._file.frames if self._is_told else sum(map(len, self._decode_blocks("int16")))
            if not self.num_frames:
                raise AudioError(path, "holds no audio")
            self._stack = stack.pop_all()

    def __enter__(self) -> "AudioFile":
        return self

    def __exit__(self, *_) -> None:
        self._stack.close()

    def read(self, first: int, last: int, dtype: str) -> np.ndarray:
        """Frames `first` to `last`, channels averaged, shape (last - first,), int16 or float32.

        Raises AudioError where decoding fails or ends early, and for float samples that no recording has.
        """
        samples = self._seek_read(first, last, dtype) if self._is_told else self._scan_read(first, last, dtype)
        if dtype != "int16":
            peak = np.maximum(samples.max(), -samples.min())  # NaN where there is one
            if not np.isfinite(peak):
                raise AudioError(self.path, "holds NaN or infinite samples")
            if peak > MAX_AMPLITUDE:
                raise AudioError(self.path, f"holds samples up to {peak:.3g}, where full scale is 1: damaged")
        return samples

    def _seek_read(self, first: int, last: int, dtype: str) -> np.ndarray:
        """Seek, then decode.

        Right after a seek, libsndfile 1.2 returns wrong samples in the last page of an OGG Vorbis file (up to 8 s) and
        in an MP3's first frames. Decoding from somewhat earlier gives exactly what decoding from the start gives.
        """
        seconds = PREROLL_SECONDS.get(self.subtype, PREROLL_SECONDS.get(self._file.format, 0))
        preroll = min(seconds * self.rate, first)
        try:
            self._file.seek(first - preroll)
            frames = self._file.read(preroll + last - first, dtype=dtype, always_2d=True)[preroll:]
        except (soundfile.SoundFileError, RuntimeError) as error:
            where = f"cannot be decoded from {first / self.rate:.2f} s (damaged or truncated)"
            raise AudioError(self.path, f"{where}: {error}") from None
        if len(frames) < last - first:
            claimed = self._file.frames / self.rate
            raise AudioError(self.path, f"holds less audio than the {claimed:.2f} s that its header claims: truncated")
        return _mix_down(frames)

    def _scan_read(self, first: int, last: int, dtype: str) -> np.ndarray:
        """Decode from the start, for a file without seeking; only frames `first` to `last` stay in memory."""
        parts, at = [np.empty(0, dtype)], 0
        for block in self._decode_blocks(dtype):
            parts.append(block[max(0, first - at) : max(0, last - at)].copy())
            at += len(block)
            if at >= last:
                break
        samples = np.concatenate(parts)
        if len(samples) < last - first:
            raise AudioError(self.path, "changed while it was read")
        return samples

    def _decode_blocks(self, dtype: str) -> Iterator[np.ndarray]:
        """All frames that can be decoded, mono, in blocks."""
        try:
            with _open_sound(self.path, _Stream) as file:
                while len(block := file.read(BLOCK // file.channels, dtype=dtype, always_2d=True)):
                    yield _mix_down(block)
        except (soundfile.SoundFileError, RuntimeError) as error:
            raise AudioError(self.path, f"cannot be decoded: {error}") from None


class _Stream(soundfile.SoundFile):
    """soundfile seeks to its own position after each read, which libsndfile refuses for a FLAC of unknown length."""

    def seekable(self) -> bool:
        return False


def _mix_down(frames: np.ndarray) -> np.ndarray:
    """(S, channels) → (S,)"""
    if frames.shape[1] == 1:
        return frames[:, 0]
    with np.errstate(over="ignore", invalid="ignore"):  # of damaged floats, which `AudioFile.read` refuses
        return frames.mean(axis=1, dtype=np.float32)


@contextlib.contextmanager
def _open_sound(path: str, kind: type[soundfile.SoundFile] = soundfile.SoundFile) -> Iterator[soundfile.SoundFile]:
    """Open through a descriptor: by name, libsndfile waits for pipes, trusts suffixes, takes at most 1,024 bytes."""
    descriptor = _open_regular(path)
    try:
        try:
            file = kind(descriptor, closefd=False)
        except soundfile.SoundFileError as error:
            reason = getattr(error, "error_string", error)
            reason = f"is not audio that libsndfile reads (WAV, FLAC, OGG, Opus, MP3 …): {reason}"
            raise AudioError(path, reason) from None
        with file:
            yield file
    finally:
        os.close(descriptor)


def _open_regular(path: str) -> int:
    """Descriptor of a regular file that holds something; AudioError for anything else."""
    try:
        path.encode()
    except UnicodeEncodeError:
        raise AudioError(path, "has a name that is not UTF-8 text, as a manifest has to be: rename it") from None
    for pause in (*PAUSES, None):
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            break
        except (OSError, ValueError) as error:  # ValueError: a null character
            if pause is None or getattr(error, "errno", None) not in TRANSIENT:
                raise AudioError(path, _explain_refusal(error)) from None
            time.sleep(pause)
    status = os.fstat(descriptor)
    reason = None
    if stat.S_ISDIR(status.st_mode):
        reason = "is a folder, not an audio file"
    elif not stat.S_ISREG(status.st_mode):
        reason = "is a pipe or a device, not a file"
    elif not status.st_size:
        reason = "is an empty file"
    if reason:
        os.close(descriptor)
        raise AudioError(path, reason)
    return descriptor


def _explain_refusal(error: OSError | ValueError) -> str:
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return "does not exist"
    if isinstance(error, PermissionError):
        return "may not be read (permissions)"
    return f"cannot be opened: {getattr(error, 'strerror', None) or error}"
