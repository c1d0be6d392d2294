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

    A line of which only the beginning was written is gone on with where it stopped, so the file never holds a torn line before another one.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._unwritten = bytearray()
        self._is_failing = False
        self._is_synced = True

    def append(self, text: str) -> None:
        """Add whole lines; never raises `OSError`: the first failure, and its end, are a warning each."""
        self._unwritten += text.encode()
        self._is_synced &= not self._unwritten
        self._write()

    def flush(self) -> None:
        """Write what is left and wait until the disk has it, so that a checkpoint does not outlive the lines before it."""
        if not self._is_synced:
            self._write(sync=True)

    def _write(self, sync: bool = False) -> None:
        try:
            with open(self.path, "ab", buffering=0) as file:
                while self._unwritten:
                    del self._unwritten[: file.write(self._unwritten)]
                if sync:
                    os.fsync(file.fileno())
                    self._is_synced = True
        except OSError as error:
            if not self._is_failing:
                logger.warning(
                    "%s cannot be written (%s): its lines are kept and tried again with the next one",
                    self.path,
                    error.strerror,
                )
            self._is_failing = True
            return
        if self._is_failing:
            logger.warning("%s is written again; no line is missing", self.path)
        self._is_failing = False

    def close(self) -> None:
        """Flush a last time."""
        self.flush()
        if self._unwritten:
            logger.warning("%s: the last %d bytes could not be written and are lost", self.path, len(self._unwritten))
            self._unwritten.clear()
