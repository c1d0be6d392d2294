"""What the data scripts share: the command line, measuring audio, writing files whole."""

import argparse
import contextlib
import csv
import json
import multiprocessing
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np
from tqdm import tqdm

from w2v2 import errors
from w2v2.audio.crops import SAMPLING_RATE, AudioError, measure_length
from w2v2.audio.inspection import measure_lengths
from w2v2.errors import UserError, error_line, number, printable
from w2v2.manifests.segments import TOLERANCE

COLUMNS = ("id", "audio", "duration", "text", "speaker")
LENGTHS = ".lengths.jsonl"  # beside the manifests: what was measured before an interruption


class Parser(errors.Parser):
    """A script's command line. A slip is one line and status 2."""

    def add_corpus(self, folder: str, output: str = "--output") -> None:
        """What every script that makes manifests takes: a corpus, where to write, the number of processes."""
        self.add_argument("folder", type=Path, help=folder)
        if output == "--output":
            self.add_argument(output, type=parse_path, required=True, help="the manifest to write, a .csv")
        else:
            self.add_argument(output, type=Path, required=True, help="folder for the manifests")
        workers = number(int, min=1, max=1000)
        self.add_argument("--num_workers", type=workers, default=os.cpu_count(), help="processes that look at audio")

    def add_allow_incomplete(self) -> None:
        self.add_argument("--allow_incomplete", action="store_true", help="warn of what is not whole, and go on")

    def run(self, action: Callable[[argparse.Namespace], None], argv: Sequence[str] | None) -> int:
        """Run `action` with the parsed arguments. Returns 0, or 2 for a user's slip or an unusable path."""
        args = self.parse_args(argv)
        try:
            action(args)
        except (UserError, OSError) as error:
            print(error_line(error), file=sys.stderr)
            return 2
        return 0

    def error(self, message: str) -> NoReturn:
        self.exit(2, error_line(message) + "\n")


def parse_path(text: str, suffix: str = ".csv") -> Path:
    if not text.lower().endswith(suffix):
        raise argparse.ArgumentTypeError(f"{text}: the manifest has to end in {suffix}")
    return Path(text)


# -- audio


def measure(
    rows: list[dict], root: Path, manifest: Path, num_workers: int, sample: int | None = None
) -> tuple[list[dict], list[AudioError]]:
    """Complete the rows of usable files in place; returns them, and the reasons against the others.

    `audio` is relative to `root` before, and to the folder of `manifest` after. Every file is measured, and an
    interrupted measuring goes on. With a `sample`, a `duration` that a row has is held against the files of so many
    rows alone, evenly spread; the other files only have to be there.
    """
    folder, root = manifest.parent.resolve(), root.resolve()
    prefix = os.path.relpath(root, folder)
    paths = [str(root / row["audio"]) for row in rows]
    absent, measured = {}, range(len(rows))
    if sample is not None:
        with ThreadPool(32) as pool:  # network storage answers many at once
            names = list(dict.fromkeys(paths))
            looked = tqdm(pool.imap(_find_absent, names, 64), "Looking for files", len(names), disable=None)
            absent = {error.path: error for error in looked if error}
        spread = {*np.linspace(0, len(rows) - 1, min(len(rows), sample)).astype(int).tolist()} if rows else ()
        measured = (n for n, row in enumerate(rows) if n in spread or "duration" not in row)
    asked = dict.fromkeys(paths[n] for n in measured)
    files = [path for path in asked if path not in absent]
    lengths = measure_lengths(files, measure_length, folder, LENGTHS, num_workers)
    found, errors = [], []
    for row, path in zip(rows, paths, strict=True):
        length = lengths.get(path)
        if error := absent.get(path) or (AudioError(path, length) if isinstance(length, str) else None):
            errors.append(error)
        elif length and (reason := _find_misfit(row, length / SAMPLING_RATE)):
            errors.append(AudioError(path, reason))
        else:
            audio = Path(prefix, row["audio"]).as_posix()
            row["audio"] = f"./{audio}" if audio[0].isspace() else audio  # readers of CSV drop a space after a comma
            row.setdefault("duration", length and length / SAMPLING_RATE)
            found.append(row)
    return found, errors


def _find_absent(path: str) -> AudioError | None:
    with contextlib.suppress(OSError):
        return None if os.stat(path).st_size else AudioError(path, "is an empty file")
    return AudioError(path, "does not exist")


def _find_misfit(row: dict, seconds: float) -> str | None:
    """Why what a row says does not fit its file: `duration` of all of it, or what ends at `start` + it, or at `stop`."""
    stop = row.get("stop", row.get("start", 0.0) + row.get("duration", seconds))
    is_short = stop < seconds - TOLERANCE and not {"start", "stop"} & row.keys()
    return f"lasts {seconds:.2f} s, but its list says {stop:.2f} s" if is_short or stop > seconds + TOLERANCE else None


def measure_usable(rows: list[dict], args, unusable: Sequence[AudioError] = ()) -> list[dict]:
    """As `measure`, for a manifest --output. Unusable files are listed beside it; UserError if no file is usable."""
    found, errors = measure(rows, args.folder, args.output, args.num_workers)
    errors = [*unusable, *errors]
    if not found:
        raise UserError(
            f"{args.folder}: none of {len(errors)} files can be used: mend them, or give another folder; the first: {errors[0]}"
        )
    list_unusable(args.output, errors)
    return found


# -- files


@contextlib.contextmanager
def open_atomic(path: Path, mode: str = "w") -> Iterator[IO]:
    """A file that becomes `path`, whole and on the disk, when the block ends well; else `path` stays as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    options = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
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


def list_unusable(manifest: Path, errors: Sequence[AudioError]) -> None:
    """List what was left out of a manifest beside it."""
    list_skipped(manifest.with_suffix(".skipped.jsonl"), [{"audio": e.path, "reason": e.reason} for e in errors])


def write_manifest(path: Path, rows: Iterable[dict], columns: Sequence[str] = COLUMNS) -> None:
    """Write these columns of the rows as CSV, and print what they hold."""
    num_rows, seconds, speakers, labels = 0, 0.0, set(), Counter()
    with open_atomic(path) as file:
        quoting = csv.QUOTE_MINIMAL, csv.QUOTE_ALL  # the former leaves a carriage return bare, which then ends the row
        minimal, quoted = (csv.DictWriter(file, columns, "", "ignore", lineterminator="\n", quoting=q) for q in quoting)
        minimal.writeheader()
        for row in rows:
            (quoted if any("\r" in str(cell) for cell in row.values()) else minimal).writerow(row)
            num_rows, seconds = num_rows + 1, seconds + row["duration"]
            speakers.update(filter(None, [row.get("speaker")]))
            labels.update(filter(None, [row.get("label")]))
    named = "; " * bool(labels) + ", ".join(f"{label} {n:,}" for label, n in labels.most_common(10))
    print(f"{path}: {num_rows:,} utterances, {seconds / 3600:.2f} hours, {len(speakers):,} speakers{named}")


def map_finished(action: Callable[[Any], Any], items: Iterable, num_workers: int) -> Iterator[tuple[Any, Any]]:
    """Each item and what `action` makes of it, in the order in which worker processes finish (0: in this process).

    UserError names the items that were at work when a process died.
    """
    if not num_workers:
        yield from ((item, action(item)) for item in items)
        return
    waiting, running = iter(items), {}
    with ProcessPoolExecutor(num_workers, multiprocessing.get_context("forkserver")) as pool:
        while True:
            for item in islice(waiting, 2 * num_workers - 1 - len(running)):
                running[pool.submit(action, item)] = item
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                try:
                    yield running[future], future.result()
                except BrokenProcessPool:
                    names = ", ".join(sorted(map(str, running.values())))
                    remedy = "run it again with --num_workers 1 to see which, and take that out of the manifest"
                    raise UserError(f"a worker process died at one of {names}: {remedy}") from None
                del running[future]
