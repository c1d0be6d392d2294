"""Copies of shards on a local disk, in a folder of bounded size, which all processes of a machine share.

A copy appears whole: it is written aside, checked against the size that its place tells, and renamed. A lock a shard
lets one process fetch what others wait for. Where the room is used up, the copies that were used longest ago go first.
"""

import contextlib
import os
import re
import shutil
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import IO, Any

import fsspec
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from w2v2.errors import LocalError, UserError, one_line

FETCHED_AT_ONCE = 4
PAUSES = (1.0, 4.0, 16.0)  # seconds before another try to fetch
BLOCK_BYTES = 16 << 20  # that one request fetches
SILENT_SECONDS = 60  # after which a server that sends nothing has failed
LOCK, PART, UNPACKED = ".lock", ".part", ".unpacked"
GIGABYTE = 10**9
VERSIONS = (
    "ETag etag blob_id LastModified Last-Modified last_modified mtime modify modificationTime updated created".split()
)


@dataclass
class Shard:
    """A file of many utterances."""

    url: str
    name: str  # without the place where all shards lie
    path: str  # what is read: the file itself, or its copy
    size: int  # bytes, at its place
    audio_column: str | None = None  # of a Parquet file; None: by its name
    version: str = ""  # NAME=VALUE of what its place tells: a hash, or its time of change
    index: str = ""  # the file that lists its utterances
    copy_size: int | None = None  # bytes of what is read, once the shard is indexed

    @property
    def in_place(self) -> bool:
        return self.url == self.path

    @property
    def num_bytes(self) -> int:
        """Of what is read; about as many, until the shard is indexed."""
        return self.copy_size or self.size

    @property
    def is_parquet(self) -> bool:
        return find_suffix(self.url) == ".parquet"

    @property
    def is_there(self) -> bool:
        return os.path.exists(self.path)


def find_suffix(url: str) -> str:
    """In lower case; that of the path, where a query follows it."""
    return os.path.splitext(re.sub(r"\?.*", "", url) if "://" in url else url)[1].lower()


class ShardCache:
    """`fetch` makes sure that a shard's copy is there. `unpack` writes the copy of a Parquet file and returns its rows."""

    def __init__(self, folder: Path, most_bytes: int, unpack: Callable[[Shard, str, str], Any]):
        self.folder, self.most_bytes, self.unpack = folder, most_bytes, unpack
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / LOCK):
                pass
        except (OSError, NotImplementedError) as error:
            raise UserError(
                f"--shard_cache_dir {folder} cannot be written or locked ({one_line(error)}): give another folder"
            ) from None

    def fetch_all(self, shards: Sequence[Shard], title: str) -> None:
        """`fetch` each, several at once, with a bar."""
        if not (missing := [shard for shard in shards if not shard.in_place]):
            return
        with (
            ThreadPool(FETCHED_AT_ONCE) as pool,
            tqdm(total=len(missing), desc=title, unit=" shards", disable=None) as bar,
        ):
            for _ in pool.imap_unordered(self.fetch, missing):
                bar.update()

    def fetch(self, shard: Shard) -> None:
        """Fetch a shard that is not there; one that is there counts as used. Raises what `hold` raises."""
        if not (shard.in_place or self._touch(shard)):
            with self.hold(shard):
                pass

    @contextlib.contextmanager
    def hold(self, shard: Shard, anew: bool = False) -> Iterator[Any]:
        """The shard is there, fetched `anew` if so wished, and is not evicted. Gives what `unpack` returned, if called.

        Raises LocalError when all tries have failed, UserError for what is no shard.
        """
        if shard.in_place:
            yield None
            return
        with FileLock(shard.path + LOCK):
            yield None if not anew and self._touch(shard) else self._try_to_copy(shard)

    def _try_to_copy(self, shard: Shard) -> Any:
        for pause in (*PAUSES, None):
            try:
                return self._copy(shard)
            except UserError:
                raise
            except Exception as error:  # file systems raise whatever their clients raise
                if pause is None:
                    raise LocalError(
                        f"shard {shard.url} cannot be fetched after {len(PAUSES) + 1} tries ({one_line(error)}): mend its "
                        "place or the connection; a run goes on with --resume_from_checkpoint auto"
                    ) from None
                time.sleep(pause)

    def _touch(self, shard: Shard) -> bool:
        with contextlib.suppress(FileNotFoundError):
            os.utime(shard.path)
            return True
        return False

    def _copy(self, shard: Shard) -> Any:
        source, part, rows = shard.url, shard.path + PART, None
        if not shard.is_parquet or "://" in shard.url:
            source = part
            self._make_room(part, shard.size)
            with _open_remote(shard.url) as file, open(part, "r+b") as out:
                shutil.copyfileobj(file, out, BLOCK_BYTES)
                out.truncate()
                headers = file.headers if _is_http(shard.url) else None
            if (found := os.path.getsize(part)) != shard.size:
                raise OSError(f"{found:,} of {shard.size:,} bytes arrived: cut short, or changed since it was listed")
            _check_version(shard, headers)
        if shard.is_parquet:
            part = shard.path + UNPACKED + PART
            self._make_room(part, shard.num_bytes)
            rows = self.unpack(shard, source, part)
            if source != shard.url:
                os.unlink(source)
            else:
                _check_version(shard)
        if shard.copy_size and os.path.getsize(part) != shard.copy_size:
            raise UserError(f"shard {shard.url} holds other audio than when it was listed: start again")
        os.replace(part, shard.path)
        return rows

    def _make_room(self, part: str, num_bytes: int) -> None:
        """Evict what was used longest ago until `part` fits, and reserve it by an empty file of this size, which takes no
        blocks yet. What a lock holds stays: it is being fetched or indexed.
        """
        if num_bytes > self.most_bytes:
            held, needed = self.most_bytes / GIGABYTE, num_bytes / GIGABYTE
            raise UserError(f"--shard_cache_gb {held:g} is less than a shard, {needed:.3g} GB: raise it")
        with FileLock(self.folder / LOCK):
            Path(part).unlink(missing_ok=True)
            entries = []
            for entry in os.scandir(self.folder):
                with contextlib.suppress(FileNotFoundError):
                    if entry.name.startswith("shard-") and not entry.name.endswith(LOCK):
                        status = entry.stat()
                        entries.append((status.st_mtime_ns, status.st_size, entry.path))
            excess = sum(size for _, size, _ in entries) + num_bytes - self.most_bytes
            for _, size, path in sorted(entries):
                if excess <= 0:
                    break
                with contextlib.suppress(Timeout, FileNotFoundError), FileLock(_find_lock(path), blocking=False):
                    os.unlink(path)
                    excess -= size
            with open(part, "wb") as file:
                file.truncate(num_bytes)


def find_version(info: Mapping[str, Any]) -> str:
    """NAME=VALUE of what the place of a file tells of its version, "" for nothing."""
    name = next((name for name in VERSIONS if info.get(name)), None)
    return f"{name}={_spell(info[name])}" if name else ""


def _spell(value: Any) -> str:
    value = value.timestamp() if isinstance(value, datetime) else value
    return str(value).removeprefix("W/").strip('"')  # listings and files may differ in these


def _check_version(shard: Shard, headers: Mapping[str, Any] | None = None) -> None:
    """Raises OSError where the file is not the one that was listed. `headers`: of the answer, if there was one."""
    name, _, listed = shard.version.partition("=")
    if name and headers is None:
        files, path = fsspec.core.url_to_fs(shard.url)
        files.invalidate_cache(path)
        headers = files.info(path)
    if name and (value := headers.get(name)) and (found := _spell(value)) != listed:
        raise OSError(f"it was changed since it was listed: {name} is {found}, was {listed}")


def _is_http(url: str) -> bool:
    return url.startswith(("http://", "https://"))


def _open_remote(url: str) -> IO[bytes]:
    if _is_http(url):  # fsspec's client gives up after five minutes, or needs ranges
        return urllib.request.urlopen(url, timeout=SILENT_SECONDS)
    return fsspec.open(url, "rb", block_size=BLOCK_BYTES).open()


def _find_lock(path: str) -> str:
    """The lock of the shard whose copy, or unfinished copy, this is."""
    return path.removesuffix(PART).removesuffix(UNPACKED) + LOCK
