"""What the data scripts share: measuring files, writing files whole, ending with one line on a user's slip."""

import argparse
import contextlib
import csv
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, NoReturn

from tqdm import tqdm

from w2v2.data.audio import SAMPLING_RATE, AudioError, probe
from w2v2.errors import UserError, printable

EXTENSIONS = ("wav", "flac", "ogg", "oga", "opus", "mp3", "aif", "aiff", "aifc", "au", "caf", "w64", "rf64", "sph")
COLUMNS = ("id", "audio", "duration", "text", "speaker")


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and whose help shows the module's docstring as it is written."""

    def __init__(self, description: str):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        self.exit(2, printable(f"{self.prog}: error: {message}") + "\n")


def exit_status(prog: str, action: Callable[[], object]) -> int:
    """Run `action`. Returns 0, or 2 after one line on standard error for a user's slip or an unusable path."""
    try:
        action()
    except (UserError, OSError) as error:
        print(printable(f"{prog}: error: {error}"), file=sys.stderr)
        return 2
    return 0


def check_csv(output: Path) -> None:
    if output.suffix.lower() != ".csv":
        raise UserError(f"--output {output}: the manifest is a CSV file, so let its name end in .csv")


def find_audio(folder: Path, extensions: Sequence[str] = EXTENSIONS) -> list[Path]:
    """Sorted paths of audio files, relative to `folder`. Links to folders are followed (each real folder once), hidden
    names are not. UserError where there is none.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    endings = tuple(f".{extension.lower().lstrip('.')}" for extension in extensions)
    found, seen = [], set()
    for here, folders, files in os.walk(folder, followlinks=True):
        if os.path.realpath(here) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(here))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        names = (name for name in files if not name.startswith(".") and name.lower().endswith(endings))
        found += [Path(here, name).relative_to(folder) for name in names]
    if not found:
        raise UserError(f"{folder}: no file that ends in {', '.join(endings)}")
    return sorted(found)


def measure(paths: Sequence[str], num_workers: int) -> tuple[list[float | None], list[AudioError]]:
    """Seconds of each file from its header (None: unusable), and the reasons for the unusable ones."""

    def read_length(path: str) -> float | AudioError:
        try:
            return probe(path) / SAMPLING_RATE
        except AudioError as error:
            return error

    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        results = pool.map(read_length, paths)
        lengths = list(tqdm(results, total=len(paths), desc="Measuring", unit="file", disable=None))
    errors = [length for length in lengths if isinstance(length, AudioError)]
    return [None if isinstance(length, AudioError) else length for length in lengths], errors


@contextlib.contextmanager
def open_atomic(path: Path, mode: str = "w", **options) -> Iterator[IO]:
    """A file that becomes `path`, whole and on the disk, when the block ends well; else `path` stays as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    if "b" not in mode:
        options = {"encoding": "utf-8", "newline": ""} | options
    try:
        with open(unfinished, mode, **options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_lines(path: Path, values: Iterable[dict]) -> None:
    """A JSON object a line."""
    with open_atomic(path) as file:
        file.writelines(json.dumps(value) + "\n" for value in values)


def list_skipped(path: Path, skipped: Sequence[dict]) -> None:
    """List unusable files (`audio`, `reason`, perhaps `id`) in `path`, and show the first few. An old list goes."""
    path.unlink(missing_ok=True)
    if skipped:
        write_lines(path, skipped)
        print(f"{len(skipped):,} left out, listed in {path}:", file=sys.stderr)
    for entry in skipped[:5]:
        print(printable(f"  {entry['audio']}: {entry['reason']}"), file=sys.stderr)


def write_manifest(path: Path, rows: Iterable[dict], columns: Sequence[str] = COLUMNS) -> None:
    """Write a CSV manifest. Columns that a row lacks stay empty."""
    with open_atomic(path) as file:
        quoting = csv.QUOTE_MINIMAL, csv.QUOTE_ALL  # the former leaves a carriage return bare, which then ends the row
        minimal, quoted = (csv.DictWriter(file, columns, lineterminator="\n", quoting=kind) for kind in quoting)
        minimal.writeheader()
        for row in rows:
            (quoted if any("\r" in str(cell) for cell in row.values()) else minimal).writerow(row)
