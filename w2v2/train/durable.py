"""Files and folders that are whole or absent under their names, whenever the process or the machine dies.

A folder is filled as `.unfinished-NAME`, made durable together with the checksums of its files, and renamed:

    {"config.json": {"size": 2043, "sha256": "9f86d081…"}, "model.safetensors": …}
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

UNFINISHED = ".unfinished-"


def write_file(path: Path, content: bytes) -> None:
    """Replace a file's content: after a kill or a full disk it holds the old or the new one. Raises `OSError`."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    sync(temporary)
    os.replace(temporary, path)


@contextlib.contextmanager
def unfinished(final: Path) -> Iterator[Path]:
    """A new folder beside `final` to write into; an error removes it."""
    folder = final.with_name(UNFINISHED + final.name)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    except Exception:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def publish(folder: Path, final: Path) -> None:
    """Rename a folder whose content is durable to `final`. A folder of that name is removed first. Raises `OSError`."""
    remove(final)
    os.replace(folder, final)
    sync(final.parent)


def remove(path: Path) -> None:
    """Delete a file or folder, if it exists. A folder is renamed first, so that no half-deleted one keeps the name."""
    if path.is_dir() and not path.is_symlink():
        doomed = path.with_name(UNFINISHED + "deleted-" + path.name)
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(path, doomed)
        shutil.rmtree(doomed)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until the disk has a file's content, or a folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def match_modes(folder: Path) -> None:
    """Give safetensors files, which their owner alone may read whatever the umask says, the mode of `config.json`."""
    for path in [*folder.glob("*.safetensors"), *folder.glob("training_state/*.safetensors")]:
        shutil.copymode(folder / "config.json", path)


def write_checksums(folder: Path, name: str) -> None:
    """Make all files under `folder` durable, with their sizes and SHA-256 sums in its file `name`. Raises `OSError`."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / name)
    with ThreadPoolExecutor() as pool:  # reading one file overlaps with waiting for the disk to take another
        waits, sums = pool.map(sync, paths), list(pool.map(hash_file, paths))
        list(waits)  # raises what the disk refused
    entries = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": digest}
        for path, digest in zip(paths, sums, strict=True)
    }
    (folder / name).write_text(json.dumps(entries, indent=2), encoding="utf-8")
    for path in [folder / name, *filter(Path.is_dir, folder.rglob("*")), folder]:
        sync(path)


def find_mismatch(folder: Path, name: str, required: Iterable[str] = (), contents: bool = True) -> str | None:
    """Which file under `folder` differs from its checksum in the file `name`, and how. None: none does.

    `required` files need a checksum. Without `contents` only sizes are compared. Raises `OSError`.
    """
    try:
        entries = json.loads((folder / name).read_bytes())
        saved = {file: (entry["size"], entry["sha256"]) for file, entry in entries.items()}
    except (ValueError, KeyError):
        saved = {}
    if not saved.keys() >= {*required} or not saved:
        return f"{name} is damaged"
    for file, (size, _) in saved.items():
        if not (folder / file).is_file():
            return f"{file} is missing"
        if (found := (folder / file).stat().st_size) != size:
            return f"{file} has {found} bytes, was saved with {size}"
    with ThreadPoolExecutor() as pool:
        for file, found in zip(
            saved, pool.map(hash_file, map(folder.joinpath, saved)) if contents else (), strict=False
        ):
            if found != saved[file][1]:
                return f"{file} has changed since it was saved (its SHA-256 differs)"
    return None


def hash_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_lines(path: str | os.PathLike) -> list:
    """What the lines of a file say in JSON, without those that a kill or a full disk cut short; none of a missing file."""
    found = []
    with contextlib.suppress(FileNotFoundError), open(path, encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
    return found
