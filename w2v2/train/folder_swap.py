"""Folders that are whole or absent under their names, whenever the process or the machine dies.

A folder is filled as `.unfinished-NAME` and gets its name by renaming. One that has the name already steps aside to `.replaced-NAME` in between
and is deleted last; `put_back` mends what a kill interrupted.
"""

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from w2v2.errors import one_line
from w2v2.train.checksums import sync

logger = logging.getLogger(__name__)

UNFINISHED = ".unfinished-"
REPLACED = ".replaced-"


@contextlib.contextmanager
def unfinished(final: Path) -> Iterator[Path]:
    """A new folder beside `final`, to be filled; removed again if that fails."""
    folder = final.with_name(UNFINISHED + final.name)
    shutil.rmtree(folder, ignore_errors=True)  # of a failure whose remains could not be removed either
    folder.mkdir(parents=True)
    try:
        yield folder
    except Exception:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def publish(folder: Path, final: Path) -> None:
    """Give a folder whose content is durable its name. Raises `OSError`, and then everything is as it was before."""
    put_back(final)
    aside, replaces = final.with_name(REPLACED + final.name), os.path.lexists(final)
    try:
        if replaces:
            os.replace(final, aside)
        os.replace(folder, final)
        sync(final.parent)
    except OSError:
        with contextlib.suppress(OSError):
            if not folder.exists():
                os.replace(final, folder)
            if replaces and os.path.lexists(aside):
                os.replace(aside, final)
        raise
    if replaces:
        discard(aside)


def put_back(final: Path) -> None:
    """End a `publish` that was killed: what stepped aside takes its name again, or goes where it has been replaced."""
    aside = final.with_name(REPLACED + final.name)
    if not os.path.lexists(aside):
        return
    if os.path.lexists(final):
        remove(aside)
    else:
        os.replace(aside, final)


def put_all_back(parent: Path) -> None:
    """`put_back` for everything that stepped aside in `parent`."""
    for aside in parent.glob(REPLACED + "*"):
        put_back(parent / aside.name.removeprefix(REPLACED))


def remove(path: Path) -> None:
    """Delete a file or folder; a folder loses its name first, so that a half-deleted one is never taken for whole."""
    if path.is_dir() and not path.is_symlink():
        doomed = path.with_name(UNFINISHED + "deleted-" + path.name)
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(path, doomed)
        shutil.rmtree(doomed)
    else:
        path.unlink(missing_ok=True)


def discard(path: Path) -> None:
    """`remove` for what merely takes up room: a failure is a warning."""
    try:
        remove(path)
    except OSError as error:
        logger.warning("%s is not needed any more but cannot be removed: %s", path, one_line(error))


def open_to_others(folder: Path) -> None:
    """safetensors writes files that their owner alone may read, whatever the umask says: give them the mode of those beside them."""
    for path in [*folder.glob("*.safetensors"), *folder.glob("training_state/*.safetensors")]:
        shutil.copymode(folder / "config.json", path)
