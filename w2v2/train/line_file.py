"""A file of lines that a full disk does not lose."""

import logging
import os
from pathlib import Path

logger = logging.getLogger(__name__)


def rewrite(path: Path, content: bytes) -> None:
    """Give a file another content, durably: it has the old or the new one, whatever happens. Raises `OSError`."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


class LineFile:
    """Lines are appended at once; what the disk refuses is kept in memory, and tried again with the next line or flush.

    Some disks refuse late, when the file is closed or synced (NFS, quotas). So lines are kept until the disk is known to have them, and
    after a failure the file is first cut back to where it was good: it never holds a torn line before another one, nor one twice.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._kept = bytearray()  # since the last flush that succeeded
        self._num_written = 0  # bytes of them that are in the file
        self._sure_size: int | None = None  # of the file at that flush
        self._cut_to: int | None = None  # where a failure left it torn or unknown
        self._is_failing = False

    def append(self, text: str) -> None:
        """Add whole lines; never raises `OSError`: the first failure, and its end, are a warning each."""
        self._kept += text.encode()
        self._write()

    def flush(self) -> None:
        """Write what is left and wait until the disk has it, so that a checkpoint does not outlive the lines before it."""
        if self._kept:
            self._write(sync=True)

    def _write(self, sync: bool = False) -> None:
        begun, is_written = None, False
        try:
            with open(self.path, "ab", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                if self._sure_size is None:
                    self._sure_size = size
                if self._cut_to is not None and size > self._cut_to:
                    file.truncate(self._cut_to)
                    size = self._cut_to
                begun = size
                rest = bytes(self._kept[self._num_written :])
                while rest:
                    rest = rest[file.write(rest) :]
                is_written = True
                if sync:
                    os.fsync(file.fileno())
                    size = os.fstat(file.fileno()).st_size
        except OSError as error:
            if is_written:  # refused late: what is there of the lines since the last flush is not known
                self._num_written, self._cut_to = 0, self._sure_size
            elif begun is not None:
                self._cut_to = begun
            if not self._is_failing:
                logger.warning(
                    "%s cannot be written (%s): its lines are kept and tried again with the next one",
                    self.path,
                    error.strerror,
                )
            self._is_failing = True
            return
        self._num_written, self._cut_to = len(self._kept), None
        if sync:
            self._kept.clear()
            self._num_written, self._sure_size = 0, size
        if self._is_failing:
            logger.warning("%s is written again; no line is missing", self.path)
        self._is_failing = False

    def close(self) -> None:
        """Flush a last time."""
        self.flush()
        if self._kept:
            logger.warning(
                "%s: the last lines could not be written and may be lost (%d bytes)", self.path, len(self._kept)
            )
            self._kept.clear()
            self._num_written, self._sure_size, self._cut_to = 0, None, None
