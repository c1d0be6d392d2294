"""The console, which a run outlives: a pipe whose reader has gone, a log on a full disk, a terminal that was closed.

What is written there is for people who look; a run keeps its own record in its folder. So nothing here raises or waits.
"""

import contextlib
import os
import select
import sys
from collections.abc import Iterator
from typing import Any, TextIO

PATIENCE_SECONDS = 1.0  # for a pipe that nobody reads


def say(line: str) -> None:
    """Write a line to standard error past Python's buffers, which may be what a signal has interrupted or another thread holds.

    Where that descriptor was closed before the start, the number may be any file's by now.
    """
    if sys.__stderr__ is None:
        return
    with contextlib.suppress(OSError, ValueError):
        if select.select([], [2], [], PATIENCE_SECONDS)[1]:
            os.write(2, f"{line}\n".encode(errors="backslashreplace"))


class _Unfailing:
    """A text stream that drops what it cannot write; a full disk gets a part of it once there is space again."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except UnicodeEncodeError:
            self.write(text.encode("ascii", "backslashreplace").decode())
        except (OSError, ValueError):  # a closed stream's is a ValueError
            pass
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def outlived() -> Iterator[None]:
    """Around a whole run: neither writing to a dead `sys.stdout` or `sys.stderr` nor the interpreter's last flush of it changes how it ends."""
    with contextlib.ExitStack() as until_the_end:
        # A descriptor that was closed before the start is the first one to be given out again: better to this than to the run's own files.
        streams = [stream or until_the_end.enter_context(open(os.devnull, "w")) for stream in (sys.stdout, sys.stderr)]
        out, err = map(_Unfailing, streams)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                yield
        finally:
            for stream in streams:
                _let_go(stream)


def _let_go(stream: TextIO) -> None:
    """Flush; what a dead stream still holds would fail at the interpreter's end, whose status is 120 then, so it goes nowhere."""
    with contextlib.suppress(OSError, ValueError):
        stream.flush()
        return
    with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())
        stream.flush()
