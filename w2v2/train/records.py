"""Records: what a run writes line by line, JSON objects with a `step`.

    metrics.jsonl               `log.RunLog`
    skipped_audio.jsonl         `skipped.SkippedAudio`
    non_finite_updates.jsonl    `skipped.SkippedUpdates`

A resumed run cuts these files back to its checkpoint.
"""

import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from w2v2.train.durable import write_file

logger = logging.getLogger(__name__)


class StepRecords:
    """A file of records in the order of their steps. Lines that a full disk refuses wait in memory for the next try.

    A run resumed at `first_step` keeps the records of steps 1 to `first_step`, byte for byte, and the file of an
    interrupted and resumed run equals that of an uninterrupted one. `first_step` 0 starts the file afresh.
    """

    def __init__(
        self,
        path: Path,
        first_step: int = 0,
        *,
        is_main: bool = True,
        head: Iterable[Mapping[str, Any]] = (),
        drop: Callable[[dict[str, Any]], bool] = lambda record: False,
    ):
        """Cut the file back. Other processes than the main one read, but never write.

        Args:
            head: records that come before all others.
            drop: records up to `first_step` that go as well.
        """
        self.path, self.is_main = Path(path), is_main
        self.kept = list(head)
        self._waiting = b""  # lines that the disk has not taken yet
        self._is_failing = False
        before = self.path.read_bytes() if self.path.exists() else b""
        content = b"".join(map(json_line, self.kept))
        for row, line in enumerate(before.splitlines(), start=1):
            record = parse_record(line)
            if record is None and is_main:
                logger.warning("%s: row %d is no record (a run killed while writing?); dropped", self.path, row)
            elif record is not None and 0 < record["step"] <= first_step and not drop(record):
                self.kept.append(record)
                content += line + b"\n"
        if is_main and content != before:
            write_file(self.path, content)

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record at once. A full or failing disk is a warning, once, and the line is tried again later."""
        if self.is_main:
            self._waiting += json_line(record)
            self._write()

    def sync(self) -> None:
        """Wait until the disk has all lines, so that no checkpoint outlives the lines before it."""
        if self.is_main and (self._waiting or self.path.exists()):
            self._write(sync=True)

    def close(self) -> None:
        """Sync a last time; lines that the disk still refuses are lost, with a warning."""
        self.sync()
        if self._waiting:
            logger.warning("%s: the last %d bytes could not be written", self.path, len(self._waiting))
            self._waiting = b""

    def _write(self, sync: bool = False) -> None:
        try:
            with open(self.path, "ab", buffering=0) as file:
                while self._waiting:  # a line that the disk cut short goes on where it was cut
                    self._waiting = self._waiting[file.write(self._waiting) :]
                if sync:
                    os.fsync(file.fileno())
        except OSError as error:
            if not self._is_failing:
                logger.warning("%s cannot be written (%s): its lines are kept for later", self.path, error.strerror)
            self._is_failing = True
        else:
            if self._is_failing:
                logger.warning("%s is written again; no line is missing", self.path)
            self._is_failing = False


def json_line(record: Mapping[str, Any]) -> bytes:
    """A flat record as one line of JSON. JSON has no word for a number that is not finite: it becomes `null`."""
    finite = {name: None if _is_odd(value) else value for name, value in record.items()}
    return json.dumps(finite, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def parse_record(line: bytes) -> dict[str, Any] | None:
    """The record of a line; None for a line that a kill cut short, and for anything else without a step."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    has_step = isinstance(record, dict) and type(record.get("step")) in (int, float)
    return record if has_step else None


def _is_odd(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
