"""Checksums of a folder: the size and SHA-256 of each of its files, in a JSON file among them.

    {"config.json": {"size": 2043, "sha256": "9f86d081…"}, "model.safetensors": …}

`seal` reads every file once, right after it was written; `find_damage` says what has become of them since.
"""

import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

_CHUNK = 1 << 20
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


def seal(folder: Path, name: str) -> None:
    """Write the checksums of all files under `folder` into its file `name`, and make everything durable. Raises `OSError`.

    Reading (mostly from the page cache) and waiting for the disk overlap, a file each.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / name)
    with ThreadPoolExecutor() as pool:
        entries = list(pool.map(_make_durable, paths))
    record = {path.relative_to(folder).as_posix(): entry for path, entry in zip(paths, entries, strict=True)}
    (folder / name).write_text(json.dumps(record, indent=2), encoding="utf-8")
    sync(folder / name)
    for path in [*folder.rglob("*"), folder]:
        if path.is_dir():
            sync(path)


def find_damage(folder: Path, name: str, required: Iterable[str] = (), contents: bool = True) -> str | None:
    """Which file under `folder` is not as its file `name` records it, and how; None: all are, and `required` ones among them.

    Files that are not recorded do not matter. Without `contents`, presence and sizes alone are looked at, which costs next to nothing.
    Raises `OSError`, with the file's name, where one cannot be read: that may pass, and tells nothing of the file.
    """
    record = _read(folder / name)
    if record is None or not record.keys() >= set(required):
        return f"{name} is damaged"
    for file, entry in record.items():
        if (size := file_size(folder / file)) is None:
            return f"{file} is missing"
        if size != entry["size"]:
            return f"{file} has {size:,} bytes, was saved with {entry['size']:,}"
    if not contents:
        return None
    with ThreadPoolExecutor() as pool:
        found = pool.map(_sha256, [folder / file for file in record])
    for (file, entry), digest in zip(record.items(), found, strict=True):
        if digest != entry["sha256"]:
            return f"{file} has changed since it was saved (its SHA-256 differs)"
    return None


def file_size(path: Path) -> int | None:
    """In bytes; None where there is no such file, or something else. Raises `OSError` where that cannot be told (as `is_file` may not)."""
    try:
        status = os.stat(path)
    except ValueError:  # no name of a file
        return None
    except OSError as error:
        if error.errno in _ABSENT:
            return None
        raise
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def sync(path: Path) -> None:
    """Wait until the disk has a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make_durable(path: Path) -> dict[str, Any]:
    sync(path)
    return {"size": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    digest, chunk = hashlib.sha256(), memoryview(bytearray(_CHUNK))
    try:
        with open(path, "rb", buffering=0) as file:
            while size := file.readinto(chunk):
                digest.update(chunk[:size])
    except OSError as error:  # of reading, which names no file
        raise OSError(error.errno, error.strerror, str(path)) from error
    return digest.hexdigest()


def _read(path: Path) -> dict[str, dict[str, Any]] | None:
    """None where the file is absent, torn or of another form."""
    if file_size(path) is None:
        return None
    try:
        text = path.read_bytes()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    try:
        record = json.loads(text)
        is_whole = all(type(entry["size"]) is int and type(entry["sha256"]) is str for entry in record.values())
    except (ValueError, AttributeError, TypeError, KeyError):
        return None
    return record if is_whole else None
