"""Signs of life between the ranks of a run: one that is gone, stopped or hung ends the others, and they say which it was.

All ranks take the same steps (micro-batches above all), so the smallest count is the one that everybody waits for.

| a rank | is found out by | after |
|---|---|---|
| is gone | a failing exchange of gradients, then its silence (on one machine: its process) | some seconds |
| is gone, stopped or cut off, and no exchange fails | its silence | `LOST_SECONDS`, or `--ddp_timeout` if that is shorter |
| fails by itself, and no exchange fails | what it says | `GRACE_SECONDS` |
| hangs | its count | `--ddp_timeout` |

The process group's own timeout is longer, so that the line comes first. Time in which this process itself did not run is not counted: a
job that is suspended as a whole goes on when it is continued.
"""

import contextlib
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import NoReturn

from w2v2.errors import UserError, error_line
from w2v2.train.beats import Beats, Verdict
from w2v2.train.console import say
from w2v2.train.stop import Stopped

BEAT_SECONDS = 2.0
LOST_SECONDS = 120.0  # longer than anything is known to hold Python's lock, in which time no thread can post
GRACE_SECONDS = 10.0  # for the main thread to end by itself, once another rank has said why it ends
_COMMUNICATION = re.compile(r"gloo|nccl|connection (was )?(closed|reset)|broken pipe|socket|timed? ?out", re.IGNORECASE)


class Heartbeat:
    """Judges, on a thread of its own, from what the ranks post.

    Args:
        timeout: seconds without a step after which a rank hangs.
        keeps_store: the store is rank 0's, not a launcher's.
    """

    def __init__(self, address: tuple[str, int], prefix: str, rank: int, size: int, timeout: float, keeps_store: bool):
        self.address, self.timeout, self.keeps_store = address, timeout, keeps_store
        self.interval = min(BEAT_SECONDS, timeout / 5)
        self.lost_after = min(LOST_SECONDS, timeout)
        self.idle_seconds = self.cut_off_seconds = self.grace_seconds = 0.0
        self.judged_exchanges = self.judged_count = 0
        self.ending = threading.Lock()
        self.beats = Beats(address, prefix, rank, size, self.interval, patience=max(timeout, 30.0))
        threading.Thread(target=self._judge, name="heartbeat", daemon=True).start()

    def at(self, where: str) -> None:
        self.beats.where = where
        self.beats.count += 1

    def _judge(self) -> None:
        looked = time.monotonic()
        while not self.beats.stopped.wait(self.interval):
            now = time.monotonic()
            verdict = self.look(min(now - looked, 2 * self.interval))
            looked = now
            if verdict is not None and not self.beats.stopped.is_set():
                self.end(verdict)

    def look(self, awake_seconds: float) -> Verdict | None:
        """Count what went by since the last look; a verdict if all is over."""
        beats = self.beats
        talked = beats.exchanges > self.judged_exchanges
        self.cut_off_seconds = 0.0 if talked else self.cut_off_seconds + awake_seconds
        self.idle_seconds = 0.0 if beats.count > self.judged_count else self.idle_seconds + awake_seconds
        self.judged_exchanges, self.judged_count = beats.exchanges, beats.count
        for peer in beats.peers.values() if talked else ():
            peer.silent_seconds += awake_seconds
        if beats.verdict is not None:
            self.grace_seconds += awake_seconds
            return beats.verdict if self.grace_seconds > GRACE_SECONDS else None
        if all(peer.is_done for peer in beats.peers.values()):
            return None
        if self.cut_off_seconds >= self.lost_after:
            return self._without_store()
        hangs = self.idle_seconds >= self.timeout
        if silent := self._silent(3 * self.interval if hangs else self.lost_after):
            return self._lost(silent)
        return self._hung() if hangs else None

    def _silent(self, seconds: float) -> list[int]:
        return [rank for rank, peer in self.beats.peers.items() if peer.silent_seconds >= seconds and not peer.is_done]

    def _lost(self, ranks: list[int]) -> Verdict:
        names = ", ".join(map(self.beats.name, ranks))
        return Verdict(f"{names}: gone, stopped or cut off from the others, which end now", ranks)

    def _without_store(self) -> Verdict:
        where = "{}:{}".format(*self.address)
        if not self.keeps_store:
            return Verdict(f"the launcher's store at {where} does not answer any more: the launcher is gone or cut off")
        lost = (0,) if self.beats.rank else ()
        return Verdict(f"{self.beats.name(0)}: gone, stopped or cut off (its store at {where} does not answer)", lost)

    def _hung(self) -> Verdict:
        beats = self.beats
        counts = {rank: peer.beat["count"] for rank, peer in beats.peers.items() if peer.beat and not peer.is_done}
        counts[beats.rank] = beats.count
        behind = [rank for rank in sorted(counts) if counts[rank] == min(counts.values())]
        since = f"for {self.timeout:g} s (--ddp_timeout)"
        if len(behind) == len(counts):
            return Verdict(f"no rank has got any further {since}: all of them are at {beats.where}")
        names = ", ".join(map(beats.name, behind))
        return Verdict(f"{names}: no step {since}, and the other ranks wait for it")

    def cause_of(self, error: BaseException) -> Verdict | None:
        """Why this rank's main thread failed, if it is another one's fault; its own fault is told to the others."""
        mine = Verdict(f"{self.beats.name(self.beats.rank)}: failed, {_first_line(error)}")
        if isinstance(error, UserError):
            mine = Verdict(str(error), is_slip=True)
        elif isinstance(error, RuntimeError) and _COMMUNICATION.search(str(error)):
            if (found := self._search()) is not None:
                return found
        self._tell(mine)
        return None

    def _search(self) -> Verdict | None:
        """After a failed exchange: what another rank has said, or the rank whose process is gone or whose beats have stopped."""
        beats, until = self.beats, time.monotonic() + 6 * self.interval
        while time.monotonic() < until and beats.verdict is None:
            fresh = beats.refresh(self.interval)
            if beats.verdict is not None:
                break
            if gone := [rank for rank, peer in beats.peers.items() if peer.is_gone and not peer.is_done]:
                return self._lost(gone)
            if not fresh and self.cut_off_seconds > 2 * self.interval:
                return self._without_store()
            if silent := self._silent(3 * self.interval):
                return self._lost(silent)
        return beats.verdict

    def _tell(self, verdict: Verdict) -> None:
        """Let the others know, as far as they can be reached."""
        self.beats.mine = verdict
        self.beats.refresh(2 * self.interval)
        if self.beats.rank == 0 and self.keeps_store:
            time.sleep(2 * self.interval)  # the store ends with this process

    def end(self, verdict: Verdict) -> NoReturn:
        """End this process whatever its main thread is doing; one rank of a machine says why."""
        self.ending.acquire()  # for good: both threads may come here
        try:
            here = socket.gethostname()
            if verdict.said_on != here and self.beats.speaks_for_its_machine(but=verdict.lost):
                say(error_line(verdict.text))
                verdict = verdict._replace(said_on=here)
            if self.beats.verdict is None:
                self._tell(verdict)
        finally:
            os._exit(2 if verdict.is_slip else 1)


_heartbeat: Heartbeat | None = None


def start(address: tuple[str, int], prefix: str, rank: int, size: int, timeout: float, keeps_store: bool) -> None:
    """Post and watch from now on, see `Beats` and `Heartbeat`. Call on all ranks, once they have met."""
    global _heartbeat
    _heartbeat = Heartbeat(address, prefix, rank, size, timeout, keeps_store)


def at(where: str) -> None:
    """The main thread begins something that takes its time; all ranks have to call it equally often."""
    if _heartbeat is not None:
        _heartbeat.at(where)


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Around a whole run: an exchange that fails because another rank is gone ends it with a line that names that rank.

    Whatever else this rank fails of is raised as it is, and told to the others; being asked to stop is no failure.
    """
    global _heartbeat
    try:
        yield
    except Stopped:
        raise
    except (Exception, KeyboardInterrupt) as error:
        if _heartbeat is not None and (verdict := _heartbeat.cause_of(error)) is not None:
            if verdict.is_slip:
                raise UserError(verdict.text) from None
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
            _heartbeat.end(verdict)
        raise
    finally:
        if _heartbeat is not None:
            _heartbeat.beats.stop()
            _heartbeat = None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
