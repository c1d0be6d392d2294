"""Audio files as libsndfile (through soundfile) decodes them, behind checks: whatever a file is or claims to be, it gives exactly the
frames that are asked for, or an `AudioError` with the reason.

Only regular files are opened: a pipe would be waited for. What a header says is believed within bounds, since time and memory follow from it.
"""

import contextlib
import os
import stat
from collections.abc import Iterator

import numpy as np
import soundfile

PREROLL_SECONDS = {"VORBIS": 10, "MP3": 1}  # decoded and thrown away: see AudioFile.read
BLOCK = 1 << 20  # samples decoded at once where a header does not tell the length
MAX_FRAMES_PER_BYTE = 1_000  # no plausible file beats this, so a header that claims more is not believed
SAMPLING_RATES = range(1_000, 768_001)  # of recordings; margins and filters follow from the rate
MAX_AMPLITUDE = (
    2.0**31
)  # floats on the scale of 32-bit integers come to this; what is beyond would only spoil an update


class AudioError(Exception):
    """One audio file that cannot be used: `path` and `reason`. Callers skip the file, count it and list it."""

    def __init__(self, path: str, reason: str, errno: int | None = None):
        super().__init__(path, reason)  # both in `args`, so that it comes whole through a DataLoader worker's pickle
        self.path, self.reason = path, reason
        self.errno = errno  # where the system refused it

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class AudioFile:
    """An open file of at least one frame: `rate`, `num_channels`, `subtype` (libsndfile's name) and `num_frames`, a number at `rate`.

    Where the header does not tell its length, as in a FLAC written to a pipe, the file is decoded and counted.
    Raises AudioError for whatever is not a file of audio. Use it as a context manager.
    """

    def __init__(self, path: str):
        self.path = path
        with contextlib.ExitStack() as stack:
            self._file = stack.enter_context(_opened(path, soundfile.SoundFile))
            self.rate, self.num_channels, self.subtype = self._file.samplerate, self._file.channels, self._file.subtype
            if self.rate not in SAMPLING_RATES:
                raise AudioError(
                    path, f"claims {self.rate} samples a second, as no recording has: its header is damaged"
                )
            # Unknown lengths show up as 0 or as about 2**63.
            self._is_told = 0 < self._file.frames <= MAX_FRAMES_PER_BYTE * os.fstat(self._file.name).st_size
            self.num_frames = self._file.frames if self._is_told else sum(map(len, self._blocks("int16")))
            if not self.num_frames:
                raise AudioError(path, "holds no audio")
            self._stack = stack.pop_all()

    def __enter__(self) -> "AudioFile":
        return self

    def __exit__(self, *_) -> None:
        self._stack.close()

    def read(self, first: int, last: int, dtype: str) -> np.ndarray:
        """Frames `first` to `last`, channels averaged, shape (last - first,), int16 or float32.

        Raises AudioError where decoding fails or ends early, and on float samples that no recording has.
        """
        samples = self._sought(first, last, dtype) if self._is_told else self._from_start(first, last, dtype)
        if dtype != "int16":
            peak = np.maximum(samples.max(), -samples.min())  # NaN where there is one
            if not np.isfinite(peak):
                raise AudioError(self.path, "holds NaN or infinite samples")
            if peak > MAX_AMPLITUDE:
                raise AudioError(self.path, f"holds samples up to {peak:.3g}, where full scale is 1: damaged")
        return samples

    def _sought(self, first: int, last: int, dtype: str) -> np.ndarray:
        """Right after a seek libsndfile 1.2 returns wrong samples in the last page of an OGG Vorbis file (a page holds up to 8 s),
        and in the first frames of an MP3; decoding from somewhat earlier gives exactly what decoding from the start gives.
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
        return _mono(frames)

    def _from_start(self, first: int, last: int, dtype: str) -> np.ndarray:
        """For a file in which nothing can be sought; of what is decoded only what is asked for stays in memory."""
        parts, at = [np.empty(0, dtype)], 0
        for block in self._blocks(dtype):
            parts.append(block[max(0, first - at) : max(0, last - at)].copy())
            at += len(block)
            if at >= last:
                break
        samples = np.concatenate(parts)
        if len(samples) < last - first:
            raise AudioError(self.path, "changed while it was read")
        return samples

    def _blocks(self, dtype: str) -> Iterator[np.ndarray]:
        """Everything that can be decoded, mono, in blocks."""
        try:
            with _opened(self.path, _Stream) as file:
                while len(block := file.read(BLOCK // file.channels, dtype=dtype, always_2d=True)):
                    yield _mono(block)
        except (soundfile.SoundFileError, RuntimeError) as error:
            raise AudioError(self.path, f"cannot be decoded: {error}") from None


class _Stream(soundfile.SoundFile):
    """soundfile seeks to where it is after each read, which libsndfile refuses where a FLAC does not tell its length."""

    def seekable(self) -> bool:
        return False


@contextlib.contextmanager
def _opened(path: str, kind: type[soundfile.SoundFile]) -> Iterator[soundfile.SoundFile]:
    """Through a descriptor: by name, libsndfile waits for pipes, takes text that is called .au for audio, and knows but 1,024 bytes."""
    descriptor = _descriptor(path)
    try:
        file = kind(descriptor, closefd=False)
    except soundfile.SoundFileError as error:
        refused = _refusal(descriptor)
        os.close(descriptor)
        if refused:
            raise AudioError(path, f"cannot be read: {refused.strerror}", refused.errno) from None
        reason = getattr(error, "error_string", error)
        raise AudioError(path, f"is not audio that libsndfile reads (WAV, FLAC, OGG, Opus, MP3 …): {reason}") from None
    try:
        yield file
    finally:
        file.close()
        os.close(descriptor)


def _refusal(descriptor: int) -> OSError | None:
    """What the system says to reading the file's first byte, which libsndfile does not tell from a file that is no audio."""
    try:
        os.pread(descriptor, 1, 0)
    except OSError as error:
        return error
    return None


def _descriptor(path: str) -> int:
    """Of a regular file that holds something. Raises AudioError for all else."""
    try:
        path.encode()
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except UnicodeEncodeError:
        raise AudioError(path, "has a name that is not UTF-8 text, as a manifest has to be: rename it") from None
    except (FileNotFoundError, NotADirectoryError):
        raise AudioError(path, "does not exist") from None
    except PermissionError:
        raise AudioError(path, "may not be read (permissions)") from None
    except (OSError, ValueError) as error:  # ValueError: a null character
        number = getattr(error, "errno", None)
        raise AudioError(path, f"cannot be opened: {getattr(error, 'strerror', None) or error}", number) from None
    try:
        status, reason = os.fstat(descriptor), None
    except OSError as error:
        os.close(descriptor)
        raise AudioError(path, f"cannot be read: {error.strerror}", error.errno) from None
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


def _mono(frames: np.ndarray) -> np.ndarray:
    if frames.shape[1] == 1:
        return frames[:, 0]
    with np.errstate(over="ignore", invalid="ignore"):  # of damaged floats, which `AudioFile.read` refuses
        return frames.mean(axis=1, dtype=np.float32)
