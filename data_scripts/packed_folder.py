"""The books of a packed folder: whose it is, which shards are whole, its index, its verification."""

import contextlib
import fcntl
import json
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from w2v2.data.packed import INDEX, SETTINGS, SHARDS, locate, sha256_of
from w2v2.errors import UserError

SKIPPED = "skipped.jsonl"
CACHE = "cache"  # measured lengths, where the manifest has none
OURS = re.compile(
    "|".join([r"shard-[0-9]{5,}\.arrow", *map(re.escape, (INDEX, SETTINGS, SHARDS, SKIPPED, CACHE)), r".*\.tmp"])
)
ROW_GROUP = 1 << 20
AGAIN = "run the same command again"


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder down to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A name to write to; what was written there takes its place as `path`, whole or not at all."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield unfinished
        with open(unfinished, "rb") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
        sync_folder(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


def write_json_lines(path: Path, values: Iterable[dict]) -> None:
    with written_aside(path) as unfinished:
        unfinished.write_text("".join(json.dumps(v, ensure_ascii=False) + "\n" for v in values), encoding="utf-8")


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """UserError where another packing is at work in the folder; a file system that knows no locks is trusted."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(f"another pack_audio.py is at work in {folder}: wait for it, or name another folder") from None
    except OSError:
        pass
    try:
        yield
    finally:
        os.close(descriptor)


def check_free(folder: Path) -> None:
    """UserError where the folder is a file or holds what no packing wrote."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_dir {folder} is a file: name a folder")
    other = sorted(path.name for path in folder.iterdir() if not OURS.fullmatch(path.name)) if folder.is_dir() else []
    if other:
        raise UserError(f"--output_dir {folder} holds other files, such as {other[0]}: name a new folder")


def claim(folder: Path, settings: dict, overwrite: bool) -> None:
    """Make the folder ours, or find that it is; UserError where other utterances or settings were packed into it."""
    shards = sorted(folder.glob("shard-*.arrow"))
    for leftover in folder.glob("*.tmp"):
        leftover.unlink()
    if overwrite:  # the settings go last: what an interruption leaves is still known for what it is
        for path in (folder / INDEX, folder / SHARDS, folder / SKIPPED, *shards, folder / SETTINGS):
            path.unlink(missing_ok=True)
    elif shards and not (folder / SETTINGS).exists():
        raise UserError(f"--output_dir {folder} holds shards but no {SETTINGS}: pack it anew with --overwrite")
    found = read_settings(folder)
    for name, value in settings.items() if found else ():
        if found.get(name) != value:
            what = "other utterances" if name.startswith("utterances") else f"{name} {found.get(name)}, not {value}"
            raise UserError(
                f"--output_dir {folder} was packed with {what}: name another folder, or pack it anew with --overwrite"
            )
    if not found:
        write_settings(folder, settings)


def read_settings(folder: Path) -> dict:
    """Empty where the folder is not packed."""
    try:
        return dict(json.loads((folder / SETTINGS).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError) as error:
        raise UserError(f"{folder / SETTINGS} is damaged ({error}): pack the folder anew with --overwrite") from None


def write_settings(folder: Path, settings: dict) -> None:
    with written_aside(folder / SETTINGS) as unfinished:
        unfinished.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def read_records(folder: Path) -> dict[str, dict]:
    """Lines of `shards.jsonl` by shard; one that a kill cut short is left out."""
    records = {}
    with contextlib.suppress(FileNotFoundError):
        for line in (folder / SHARDS).read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                record = json.loads(line)
                records[record["shard"]] = record
    return records


def fault(folder: Path, record: dict, deep: bool = False) -> str | None:
    """What is wrong with a shard: missing, of another size than when it was written, or (`deep`) of other content."""
    path = folder / record["shard"]
    if not path.is_file():
        return f"{path} is missing"
    if (size := path.stat().st_size) != record["bytes"]:
        return f"{path} has {size} bytes where {record['bytes']} were written"
    return f"{path} is damaged: its SHA-256 has changed" if deep and sha256_of(path) != record["sha256"] else None


def write_index(folder: Path, table: pa.Table, bounds: list[tuple[int, int]], records: list[dict]) -> None:
    """`utterances.parquet`: the source's rows in their order, with addresses for paths, less those that could not be read."""
    parts = []
    for (first, last), record in zip(bounds, records, strict=True):
        rows = kept(last - first, record)
        try:
            firsts, lengths = locate(folder / record["shard"])
        except (pa.ArrowInvalid, OSError):
            firsts, lengths = [], []
        if len(firsts) != len(rows):
            raise UserError(f"{folder / record['shard']} is damaged: delete it and {AGAIN}")
        part = table.slice(first, last - first).take(pa.array(rows))
        pieces = (record["shard"], "#", pa.array(firsts).cast(pa.string()), "+", pa.array(lengths).cast(pa.string()))
        audio = pc.binary_join_element_wise(*pieces, "")
        parts.append(part.set_column(part.column_names.index("audio"), "audio", audio).drop_columns("start"))
    index = pa.concat_tables(parts).replace_schema_metadata(None)
    if not len(index):
        raise UserError(f"none of {len(table)} utterances could be read: see {folder / SKIPPED}")
    with written_aside(folder / INDEX) as unfinished:
        pyarrow.parquet.write_table(index, unfinished, row_group_size=ROW_GROUP, compression="zstd")


def kept(num_rows: int, record: dict) -> np.ndarray:
    """Rows of a shard's part of the manifest that were packed, int64."""
    return np.setdiff1d(np.arange(num_rows), [row for row, _ in record["skipped"]])


def verify(folder: Path, num_workers: int) -> dict[str, dict]:
    """Read every shard and the index again. Returns the records; UserError names what is missing or damaged."""
    settings, records = read_settings(folder), read_records(folder)
    if not settings:
        raise UserError(f"--verify {folder}: no packed folder, for it has no {SETTINGS}")
    if "index_sha256" not in settings:
        raise UserError(f"{folder}: its packing was not finished: {AGAIN} that began it")
    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        faults = [found for found in pool.map(lambda r: fault(folder, r, deep=True), records.values()) if found]
    if len(records) != settings["shards"]:
        faults.append(f"{folder / SHARDS} lists {len(records)} shards of {settings['shards']}")
    if not (folder / INDEX).is_file() or sha256_of(folder / INDEX) != settings["index_sha256"]:
        faults.append(f"{folder / INDEX} is missing or damaged")
    if faults:
        more = f" (and {len(faults) - 5} more)" if len(faults) > 5 else ""
        raise UserError(f"{'; '.join(faults[:5])}{more}: delete what is damaged and run the packing's command again")
    return records
