"""A file of lines that a full disk does not lose."""

import logging
import os
from pathlib import Path

logger = logging.getLogger(__name__)


class LineFile:
    """Lines are appended at once; what the disk refuses is kept in memory, and tried again with the next line.

    A line of which only the beginning was written is gone on with where it stopped, so the file never holds a torn line before another one.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._unwritten = bytearray()
        self._is_failing = False

    def append(self, text: str) -> None:
        """Add whole lines; never raises `OSError`: the first failure, and its end, are a warning each."""
        self._unwritten += text.encode()
        try:
            with open(self.path, "ab", buffering=0) as file:
                while self._unwritten:
                    del self._unwritten[: file.write(self._unwritten)]
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
        """Try a last time."""
        if self._unwritten:
            self.append("")
        if self._unwritten:
            logger.warning("%s: the last %d bytes could not be written and are lost", self.path, len(self._unwritten))
            self._unwritten.clear()
