"""Signs of life between the ranks of a run: one that is gone, stopped or hung ends the others, and they say which it was.

Every rank posts every `BEAT_SECONDS` what its main thread is at, and how many steps it has got so far, in the store that the ranks met in,
and reads what the others posted. All ranks take the same steps (micro-batches above all), so the smallest count is the one that
everybody waits for.

| a rank | is found out by | after |
|---|---|---|
| is gone | a failing exchange of gradients, then its silence (on one machine: its process) | some seconds |
| is gone, stopped or cut off, and no exchange fails | its silence | `LOST_SECONDS`, or `--ddp_timeout` if that is shorter |
| hangs | its count | `--ddp_timeout` |

The process group's own timeout is longer, so that the line comes first. Time in which this process itself did not run is not counted: a
job that is suspended as a whole goes on when it is continued.
"""

import contextlib
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from torch.distributed import DistError, PrefixStore, TCPStore

from w2v2.errors import UserError

BEAT_SECONDS = 2.0
LOST_SECONDS = 120.0  # longer than anything is known to hold Python's lock, in which time no thread can post
GRACE_SECONDS = 10.0  # for the main thread to end by itself, once another rank has said why it ends
_COMMUNICATION = re.compile(r"gloo|nccl|connection (was )?(closed|reset)|broken pipe|socket|timed? ?out", re.IGNORECASE)
_PROC = Path("/proc")


class Verdict(NamedTuple):
    """Why all ranks end."""

    text: str
    named: tuple[int, ...] = ()  # ranks that cannot be expected to say it
    is_slip: bool = False  # the text is a `UserError`'s


@dataclass
class Peer:
    """What is known of another rank."""

    beat: dict[str, Any] | None = None  # as posted last
    silent_seconds: float = 0.0

    @property
    def is_done(self) -> bool:
        return self.beat is not None and self.beat["done"]


class Heartbeat:
    """This rank's part: one thread talks to the store, which may take its time, and another one judges.

    Args:
        address: of the ranks' store.
        prefix: of this attempt's keys in it.
        timeout: seconds without a step after which a rank hangs.
        keeps_store: the store is rank 0's, not a launcher's.
    """

    def __init__(self, address: tuple[str, int], prefix: str, rank: int, size: int, timeout: float, keeps_store: bool):
        self.rank, self.timeout, self.address, self.keeps_store = rank, timeout, address, keeps_store
        self.interval = min(BEAT_SECONDS, timeout / 5)
        self.lost_after = min(LOST_SECONDS, timeout)
        self.count, self.where, self.done, self.serial = 0, "the start", False, 0
        self.peers = {other: Peer() for other in range(size) if other != rank}
        self.idle_seconds = self.cut_off_seconds = self.grace_seconds = 0.0
        self.exchanges = self.judged_exchanges = self.judged_count = 0
        self.mine: Verdict | None = None  # to be told
        self.verdict: Verdict | None = None  # that all ranks know of
        self.poke, self.stopped = threading.Event(), threading.Event()
        wait = timedelta(seconds=max(timeout, 30.0))
        self.store = PrefixStore(prefix, TCPStore(*address, is_master=False, wait_for_workers=False, timeout=wait))
        self.exchange()
        for work in (self._talk, self._judge):
            threading.Thread(target=work, name="heartbeat", daemon=True).start()

    def at(self, where: str) -> None:
        self.where = where
        self.count += 1

    def as_beat(self) -> dict[str, Any]:
        space = os.readlink(_PROC / "self/ns/pid") if _PROC.is_dir() else ""
        values = dict(serial=self.serial, count=self.count, where=self.where, done=self.done)
        return values | dict(host=socket.gethostname(), space=space, pid=os.getpid())

    def exchange(self) -> None:
        """Post this rank's beat and verdict, read all others'. May take as long as the store's timeout, or raise."""
        self.serial += 1
        self.store.set(f"beat/{self.rank}", json.dumps(self.as_beat()))
        if self.mine is not None:
            self.store.compare_set("verdict", "", json.dumps(self.mine))
        known = [rank for rank, peer in self.peers.items() if peer.beat or self.store.check([f"beat/{rank}"])]
        for rank, text in zip(known, self.store.multi_get([f"beat/{rank}" for rank in known]), strict=True):
            beat, peer = json.loads(text), self.peers[rank]
            if peer.beat is None or peer.beat["serial"] != beat["serial"]:
                peer.beat, peer.silent_seconds = beat, 0.0
        if self.verdict is None and self.store.check(["verdict"]):
            text, named, is_slip = json.loads(self.store.get("verdict"))
            self.verdict = Verdict(text, tuple(named), is_slip)
        self.exchanges += 1

    def _talk(self) -> None:
        while not self.stopped.is_set():
            self.poke.wait(self.interval)
            self.poke.clear()
            with contextlib.suppress(DistError, RuntimeError, ValueError, OSError):
                self.exchange()

    def refresh(self, seconds: float) -> bool:
        """Wait for an exchange that begins now. Returns whether there was one."""
        wanted, until = self.exchanges + 2, time.monotonic() + seconds  # one may be under way
        while self.exchanges < wanted and time.monotonic() < until:
            self.poke.set()
            time.sleep(0.02)
        return self.exchanges >= wanted

    def _judge(self) -> None:
        looked = time.monotonic()
        while not self.stopped.wait(self.interval):
            now = time.monotonic()
            verdict = self.look(min(now - looked, 2 * self.interval))
            looked = now
            if verdict is not None and not self.stopped.is_set():
                self.end(verdict)

    def look(self, awake_seconds: float) -> Verdict | None:
        """Count what went by since the last look; a verdict if all is over."""
        talked = self.exchanges > self.judged_exchanges
        self.cut_off_seconds = 0.0 if talked else self.cut_off_seconds + awake_seconds
        self.idle_seconds = 0.0 if self.count > self.judged_count else self.idle_seconds + awake_seconds
        self.judged_exchanges, self.judged_count = self.exchanges, self.count
        for peer in self.peers.values() if talked else ():
            peer.silent_seconds += awake_seconds
        if all(peer.is_done for peer in self.peers.values()):
            return None
        if self.verdict is not None:
            self.grace_seconds += awake_seconds
            return self.verdict if self.grace_seconds > GRACE_SECONDS else None
        if self.cut_off_seconds >= self.lost_after:
            return self._without_store()
        if silent := self._silent(self.lost_after):
            return self._lost(silent)
        return self._hung() if self.idle_seconds >= self.timeout else None

    def _silent(self, seconds: float) -> list[int]:
        return [rank for rank, peer in self.peers.items() if peer.silent_seconds >= seconds and not peer.is_done]

    def name(self, rank: int) -> str:
        beat = self.as_beat() if rank == self.rank else self.peers[rank].beat
        return f"rank {rank} (process {beat['pid']} on {beat['host']})" if beat else f"rank {rank}"

    def _place(self, rank: int) -> str:
        beat = self.as_beat() if rank == self.rank else self.peers[rank].beat
        return beat["where"] if beat else "its start"

    def _lost(self, ranks: Sequence[int]) -> Verdict:
        names = ", ".join(f"{self.name(rank)} at {self._place(rank)}" for rank in ranks)
        return Verdict(f"{names}: gone, stopped or cut off from the others, which end now", tuple(ranks))

    def _without_store(self) -> Verdict:
        where = "{}:{}".format(*self.address)
        if not self.keeps_store:
            return Verdict(f"the launcher's store at {where} does not answer any more: it is gone or cut off")
        name, named = (self.name(0), (0,)) if self.rank else ("this process", ())
        return Verdict(f"{name} at {self._place(0)}: gone, stopped or cut off (its store at {where} does not answer)", named)

    def _hung(self) -> Verdict:
        counts = {rank: peer.beat["count"] for rank, peer in self.peers.items() if peer.beat and not peer.is_done}
        counts[self.rank] = self.count
        behind = [rank for rank in sorted(counts) if counts[rank] == min(counts.values())]
        since = f"for {self.timeout:g} s (--ddp_timeout)"
        if len(behind) == len(counts):
            return Verdict(f"no rank has got any further {since}: all of them are at {self.where}")
        names = ", ".join(f"{self.name(rank)} at {self._place(rank)}" for rank in behind)
        return Verdict(f"{names}: no step {since}, and the other ranks wait for it", tuple(behind))

    def cause_of(self, error: BaseException) -> Verdict | None:
        """Why this rank's main thread failed, if it is another one's fault; its own fault is told to the others."""
        mine = Verdict(f"{self.name(self.rank)} failed at {self.where}: {_first_line(error)}")
        if isinstance(error, UserError):
            mine = Verdict(str(error), is_slip=True)
        elif isinstance(error, RuntimeError) and _COMMUNICATION.search(str(error)):
            if (found := self._search()) is not None:
                return found
        self.tell(mine)
        return None

    def _search(self) -> Verdict | None:
        """After a failed exchange: the rank whose process is gone or whose beats have stopped."""
        until = time.monotonic() + 6 * self.interval
        while time.monotonic() < until and self.verdict is None:
            fresh = self.refresh(self.interval)
            if self.verdict is not None:
                break
            if gone := [r for r, peer in self.peers.items() if not peer.is_done and _is_gone(peer.beat)]:
                return self._lost(gone)
            if not fresh and self.cut_off_seconds > 2 * self.interval:
                return self._without_store()
            if silent := self._silent(3 * self.interval):
                return self._lost(silent)
        return self.verdict

    def tell(self, verdict: Verdict) -> None:
        """Let the others know, as far as they can be reached."""
        self.mine = verdict
        self.refresh(2 * self.interval)
        if self.rank == 0 and self.keeps_store:
            time.sleep(2 * self.interval)  # the store ends with this process

    def end(self, verdict: Verdict) -> NoReturn:
        """End this process whatever its main thread is doing; one rank of a machine says why."""
        beats = {rank: peer.beat for rank, peer in self.peers.items() if peer.beat and rank not in verdict.named}
        neighbours = [rank for rank, beat in beats.items() if beat["host"] == socket.gethostname() and not _is_gone(beat)]
        if self.rank < min(neighbours, default=self.rank + 1):
            os.write(2, f"{Path(sys.argv[0]).name}: error: {verdict.text}\n".encode())
        if self.verdict is None:
            self.tell(verdict)
        os._exit(2 if verdict.is_slip else 1)

    def stop(self) -> None:
        """This rank has done its part: its silence means nothing from now on."""
        self.done = True
        self.refresh(self.interval)
        self.stopped.set()


_heartbeat: Heartbeat | None = None


def start(address: tuple[str, int], prefix: str, rank: int, size: int, timeout: float, keeps_store: bool) -> None:
    """Post and watch from now on. Call on all ranks, once they have met."""
    global _heartbeat
    _heartbeat = Heartbeat(address, prefix, rank, size, timeout, keeps_store)


def at(where: str) -> None:
    """The main thread begins something that takes its time; all ranks have to call it equally often."""
    if _heartbeat is not None:
        _heartbeat.at(where)


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Around a whole run: an exchange that fails because another rank is gone ends it with a line that names that rank.

    Whatever else this rank fails of is raised as it is, and told to the others.
    """
    global _heartbeat
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if _heartbeat is not None and (verdict := _heartbeat.cause_of(error)) is not None:
            if verdict.is_slip:
                raise UserError(verdict.text) from None
            sys.stdout.flush()
            _heartbeat.end(verdict)
        raise
    finally:
        if _heartbeat is not None:
            _heartbeat.stop()
            _heartbeat = None


def _is_gone(beat: dict[str, Any] | None) -> bool:
    """Whether a process of this machine (and of this container) has ended."""
    if beat is None or beat["host"] != socket.gethostname() or not beat["space"]:
        return False
    if beat["space"] != os.readlink(_PROC / "self/ns/pid"):
        return False
    try:
        return (_PROC / str(beat["pid"]) / "stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
