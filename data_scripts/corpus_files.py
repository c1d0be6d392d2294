"""What the data scripts share: measuring files, writing manifests, ending on a user's slip with one line."""

import argparse
import csv
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from w2v2.data.audio import SAMPLING_RATE, AudioError, probe
from w2v2.errors import UserError, printable

COLUMNS = ("id", "audio", "duration", "text", "speaker")


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and whose help shows the module's docstring as it is written."""

    def __init__(self, description: str):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        self.exit(2, printable(f"{self.prog}: error: {message}") + "\n")


def exit_status(prog: str, action: Callable[[], object]) -> int:
    """Run `action`; 0, or 2 and one line on standard error where it met a user's slip or an unusable path."""
    try:
        action()
    except (UserError, OSError) as error:
        print(printable(f"{prog}: error: {error}"), file=sys.stderr)
        return 2
    return 0


def measure(paths: Sequence[str], num_workers: int) -> tuple[list[float | None], list[AudioError]]:
    """Seconds of each file from its header (None: unusable), and the reasons of those; read by `num_workers` threads."""

    def length(path: str) -> float | AudioError:
        try:
            return probe(path) / SAMPLING_RATE
        except AudioError as error:
            return error

    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        bar = tqdm(pool.map(length, paths), total=len(paths), desc="Measuring", unit="file", disable=None)
        lengths = list(bar)
    errors = [length for length in lengths if isinstance(length, AudioError)]
    return [None if isinstance(length, AudioError) else length for length in lengths], errors


def write_manifest(path: Path, rows: Iterable[dict], columns: Sequence[str] = COLUMNS):
    """Write a CSV manifest whole or not at all; columns that a row lacks stay empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    with open(unfinished, "w", newline="", encoding="utf-8") as file:
        quoting = csv.QUOTE_MINIMAL, csv.QUOTE_ALL  # the former leaves a carriage return bare, which then ends the row
        minimal, quoted = (csv.DictWriter(file, columns, lineterminator="\n", quoting=kind) for kind in quoting)
        minimal.writeheader()
        for row in rows:
            (quoted if any("\r" in str(cell) for cell in row.values()) else minimal).writerow(row)
    os.replace(unfinished, path)
