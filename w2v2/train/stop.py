"""A request to stop, from a signal or the clock. The run then saves at the next update boundary and leaves.

SIGTERM (preemption), SIGUSR1 (Slurm's warning), SIGHUP (a closed terminal) and Ctrl-C ask alike; a third Ctrl-C ends
the process at once. One process that is asked is enough: the others learn of it from the sums that all exchange at each
update.
"""

import contextlib
import logging
import os
import signal
import sys
import time

logger = logging.getLogger(__name__)

RESUMABLE = 75  # exit status of a run that stopped when asked and can go on (EX_TEMPFAIL of sysexits.h)
SIGNALS = [number for name in ("SIGTERM", "SIGUSR1", "SIGHUP", "SIGINT") if (number := getattr(signal, name, None))]


class Stopped(Exception):
    """The run ended early because it was asked to, with a checkpoint to go on from. The script ends with status
    `RESUMABLE`.
    """


class StopRequest:
    """Watches for signals while it is entered, and for the clock.

    Args:
        max_hours: wall-clock hours from now on; None: no limit.

    A signal that the parent process ignores stays ignored, as shells do with Ctrl-C for background jobs, and nohup with
    SIGHUP.
    """

    def __init__(self, max_hours: float | None = None):
        self.max_hours = max_hours
        self.deadline = None if max_hours is None else time.monotonic() + 3600 * max_hours
        self.signal_name: str | None = None
        self._num_interrupts = 0

    def __enter__(self) -> "StopRequest":
        heeded = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        self._handlers = {number: signal.signal(number, self._handle) for number in heeded}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame) -> None:
        self._num_interrupts += number == signal.SIGINT
        if self._num_interrupts > 2:
            raise KeyboardInterrupt
        self.signal_name = signal.Signals(number).name
        hint = "; a third Ctrl-C leaves at once" if number == signal.SIGINT else ""
        logger.warning("%s: saving after this update, then leaving%s", self.signal_name, hint)

    @property
    def is_asked(self) -> bool:
        """Whether this process was asked to stop."""
        return self.signal_name is not None or (self.deadline is not None and time.monotonic() >= self.deadline)

    @property
    def reason(self) -> str:
        """For the line that the run ends with."""
        if self.signal_name is not None:
            return self.signal_name
        return f"--max_hours {self.max_hours:g}" if self.is_asked else "another process was asked to"


def exit_stopped(stopped: Stopped) -> None:
    """End the process with `RESUMABLE`, or with 0 under torchrun's `--max_restarts`, which would start it again for any
    other status.
    """
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        with contextlib.suppress(OSError):
            print(f"{os.path.basename(sys.argv[0])}: {stopped}", file=sys.stderr)
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS") or 0) > 0
    sys.exit(0 if restarts else RESUMABLE)
