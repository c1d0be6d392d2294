"""What the ranks of a run post of themselves, and read of one another, in the store that they met in.

A beat is posted every `interval` seconds by a thread of its own, which may wait for the store as long as it likes: nobody waits for it.
"""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from torch.distributed import PrefixStore, TCPStore

STOP_SECONDS = 10.0
_PROC = Path("/proc")


class Verdict(NamedTuple):
    """Why all ranks end."""

    text: str
    lost: Sequence[int] = ()  # ranks that cannot say it themselves
    is_slip: bool = False  # the text is a `UserError`'s
    said_on: str = ""  # the machine on which it has been said already


@dataclass
class Peer:
    """What is known of another rank."""

    beat: dict[str, Any] | None = None  # as posted last
    silent_seconds: float = 0.0

    @property
    def is_done(self) -> bool:
        return self.beat is not None and self.beat["done"]

    @property
    def is_gone(self) -> bool:
        """Whether its process, of this machine and this container, has ended."""
        if self.beat is None or not self.beat["space"] or self.beat["space"] != _space():
            return False
        try:
            state = (_PROC / str(self.beat["pid"]) / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        return state in "ZX"


class Beats:
    """One rank's beats and its `peers`.

    Args:
        address: of the ranks' store.
        prefix: of this attempt's keys in it.
        interval: seconds between two beats.
        patience: seconds that the store may take to answer.
    """

    def __init__(self, address: tuple[str, int], prefix: str, rank: int, size: int, interval: float, patience: float):
        self.rank, self.interval = rank, interval
        self.peers = {other: Peer() for other in range(size) if other != rank}
        self.count, self.where, self.done = 0, "its start", False
        self.mine: Verdict | None = None  # what this rank has to say
        self.verdict: Verdict | None = None  # what was said first, by whichever rank
        self.exchanges = 0
        self.poked, self.stopped = threading.Event(), threading.Event()
        store = TCPStore(*address, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=patience))
        self.store = PrefixStore(prefix, store)
        self.exchange()
        self.thread = threading.Thread(target=self._talk, name="beats", daemon=True)
        self.thread.start()

    def as_beat(self) -> dict[str, Any]:
        values = dict(serial=self.exchanges, count=self.count, where=self.where, done=self.done)
        return values | dict(host=socket.gethostname(), space=_space(), pid=os.getpid())

    def exchange(self) -> None:
        """Post this rank's beat and verdict, read all others'. Raises RuntimeError where the store does not answer."""
        self.store.set(f"beat/{self.rank}", json.dumps(self.as_beat()))
        if self.mine is not None:
            self.store.compare_set("verdict", "", json.dumps(self.mine))
        known = [rank for rank, peer in self.peers.items() if peer.beat or self.store.check([f"beat/{rank}"])]
        for rank, text in zip(known, self.store.multi_get([f"beat/{rank}" for rank in known]), strict=True):
            beat, peer = json.loads(text), self.peers[rank]
            if peer.beat != beat:
                peer.beat, peer.silent_seconds = beat, 0.0
        if self.verdict is None and self.store.check(["verdict"]):
            self.verdict = Verdict(*json.loads(self.store.get("verdict")))
        self.exchanges += 1

    def _talk(self) -> None:
        while not self.stopped.is_set():
            self.poked.wait(self.interval)
            self.poked.clear()
            with contextlib.suppress(RuntimeError, ValueError):
                self.exchange()

    def refresh(self, seconds: float) -> bool:
        """Wait for an exchange that begins now. Returns whether there was one."""
        wanted, until = self.exchanges + 2, time.monotonic() + seconds  # one may be under way
        while self.exchanges < wanted and time.monotonic() < until:
            self.poked.set()
            time.sleep(0.02)
        return self.exchanges >= wanted

    def stop(self) -> None:
        """This rank has done its part: its silence means nothing from now on.

        The interpreter must not end while the thread is within the store: that aborts the process.
        """
        self.done = True
        self.refresh(self.interval)
        self.stopped.set()
        self.poked.set()
        self.thread.join(STOP_SECONDS)

    def name(self, rank: int) -> str:
        beat = self._beat(rank)
        return f"rank {rank} (process {beat['pid']} on {beat['host']}) at {beat['where']}" if beat else f"rank {rank}"

    def speaks_for_its_machine(self, but: Sequence[int]) -> bool:
        """Whether this is the first rank of its machine, those that are gone and `but` left aside."""
        here = socket.gethostname()
        others = [
            rank for rank, peer in self.peers.items() if peer.beat and peer.beat["host"] == here and not peer.is_gone
        ]
        return all(self.rank < rank for rank in set(others) - set(but))

    def _beat(self, rank: int) -> dict[str, Any] | None:
        return self.as_beat() if rank == self.rank else self.peers[rank].beat


def _space() -> str:
    """Where process numbers mean the same: a machine, and a container on it. Empty where that cannot be told."""
    try:
        return f"{socket.gethostname()} {(_PROC / 'sys/kernel/random/boot_id').read_text().strip()} {os.readlink(_PROC / 'self/ns/pid')}"
    except OSError:
        return ""
