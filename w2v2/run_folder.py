"""The run's folder: one run at a time writes into it, and a restarted attempt goes on with what its launch began."""

import errno
import fcntl
import json
import logging
import os
import socket
import time
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from w2v2.errors import UserError
from w2v2.launch import is_restart
from w2v2.main_process import on_main_process
from w2v2.resuming import checkpoints, claim_output_dir

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"
_held: dict[Path, int] = {}  # descriptors: a lock lasts until this process ends


def claim(args, accelerator: Accelerator) -> None:
    """Take `output_dir` for this run, as the flags say (`claim_output_dir`). Call on all ranks.

    A restarted attempt of a launch that had already taken it goes on with the newest checkpoint, whatever the flags say; the one that they
    name is the start where there is none yet. `args` then say so, on all ranks.
    """
    args.resume_from_checkpoint, args.overwrite_output_dir = on_main_process(accelerator, lambda: _take(args))


def _take(args) -> tuple[str | None, bool]:
    """What `resume_from_checkpoint` and `overwrite_output_dir` come to."""
    output_dir, resume_from, overwrite = Path(args.output_dir), args.resume_from_checkpoint, args.overwrite_output_dir
    claim_output_dir(output_dir, overwrite, resume_from, dry_run=True)
    before = {} if args.dry_run else lock(output_dir)
    if is_restart() and before.get("launch") == launch():
        claim_output_dir(output_dir, False, "auto")
        overwrite = False
        if resume_from is None or checkpoints(output_dir):
            resume_from = "auto"
    else:
        claim_output_dir(output_dir, overwrite, resume_from, args.dry_run)
    if not args.dry_run:
        _note(output_dir, launch())
    return resume_from, overwrite


def launch() -> str:
    """What all attempts of one launch have in common, and no two launches."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    if name != "none" and int(os.environ.get("GROUP_WORLD_SIZE", 1)) > 1:
        return name  # rank 0 may come to another machine
    return f"{name} {socket.gethostname()} {os.getppid()}"


def lock(folder: Path, wait_seconds: float = 10.0) -> dict[str, Any]:
    """Keep other runs out of `folder` until this process ends, however it does. Returns what the last holder had noted.

    A POSIX record lock: the kernel gives it back, NFS knows it across machines, and the loaders' processes do not inherit it. What a process
    that is just being killed still holds is waited for.

    Raises `UserError` naming the process and machine that hold it, or for a folder that cannot be written.
    """
    path = folder.resolve() / LOCK_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _held.get(path) or os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"--output_dir {folder} cannot be written ({error.strerror}): give another folder") from None
    until = time.monotonic() + wait_seconds
    while not _try_lock(descriptor, path):
        if time.monotonic() > until:
            holder = _read(descriptor)
            os.close(descriptor)
            raise UserError(
                f"--output_dir {folder} is being written by process {holder.get('pid', '?')} on {holder.get('host', '?')}: wait for that run "
                "or end it, or give another folder"
            )
        time.sleep(0.2)
    _held[path] = descriptor
    before = _read(descriptor)
    _note(folder, before.get("launch"))
    return before


def _note(folder: Path, launch: str | None) -> None:
    """Write who holds the lock, and which launch the folder's run belongs to."""
    descriptor, text = (
        _held[folder.resolve() / LOCK_FILE],
        json.dumps(dict(pid=os.getpid(), host=socket.gethostname(), launch=launch)).encode(),
    )
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, text, 0)


def _try_lock(descriptor: int, path: Path) -> bool:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        logger.warning("%s: not locked (%s): make sure that no other run writes into this folder", path, error.strerror)
    return True


def _read(descriptor: int) -> dict[str, Any]:
    try:
        return json.loads(os.pread(descriptor, 10_000, 0))
    except ValueError:
        return {}
