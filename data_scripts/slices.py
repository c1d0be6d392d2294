"""A script's work in slices, so that many processes or machines share it: `--slice 3/64` does the fourth of 64 parts.

A slice notes what it has done in a log of its own, and writes no manifest. The same command without --slice finds the
logs of all slices, does what is missing, and joins them to the bytes that one process writes. cluster.py starts both.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from w2v2.errors import UserError
from w2v2.train.durable import read_lines

USERS_SLIP = 2  # a script's status where trying again changes nothing
HELP = "do one part of many, as 0/64 … 63/64; the same command without this flag joins them (None: all)"


class Slice(NamedTuple):
    """Part `index`, counted from 0, of `count`."""

    index: int
    count: int

    def take(self, items: Sequence) -> Sequence:
        """Every `count`-th item: neighbours in a manifest are alike, and parts should take equally long."""
        return items[self.index :: self.count]

    def find_log(self, path: Path) -> Path:
        """This slice's own log beside `path`, that of all."""
        return path.with_name(f"{path.stem}-{self.index:05d}-of-{self.count:05d}{path.suffix}")


def parse_slice(text: str) -> Slice:
    """`I/N` as argparse's `type`."""
    found = re.fullmatch(r"(\d{1,5})/(\d{1,5})", text)
    if not found or not int(found[1]) < int(found[2]):
        raise argparse.ArgumentTypeError(f"{text}: write I/N, with I from 0 to N - 1")
    return Slice(int(found[1]), int(found[2]))


def find_logs(path: Path) -> list[Path]:
    """The logs that are there: that of all first, then those of slices."""
    digits = "[0-9]" * 5
    return [*[path] * path.exists(), *sorted(path.parent.glob(f"{path.stem}-{digits}-of-{digits}{path.suffix}"))]


def read_records(logs: Iterable[Path]) -> list:
    """What the whole lines of these logs say in JSON."""
    return [record for log in logs for record in read_lines(log)]


def remove_slices(path: Path) -> None:
    """Delete the logs of slices, whose lines `path` now has."""
    for log in find_logs(path):
        if log != path:
            log.unlink()


def refuse_unknown(num_samples: pa.ChunkedArray) -> None:
    """UserError where a length is not known: every slice would measure all files."""
    if unknown := num_samples.null_count:
        remedy = "run measure_audio.py first, and give the manifest that it writes"
        raise UserError(f"--slice needs every length, and {unknown:,} rows have none: {remedy}")


class RunScript:
    """A step of datatrove's: a script on the task's slice, or as it is, in a process that is tried again if it dies."""

    def __init__(self, command: list[str], output: Path, retries: int, is_sliced: bool):
        self.command, self.output, self.retries, self.is_sliced = command, output, retries, is_sliced
        self.folder = os.getcwd()

    def __repr__(self) -> str:
        return " ".join(self.command)

    def __call__(self, data: object, rank: int = 0, world_size: int = 1) -> None:
        name = f"{'task' if self.is_sliced else 'join'}-{rank:05d}.txt"
        command = [*self.command, "--slice", f"{rank}/{world_size}"] if self.is_sliced else self.command
        self.output.mkdir(parents=True, exist_ok=True)
        for _ in range(self.retries + 1):
            status = self.run_child(command, self.output / name)
            if status in (0, USERS_SLIP):
                break
        if status:
            how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
            last = "".join(f": {line}" for line in (self.output / name).read_text(errors="replace").splitlines()[-1:])
            raise UserError(f"{name[:-4]} {how}{last}; see {self.output / name}, and run the same command again")

    def run_child(self, command: list[str], output: Path) -> int:
        """The status of the process, which ends with this one where that is asked to stop."""
        with open(output, "ab") as file:
            child = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=self.folder)

        def stop(*_) -> None:
            child.kill()
            sys.exit(128 + signal.SIGTERM)

        is_main = threading.current_thread() is threading.main_thread()  # Ray's may not be
        before = signal.signal(signal.SIGTERM, stop) if is_main else None
        try:
            return child.wait()
        finally:
            child.kill()
            if is_main:
                signal.signal(signal.SIGTERM, before)
