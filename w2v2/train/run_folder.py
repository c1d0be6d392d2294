"""The run's folder: one run at a time writes into it, and a restarted attempt goes on with what its launch began."""

import errno
import fcntl
import hashlib
import json
import logging
import os
import socket
import time
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import Accelerator
from accelerate.utils import gather_object

from w2v2.errors import UserError
from w2v2.train.launch import is_restart, on_main_process
from w2v2.train.resuming import claim_output_dir, whole_checkpoints

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"
NOTE_BYTES = 4096  # one block: written at once or not at all
MOST_AGENTS = 180  # that a note has room for
_held: dict[Path, int] = {}  # descriptors: a lock lasts until this process ends


class Launch(NamedTuple):
    """What is known of the attempt at hand, over all ranks."""

    name: str | None  # of the launcher's run (`--rdzv_id`); None: no launcher that restarts
    agents: list[str]  # the launcher's processes, one a machine
    is_counted: bool  # whether any of them counts a restart


def claim(args, accelerator: Accelerator) -> None:
    """Take `output_dir` for this run, as the flags say (`claim_output_dir`). Call on all ranks.

    A restarted attempt of a launch that had already taken it goes on with the newest checkpoint, whatever the flags say; the one that they
    name is the start where there is none yet. `args` then say so, on all ranks.
    """
    launch = this_launch()
    args.resume_from_checkpoint, args.overwrite_output_dir = on_main_process(accelerator, lambda: _take(args, launch))


def this_launch() -> Launch:
    """Call on all ranks: of several machines only the one whose worker died counts a restart, and rank 0 may be on any of them."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    told = gather_object([(is_restart(), agent())])
    return Launch(name and name[:128], list(dict.fromkeys(who for _, who in told)), any(count for count, _ in told))


def agent() -> str:
    """A digest for this machine's agent of the launcher: the same in all its attempts, and never that of another process."""
    parent = os.getppid()
    try:  # where containers call their machines alike, and each has an agent with the number 1
        started = Path(f"/proc/{parent}/stat").read_bytes().rpartition(b")")[2].split()[19].decode()
    except (OSError, IndexError):
        started = ""
    return hashlib.sha256(f"{socket.gethostname()} {parent} {started}".encode()).hexdigest()[:12]


def _take(args, launch: Launch) -> tuple[str | None, bool]:
    """What `resume_from_checkpoint` and `overwrite_output_dir` come to."""
    output_dir, resume_from, overwrite = Path(args.output_dir), args.resume_from_checkpoint, args.overwrite_output_dir
    claim_output_dir(output_dir, overwrite, resume_from, dry_run=True)
    before = {} if args.dry_run else lock(output_dir)
    if _goes_on(before, launch, output_dir):
        claim_output_dir(output_dir, False, "auto")
        overwrite = False
        if resume_from is None or whole_checkpoints(output_dir):
            resume_from = "auto"
    else:
        if overwrite:
            _refuse_own_source(args)
        claim_output_dir(output_dir, overwrite, resume_from, args.dry_run)
    if not args.dry_run:
        _note(output_dir, dict(launch=launch.name, agents=launch.agents[:MOST_AGENTS]))
    return resume_from, overwrite


def _refuse_own_source(args) -> None:
    """Overwriting would remove what the run is to start from."""
    folder = Path(args.output_dir).resolve()
    for flag in ("model_name_or_path", "config_name"):
        source = getattr(args, flag)
        if source and (inside := Path(source).resolve()).exists() and (inside == folder or folder in inside.parents):
            raise UserError(
                f"--overwrite_output_dir: {folder} holds {inside}, which --{flag} names; give another --output_dir"
            )


def _goes_on(before: dict[str, Any] | None, launch: Launch, output_dir: Path) -> bool:
    """Whether `before`, the note of who took the folder last, is of an earlier attempt of this launch.

    One of its agents is there again: so it is even where none counts a restart, because machines came or went. Where a restart is
    counted, the launch's own name does too, and so does a note that cannot be read, lest a run be overwritten for it.
    """
    if launch.name is None:
        return False
    if before is None:
        if launch.is_counted:
            logger.warning(
                "%s cannot be read: the run in this folder is taken for this launch's", output_dir / LOCK_FILE
            )
        return launch.is_counted
    if before.get("launch") != launch.name:
        return False
    return not set(launch.agents).isdisjoint(before.get("agents", ())) or (launch.is_counted and launch.name != "none")


def lock(folder: Path, wait_seconds: float = 10.0) -> dict[str, Any] | None:
    """Keep other runs out of `folder` until this process ends, however it does. Returns what the last holder had noted: nothing where
    there was none, None where it cannot be read.

    A POSIX record lock: the kernel gives it back, NFS knows it across machines, and the loaders' processes do not inherit it. What a process
    that is just being killed still holds is waited for.

    Raises `UserError` naming the process and machine that hold it, or for a folder that cannot be written.
    """
    path = folder.resolve() / LOCK_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        is_new = not path.exists()
        descriptor = _held.get(path) or os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"--output_dir {folder} cannot be written ({error.strerror}): give another folder") from None
    until = time.monotonic() + wait_seconds
    while not _try_lock(descriptor, path):
        if time.monotonic() > until:
            holder = _read(descriptor) or {}
            os.close(descriptor)
            raise UserError(
                f"--output_dir {folder} is being written by process {holder.get('pid', '?')} on {holder.get('host', '?')}: wait for that run "
                "or end it, or give another folder"
            )
        time.sleep(0.2)
    _held[path] = descriptor
    before = {} if is_new and not os.fstat(descriptor).st_size else _read(descriptor)
    if before is not None:
        _note(folder, before)
    return before


def _note(folder: Path, launch: dict[str, Any]) -> None:
    """Write who holds the lock, beside the launch that the folder's run belongs to, over what stands there: it is never empty."""
    holder = dict(pid=os.getpid(), host=socket.gethostname())
    text = json.dumps({name: launch[name] for name in ("launch", "agents") if name in launch} | holder).encode()
    descriptor = _held[folder.resolve() / LOCK_FILE]
    if os.pwrite(descriptor, text.ljust(NOTE_BYTES), 0) < NOTE_BYTES:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / LOCK_FILE))
    os.fsync(descriptor)


def _try_lock(descriptor: int, path: Path) -> bool:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        logger.warning("%s: not locked (%s): make sure that no other run writes into this folder", path, error.strerror)
    return True


def _read(descriptor: int) -> dict[str, Any] | None:
    try:
        note = json.loads(os.pread(descriptor, NOTE_BYTES, 0))
    except (OSError, ValueError):
        return None
    return note if isinstance(note, dict) else None
