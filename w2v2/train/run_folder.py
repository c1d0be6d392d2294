"""The run's folder: one run at a time writes into it, no run is overwritten unasked, and a restarted attempt goes on."""

import json
import os
import socket
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from filelock import FileLock, Timeout

from w2v2.errors import UserError
from w2v2.train.checkpoint import checkpoints, find_checkpoint
from w2v2.train.durable import UNFINISHED, remove, write_file
from w2v2.train.launch import on_main_process

LOCK_FILE, HOLDER_FILE = ".lock", ".holder.json"
RUN_FILES = ("metrics.jsonl", "pretrain_config.yaml", "model.safetensors")
BESIDE_THEM = ("skipped_audio.jsonl", "skipped_validation.jsonl", "non_finite_updates.jsonl", "codebook_use.jsonl")
BESIDE_THEM += ("events.jsonl", "report.html", "dry_run.json", "plots", "runs")
_locks: dict[Path, FileLock] = {}  # held until this process ends


def prepare_run_folder(args, accelerator: Accelerator) -> Path | None:
    """Lock `output_dir`, do with it what the flags say, and find the checkpoint to resume from (None: start anew).

    Call on all ranks. An attempt that the launcher restarted (`--max_restarts`) goes on with the newest checkpoint,
    whatever the flags say; the one that they name is the start where there is none yet. A dry run changes nothing.
    Raises `UserError` for a folder that cannot be written, is in use, or holds a run that the flags do not speak of.
    """
    # Of several machines, only the one that lost a worker may count the restart.
    is_restarted = any(gather_object([os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"]))
    checkpoint = on_main_process(accelerator, lambda: _prepare(args, is_restarted))
    if checkpoint and not all(gather_object([checkpoint.is_dir()])):
        raise UserError(
            f"{checkpoint} is not seen by all processes: --output_dir has to be on a file system that all machines share"
        )
    return checkpoint


def _prepare(args, is_restarted: bool) -> Path | None:
    output_dir, resume_from = Path(args.output_dir), args.resume_from_checkpoint
    for folder in (output_dir, *output_dir.parents):
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--output_dir {output_dir}: {folder} is a file; give a folder")
    if args.dry_run:
        return None

    before, launch = lock_folder(output_dir), os.environ.get("TORCHELASTIC_RUN_ID")
    if is_restarted and before.get("launch") == launch:
        if resume_from is None or checkpoints(output_dir):
            resume_from = "auto"
    else:
        # Until the flags are obeyed, a restart of this launch does not go on with what lies here.
        _write_holder(output_dir, launch=None)
        _obey_flags(args)
    for folder in output_dir.glob(UNFINISHED + "*"):
        remove(folder)
    _write_holder(output_dir, launch)
    return find_checkpoint(output_dir, resume_from)


def find_remains(folder: Path) -> list[Path]:
    """What a run left in `folder`; its checkpoints come last."""
    return [p for name in RUN_FILES if (p := folder / name).exists()] + sorted(folder.glob("checkpoint-*"))


def lock_folder(folder: Path, wait_seconds: float = 15.0) -> dict[str, Any]:
    """Keep other runs out of `folder` until this process ends; returns what the last holder noted.

    A run that is just ending is waited for: its data workers may hold the lock some seconds longer.
    Raises `UserError` for a folder that is held or cannot be locked.
    """
    path, is_held = folder.resolve() / LOCK_FILE, False
    lock = _locks.setdefault(path, FileLock(path))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=wait_seconds)
    except Timeout:
        is_held = True
    except (OSError, NotImplementedError) as error:
        raise UserError(f"--output_dir {folder} cannot be written or locked ({error}): give another folder") from None
    noted = folder / HOLDER_FILE
    holder = json.loads(noted.read_bytes()) if noted.exists() else {}
    if is_held:
        who = f"process {holder.get('pid', '?')} on {holder.get('host', '?')}"
        advice = "wait for that run or end it, or give another folder"
        raise UserError(f"--output_dir {folder} is being written by {who}: {advice}")
    return holder


def _write_holder(folder: Path, launch: str | None) -> None:
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "launch": launch}
    write_file(folder / HOLDER_FILE, json.dumps(holder).encode())


def _obey_flags(args) -> None:
    """Refuse, leave or delete the run that lies in `output_dir`.

    `--overwrite_output_dir` wins over `auto`: whoever asks for both, the one perhaps in a YAML file, starts anew.
    """
    output_dir, resume_from = Path(args.output_dir), args.resume_from_checkpoint
    remains = find_remains(output_dir)
    # A checkpoint of another folder does not make the run in this one ours.
    if resume_from not in (None, "auto") and Path(resume_from).resolve().parent == output_dir.resolve():
        # Going back leaves later checkpoints of another past behind, which `auto` would take for its own.
        whole = [folder.resolve() for folder in checkpoints(output_dir)]
        if Path(resume_from).resolve() in whole[:-1]:
            newer, advice = whole[-1].name, "remove what is newer, or resume into another --output_dir"
            raise UserError(f"--resume_from_checkpoint {resume_from}: {newer} is newer; {advice}")
    elif args.overwrite_output_dir:
        for flag in ("model_name_or_path", "config_name"):
            source = Path(getattr(args, flag) or "/").resolve()
            if source.exists() and source.is_relative_to(output_dir.resolve()):
                problem = f"{output_dir} holds {source}, which --{flag} names and which would be deleted; give another --output_dir"
                raise UserError(f"--overwrite_output_dir: {problem}")
        for path in [*remains, *(output_dir / name for name in BESIDE_THEM)]:
            remove(path)
    elif remains and resume_from != "auto":
        raise UserError(
            f"--output_dir {output_dir} already holds a run ({remains[0].name}): go on with --resume_from_checkpoint auto, "
            "start anew with --overwrite_output_dir, or give another folder"
        )
