"""Being asked to stop: by a scheduler's or a user's signal, or by the clock. The run then saves at the next update boundary and leaves.

SIGTERM (preemption), SIGUSR1 (Slurm's warning), SIGHUP (a closed terminal) and Ctrl-C ask alike; a third Ctrl-C ends the process at once. Any process may be the one
that is asked: the others hear of it in the sums that they exchange at each update anyway.
"""

import os
import signal
import sys
import time

from w2v2.train.console import say

RESUMABLE = 75  # exit status of a run that stopped when asked and can go on (EX_TEMPFAIL of sysexits.h)
_SIGNALS = [number for name in ("SIGTERM", "SIGUSR1", "SIGHUP", "SIGINT") if (number := getattr(signal, name, None))]
_MOST_CTRL_C = 2


class Stopped(Exception):
    """The run ended early because it was asked to, with a checkpoint to go on from. An entry point turns it into status `RESUMABLE`."""


class StopRequest:
    """Watches for signals while it is entered, and for the clock.

    Args:
        max_hours: wall-clock hours from now on; None: no limit.

    A signal that the parent process had ignored (as shells do with Ctrl-C for what runs in the background, and nohup with SIGHUP) stays so.
    """

    def __init__(self, max_hours: float | None = None):
        self.deadline = None if max_hours is None else time.monotonic() + 3600 * max_hours
        self.max_hours = max_hours
        self.signal_name: str | None = None
        self._num_ctrl_c = 0
        self._before: dict = {}

    def __enter__(self) -> "StopRequest":
        for number in _SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame) -> None:
        self._num_ctrl_c += number == signal.SIGINT
        if self._num_ctrl_c > _MOST_CTRL_C:
            raise KeyboardInterrupt
        self.signal_name = signal.Signals(number).name
        hint = "; a third Ctrl-C leaves at once" if number == signal.SIGINT else ""
        say(f"\n{self.signal_name}: saving after this update, then leaving{hint}")

    @property
    def is_asked(self) -> bool:
        """Whether this process was asked to stop."""
        return self.signal_name is not None or (self.deadline is not None and time.monotonic() >= self.deadline)

    @property
    def reason(self) -> str:
        if self.signal_name is not None:
            return self.signal_name
        return f"--max_hours {self.max_hours:g}" if self.is_asked else "another process was asked to"


def leave(stopped: Stopped) -> None:
    """End the process as a run that can go on: with status 0 under a launcher that would start it again at once for any other."""
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        print(f"{os.path.basename(sys.argv[0])}: {stopped}", file=sys.stderr)
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS") or 0) > 0
    sys.exit(0 if restarts else RESUMABLE)
