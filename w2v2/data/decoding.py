"""Audio files → frames at the file's own rate: only regular files are opened, and libsndfile decodes them.

Shapes: S frames.
"""

import contextlib
import errno
import io
import os
import stat
import time
from collections.abc import Iterator

import numpy as np
import soundfile

SAMPLING_RATE = 16_000
PREROLL_SECONDS = {"VORBIS": 10, "MP3": 1}  # decoded and thrown away: libsndfile 1.2 errs right after a seek
BLOCK = 1 << 20  # samples decoded at once where a header does not tell the length
MAX_FRAMES_PER_BYTE = 1_000  # a header that claims more is not believed
SAMPLING_RATES = range(1_000, 768_001)  # of recordings; margins and filters follow from the rate
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


@contextlib.contextmanager
def open_sound(path: str) -> Iterator[tuple[soundfile.SoundFile, int]]:
    """The open file and its number of frames, counted where the header does not tell (a FLAC written to a pipe).

    By name, libsndfile would wait for pipes, trust suffixes and take at most 1,024 bytes: it gets a descriptor.
    """
    with _open_regular(path) as descriptor:
        try:
            sound = soundfile.SoundFile(descriptor.fileno(), closefd=False)
        except soundfile.LibsndfileError as error:
            reason = f"is not audio that libsndfile reads (WAV, FLAC, OGG, Opus, MP3 …): {error.error_string}"
            raise AudioError(path, reason) from None
        with sound:
            rate, num_frames = sound.samplerate, sound.frames
            if rate not in SAMPLING_RATES:
                raise AudioError(path, f"claims {rate} samples a second, as no recording has: its header is damaged")
            # libsndfile gives an unknown length as 0 or as about 2**63.
            if not 0 < num_frames <= MAX_FRAMES_PER_BYTE * os.fstat(sound.name).st_size:
                num_frames = sum(map(len, _decode_blocks(path)))
            if num_frames * SAMPLING_RATE < rate:
                raise AudioError(path, "holds no audio")
            yield sound, num_frames


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


def seek_read(path: str, file: soundfile.SoundFile, first: int, last: int, dtype: str) -> np.ndarray:
    """Frames `first` to `last`, (last - first,), by seeking."""
    rate = file.samplerate
    preroll = min(PREROLL_SECONDS.get(file.subtype, PREROLL_SECONDS.get(file.format, 0)) * rate, first)
    try:
        file.seek(first - preroll)
        frames = file.read(preroll + last - first, dtype=dtype, always_2d=True)[preroll:]
    except (soundfile.SoundFileError, RuntimeError) as error:
        raise AudioError(path, f"cannot be decoded from {first / rate:.2f} s (damaged or truncated): {error}") from None
    if len(frames) < last - first:
        raise AudioError(
            path, f"holds less audio than the {file.frames / rate:.2f} s that its header claims: truncated"
        )
    return _mix_down(frames)


def scan_read(path: str, file: soundfile.SoundFile, first: int, last: int, dtype: str) -> np.ndarray:
    """As `seek_read`, by decoding from the start; only the frames that are asked for stay in memory."""
    parts, at = [np.empty(0, dtype)], 0
    for block in _decode_blocks(path, dtype):
        parts.append(block[max(0, first - at) : max(0, last - at)].copy())
        at += len(block)
        if at >= last:
            return np.concatenate(parts)
    raise AudioError(path, "changed while it was read")


def _decode_blocks(path: str, dtype: str = "int16") -> Iterator[np.ndarray]:
    """All frames that can be decoded, mono, in blocks."""
    try:
        with _open_regular(path) as descriptor, _Stream(descriptor.fileno(), closefd=False) as file:
            while len(block := file.read(BLOCK // file.channels, dtype=dtype, always_2d=True)):
                yield _mix_down(block)
    except (soundfile.SoundFileError, RuntimeError) as error:
        raise AudioError(path, f"cannot be decoded: {error}") from None


class _Stream(soundfile.SoundFile):
    """soundfile seeks to its own position after each read, which libsndfile refuses for a FLAC of unknown length."""

    def seekable(self) -> bool:
        return False


def _mix_down(frames: np.ndarray) -> np.ndarray:
    """(S, channels) → (S,)"""
    if frames.shape[1] == 1:
        return frames[:, 0]
    with np.errstate(over="ignore", invalid="ignore"):  # of damaged floats, which `read_pcm` refuses
        return frames.mean(axis=1, dtype=np.float32)
