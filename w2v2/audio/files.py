"""Regular files that hold audio, and addresses: `PATH:OFFSET:SIZE` are bytes of a container, as fairseq writes them.

A member of an uncompressed tar or zip is such bytes, and so is a value in a table. They are read as a file of their
own; the rest of the container is not. Pipes and devices are not opened.
"""

import errno
import io
import os
import re
import stat
import tarfile
import time

ADDRESS = re.compile(r"(.+):([0-9]{1,18}):([0-9]{1,18})", re.DOTALL)
TRANSIENT = frozenset((errno.ESTALE, errno.ETIMEDOUT, errno.EIO, errno.EAGAIN, errno.EMFILE, errno.ENFILE))
PAUSES = (1.0, 4.0)  # seconds before another try to open a file, after a transient error
REFUSALS = {
    **dict.fromkeys((FileNotFoundError, NotADirectoryError), "does not exist"),
    IsADirectoryError: "is a folder, not an audio file",
    PermissionError: "may not be read (permissions)",
    UnicodeEncodeError: "has a name that is not UTF-8 text, as a manifest has to be: rename it",
}


class AudioError(Exception):
    """Audio that cannot be used: its `path` or address, and the `reason`. Callers skip it, count it and list it."""

    def __init__(self, path: str, reason: str):
        super().__init__(path, reason)  # both in `args`, so that a DataLoader worker's pickle holds both
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class AudioFile(io.FileIO):
    """A regular file of `size` bytes, from its byte `offset` on."""

    offset, size = 0, 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """As FFmpeg expects it: -1 for a place that a damaged header invented."""
        try:
            return super().seek(offset, whence)
        except (OSError, OverflowError):
            return -1

    def peek(self, num_bytes: int, at: int = 0) -> bytes:
        """Bytes from `at` on, as many as there are; the position stays."""
        return os.pread(self.fileno(), max(0, min(num_bytes, self.size - at)), self.offset + at)


class AudioRange(AudioFile):
    """Bytes of a container, as a file of their own."""

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.tell(), os.SEEK_END: self.size}[whence]
        return place if place >= 0 and super().seek(self.offset + place) >= 0 else -1

    def tell(self) -> int:
        return super().tell() - self.offset

    def read(self, size: int | None = -1) -> bytes:
        rest = max(0, self.size - self.tell())
        return super().read(rest if size is None or size < 0 else min(size, rest))

    def readinto(self, buffer) -> int:
        return super().readinto(memoryview(buffer)[: max(0, self.size - self.tell())])

    def find_name(self) -> str:
        """The name in the tar's header before the bytes, or "": FFmpeg knows a few kinds of files by suffix alone."""
        try:
            header = os.pread(self.fileno(), tarfile.BLOCKSIZE, max(0, self.offset - tarfile.BLOCKSIZE))
            member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            return ""
        return os.path.basename(member.name) if member.size == self.size else ""


def split_address(path: str) -> tuple[str, int, int | None]:
    """The file, and the offset and size of the bytes in it; 0 and None for a path, whatever its name looks like."""
    found = ADDRESS.fullmatch(path)
    if found is None or os.path.exists(path):
        return path, 0, None
    return found[1], int(found[2]), int(found[3])


def open_regular(path: str) -> AudioFile:
    """The bytes at a path or address; AudioError where there are none. Transient errors are tried again."""
    name, offset, size = split_address(path)
    where = "" if size is None else f"lies in {name}, which "
    for pause in (*PAUSES, None):
        try:
            name.encode()
            kind = AudioFile if size is None else AudioRange
            file = kind(name, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))
            break
        except (OSError, ValueError) as error:  # ValueError: a null character
            if pause is None or getattr(error, "errno", None) not in TRANSIENT:
                why = f"cannot be opened: {getattr(error, 'strerror', None) or error}"
                raise AudioError(path, where + REFUSALS.get(type(error), why)) from None
            time.sleep(pause)
    status = os.fstat(file.fileno())
    file.offset, file.size = offset, status.st_size if size is None else size
    fault = None
    if not stat.S_ISREG(status.st_mode):
        fault = "is a pipe or a device, not a file"
    elif not status.st_size:
        fault = "is an empty file"
    elif not file.size:
        fault = "is asked for 0 bytes: an address ends with :OFFSET:SIZE, both in bytes"
    elif offset + file.size > status.st_size:
        fault = f"holds {status.st_size:,} bytes: it is cut short, or was written anew since its content was listed"
    if fault:
        file.close()
        raise AudioError(path, where + fault)
    if size is not None:
        file.name = ""  # soundfile and FFmpeg would go by the container's
        file.seek(0)
    return file
