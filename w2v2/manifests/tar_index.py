"""What an uncompressed tar holds: its audio members, where they lie, and what small members tell of them.

A member's key is its name up to the first dot after its folders, as WebDataset has it. Small members of the same key
tell of it: `.txt` or `.transcript` its text, `.cls` its label, `.json` fields by their names. Headers and these are
read, the audio is not. What was found is kept in the cache by path, size and time of change.
"""

import hashlib
import json
import os
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq

from w2v2.audio.crops import AUDIO_SUFFIXES
from w2v2.audio.inspection import map_files
from w2v2.errors import UserError, one_line

COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
TELLING = {"txt": "text", "transcript": "text", "cls": "label", "json": "fields"}
MOST_TOLD_BYTES = 1 << 20  # of a member that tells of an utterance
INDEX = pa.schema([("id", pa.string()), ("offset", pa.int64()), ("size", pa.int64())]
                  + [(name, pa.string()) for name in ("text", "label", "fields")])  # fmt: skip
SCALARS = (str, int, float)
DAMAGED = (tarfile.TarError, ValueError, OverflowError)  # what tarfile raises on wrong headers
FORMAT = 1  # of a kept index: raise it when the same tar would give another
NOTES = {  # on a tar that is not as it should be
    "cut": "are cut short or damaged at a byte, and what lies behind it is missing",
    "empty": "hold no audio, judged by the suffixes of their members",
    "again": "hold members of the same name, of which the last counts",
    "several": "hold several audio members of one key, of which each is an utterance",
    "unread": "hold .json, .txt, .transcript or .cls members that are no JSON object or no UTF-8 text, and are not read",
}


def index_tars(paths: Sequence[str], cache_dir: str | Path | None = None) -> list[pa.Table]:
    """What each tar holds, `INDEX`; tars that are not in the cache are read by many processes. Raises UserError."""
    with ThreadPool(32) as pool:  # network storage answers many at once
        known = dict(zip(paths, pool.map(partial(_read_index, cache_dir=cache_dir), paths), strict=True))
    unknown = [path for path, index in known.items() if index is None]
    if unknown:
        found = map_files(unknown, partial(index_tar, cache_dir=cache_dir), "Reading tars' headers", at_once=1)
        known |= zip(unknown, found, strict=True)
    for path, index in known.items():
        if isinstance(index, str):
            raise UserError(f"{path} {index}")
    return list(known.values())


def index_tar(path: str, cache_dir: str | Path | None = None) -> pa.Table | str:
    """What a tar holds, or the reason why it cannot be used."""
    if not os.path.isfile(path):
        return "is a folder, a pipe or a device, not a tar"
    try:
        kept = _find_kept(path, cache_dir) if cache_dir is not None else None
        index = _scan(path)
    except DAMAGED as error:
        return f"is not a tar ({one_line(error)}): check the path, or fetch it again"
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    if kept and not isinstance(index, str) and kept == _find_kept(path, cache_dir):  # nobody wrote to it meanwhile
        aside = kept.with_name(f"{uuid4().hex}.tmp")
        kept.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(index, aside)
        aside.rename(kept)
    return index


def _find_kept(path: str, cache_dir: str | Path) -> Path:
    status = os.stat(path)
    key = json.dumps([FORMAT, os.path.abspath(path), status.st_size, status.st_mtime_ns])
    return Path(cache_dir, "tars", hashlib.blake2b(key.encode(), digest_size=16).hexdigest() + ".parquet")


def _read_index(path: str, cache_dir: str | Path | None) -> pa.Table | None:
    try:
        return pq.read_table(_find_kept(path, cache_dir)) if cache_dir is not None else None
    except (OSError, pa.ArrowInvalid):  # not read yet, or torn by an interruption
        return None


def _scan(path: str) -> pa.Table | str:
    audio, told, notes, passed_over = {}, defaultdict(dict), dict.fromkeys(NOTES, 0), Counter()
    with open(path, "rb") as file:
        head = file.read(6)
        if kind := next((kind for magic, kind in COMPRESSIONS.items() if head.startswith(magic)), None):
            return f"is compressed ({kind}), so its members cannot be read where they lie: decompress it to a .tar"
        file.seek(0)
        for member in _read_members(file, notes):
            parts = [part for part in member.name.split("/") if part not in ("", ".")] or [""]
            name, (key, _, ending) = "/".join(parts), parts[-1].partition(".")
            suffix, ending = os.path.splitext(parts[-1])[1].lower(), ending.lower()
            if not member.isreg() or member.issparse():
                passed_over["link or special"] += 1
            elif any(part.startswith(".") for part in parts):
                passed_over["hidden"] += 1
            elif suffix in AUDIO_SUFFIXES:
                notes["again"] += name in audio
                audio[name] = (member.offset_data, member.size)
            elif ending in TELLING and member.size <= MOST_TOLD_BYTES:
                content = os.pread(file.fileno(), member.size, member.offset_data)
                told["/".join([*parts[:-1], key])][ending] = content
            else:
                passed_over[suffix or "no suffix"] += 1
    rows = [{"offset": offset, "size": size} for offset, size in audio.values()]
    keys = [_split_key(name) for name in audio]
    for row, name, key in zip(rows, _name_members(list(audio)), keys, strict=True):
        row["id"] = name.encode("utf-8", "backslashreplace").decode()
        row |= _read_told(told.get(key, {}), notes)
    for key in told.keys() - set(keys):
        passed_over.update(f".{ending}" for ending in told[key])
    notes |= {"empty": int(not rows), "several": len(keys) - len(set(keys))}
    metadata = {"notes": json.dumps(notes | {"passed_over": passed_over})}
    return pa.Table.from_pylist(rows, INDEX).replace_schema_metadata(metadata)


def _read_members(file, notes: dict) -> Iterator[tarfile.TarInfo]:
    """All members but folders, whose data is whole; `notes["cut"]` says where others are missing."""
    size, end = os.fstat(file.fileno()).st_size, b""
    with tarfile.open(fileobj=file, mode="r:") as tar:
        try:
            while (member := tar.next()) is not None and 0 <= member.size <= size - member.offset_data:
                tar.members.clear()  # tarfile would hold a kilobyte a member
                if not member.isdir():
                    yield member
            end = os.pread(file.fileno(), tarfile.BLOCKSIZE, tar.offset)  # of zeros, where all is well
        except DAMAGED:
            pass
        if len(end) < tarfile.BLOCKSIZE or any(end):
            notes["cut"] = min(tar.offset, size)


def _split_key(name: str) -> str:
    folder, _, last = name.rpartition("/")
    return f"{folder}/" * bool(folder) + last.partition(".")[0]


def _name_members(names: list[str]) -> list[str]:
    """Keys where these tell the members apart, or else their names without the last suffix, or whole."""
    for shorten in (_split_key, lambda name: os.path.splitext(name)[0]):
        if len(set(short := list(map(shorten, names)))) == len(names):
            return short
    return names


def _read_told(members: dict[str, bytes], notes: dict) -> dict[str, str]:
    """Text, label and the fields of a JSON object that are text or numbers, as JSON."""
    row = {}
    for ending, content in members.items():
        try:
            text = content.decode("utf-8-sig").strip()
            if ending == "json":
                fields = json.loads(text).items()
                text = json.dumps({key.lower(): str(value) for key, value in fields if isinstance(value, SCALARS)})
            row[TELLING[ending]] = text
        except (ValueError, TypeError, AttributeError, RecursionError):
            notes["unread"] += 1
    return row
