"""A run's folder: whose it is, which of its checkpoints are whole, and which one a run goes on from."""

import contextlib
import json
import logging
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open

from w2v2.data.patience import patiently
from w2v2.errors import UserError, one_line
from w2v2.train import checksums
from w2v2.train.folder_swap import UNFINISHED, put_all_back, remove
from w2v2.train.launch import on_main_process

logger = logging.getLogger(__name__)

CHECKSUMS = "training_state/checksums.json"
_FILES = ("config.json", "model.safetensors", "training_state/optimizer.safetensors", "training_state/state.json")
_RUN_FILES = ("metrics.jsonl", "pretrain_config.yaml", "model.safetensors")


def claim_output_dir(output_dir: Path, overwrite: bool, resume_from: str | None, dry_run: bool = False) -> None:
    """Make sure that no run is overwritten unasked; a dry run overwrites none. Call on the main process.

    `overwrite` wins over `auto`: whoever asks for both, the one perhaps in a YAML file, starts anew.
    Raises `UserError` if `output_dir` holds a run that is neither resumed nor to be overwritten, holds checkpoints newer than the one
    to resume from, or is a file.
    """
    output_dir = Path(output_dir)
    # A checkpoint of another folder does not make the run in this one ours.
    resumes = resume_from is not None and (
        resume_from == "auto" or Path(resume_from).resolve().parent == output_dir.resolve()
    )
    for folder in (output_dir, *output_dir.parents):
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--output_dir {output_dir}: {folder} is a file; give a folder")
    if dry_run:
        return
    put_all_back(output_dir)
    remains = [p for name in _RUN_FILES if (p := output_dir / name).exists()] + sorted(output_dir.glob("checkpoint-*"))
    if remains and not resumes and not overwrite:
        raise UserError(
            f"--output_dir {output_dir} already holds a run ({remains[0].name}): go on with --resume_from_checkpoint auto, "
            "start anew with --overwrite_output_dir, or give another folder"
        )
    if resumes and resume_from != "auto" and not dry_run:
        _refuse_newer(output_dir, Path(resume_from))
    if overwrite and (not resumes or resume_from == "auto"):
        beside = ("skipped_audio.jsonl", "non_finite_updates.jsonl", "plots", "runs")
        for path in [*remains, *(output_dir / name for name in beside)]:
            remove(path)
    for folder in output_dir.glob(UNFINISHED + "*"):
        remove(folder)
    output_dir.mkdir(parents=True, exist_ok=True)


def _refuse_newer(output_dir: Path, checkpoint: Path) -> None:
    """A run that goes back leaves later checkpoints of another past behind, which `auto` would take for its own."""
    whole = [folder.resolve() for folder in whole_checkpoints(output_dir)]
    if checkpoint.resolve() in whole[:-1]:
        newer = whole[whole.index(checkpoint.resolve()) + 1]
        raise UserError(
            f"--resume_from_checkpoint {checkpoint}: {newer.name} is newer; remove what is newer, or resume into another --output_dir"
        )


def checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoints in `output_dir` that are whole by their files' sizes, oldest first; one that cannot be looked at is left out."""
    found = []
    with contextlib.suppress(OSError):
        for folder in _numbered(output_dir):
            with contextlib.suppress(OSError):
                found += [folder] if find_damage(folder, contents=False) is None else []
    return found


def whole_checkpoints(output_dir: Path) -> list[Path]:
    """The same at a start: what cannot be looked at is tried again, and then a `UserError`."""
    folders = patiently(lambda: _numbered(output_dir), output_dir)
    return [folder for folder in folders if _examine(folder, contents=False) is None]


def find_damage(folder: Path, contents: bool = True) -> str | None:
    """What keeps a checkpoint from being resumed from, naming the file; None: it is whole.

    Without `contents`, files are not read through: only their sizes are compared. A checkpoint of a version that saved no checksums
    is whole if its files can be loaded. Raises `OSError` where a file cannot be read, which is no damage: it may pass.
    """
    for name in _FILES:
        if checksums.file_size(folder / name) is None:
            return f"{name} is missing"
    if checksums.file_size(folder / CHECKSUMS) is not None:
        return checksums.find_damage(folder, CHECKSUMS, _FILES, contents)
    return next(filter(None, (_find_unloadable(folder, name) for name in _FILES)), None)


def _find_unloadable(folder: Path, name: str) -> str | None:
    """What is wrong with one file of a checkpoint without checksums. Raises `OSError` where it cannot be read."""
    with open(folder / name, "rb") as file:
        content = b"" if name.endswith(".safetensors") else file.read()
    try:
        if name.endswith(".safetensors"):
            with safe_open(folder / name, framework="numpy"):
                return None
        values = json.loads(content)
    except (ValueError, SafetensorError) as error:
        return f"{name} is torn ({one_line(error)})"
    if not isinstance(values, dict):
        return f"{name} is damaged"
    return f"{CHECKSUMS} is missing" if "has_checksums" in values else None


class Damage(NamedTuple):
    """Why a checkpoint is not resumed from."""

    what: str
    may_pass: bool  # a disk that fails to read; anything else is a difference


def _examine(folder: Path, contents: bool = True) -> Damage | None:
    """`find_damage`, tried again where a file cannot be read; a disk that goes on failing counts as damage. Raises `UserError`."""
    try:
        damage = patiently(lambda: find_damage(folder, contents), folder)
    except OSError as error:  # EIO
        name = os.path.relpath(error.filename, folder) if error.filename else folder.name
        return Damage(f"{name} cannot be read ({error.strerror})", may_pass=True)
    return damage and Damage(damage, may_pass=False)


def choose_checkpoint(accelerator: Accelerator, output_dir: Path, resume_from: str | None) -> Path | None:
    """`find_checkpoint` by the main process, for all ranks. Raises `UserError` where one of them does not see that folder."""
    folder = on_main_process(accelerator, lambda: find_checkpoint(output_dir, resume_from))
    if folder and not all(gather_object([folder.is_dir()])):
        raise UserError(
            f"{folder} is not seen by all processes: --output_dir has to be on a file system that all machines share"
        )
    return folder


def find_checkpoint(output_dir: Path, resume_from: str | None) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` means: none, the newest whole one (`auto`), or that path. It was read through.

    Newer ones that are damaged are passed over with a warning each. Raises `UserError` where there are only such, or where the one
    at that path is: a run never starts anew by itself beside checkpoints.
    """
    if resume_from is None:
        return None
    if resume_from == "auto":
        folder = _newest_whole(output_dir)
    else:
        folder = Path(resume_from)
        if not folder.is_dir():
            raise UserError(
                f"--resume_from_checkpoint {resume_from}: no such folder; give a checkpoint-<step> folder or `auto`"
            )
        read_state(folder)
        if damage := _examine(folder):
            raise UserError(
                f"--resume_from_checkpoint {folder}: {damage.what}; give another checkpoint, or `auto` for the newest whole one"
            )
    if folder and not (folder / CHECKSUMS).exists():
        logger.warning("%s is of a version that saved no checksums: its files can be loaded, more is not known", folder)
    return folder


def _newest_whole(output_dir: Path) -> Path | None:
    damaged = {}
    for folder in reversed(patiently(lambda: _numbered(output_dir), output_dir)):
        if (damage := _examine(folder)) is None:
            break
        damaged[folder] = damage
        logger.warning("%s is damaged and passed over: %s", folder, damage.what)
    else:
        if not damaged:
            return None
        folder, damage = next(iter(damaged.items()))
        raise UserError(
            f"--resume_from_checkpoint auto: no checkpoint in {output_dir} is whole, the newest being {folder.name}, whose {damage.what}; "
            "mend that, or start anew with --overwrite_output_dir"
        )
    for other, damage in damaged.items():
        if not damage.may_pass and _examine(other, contents=False) is None:
            _set_aside(other)
    return folder


def _set_aside(folder: Path) -> None:
    """Rename a checkpoint whose damage only reading it through shows, so that rotation does not count it."""
    aside = folder.with_name(folder.name + ".damaged")
    try:
        remove(aside)
        os.replace(folder, aside)
    except OSError as error:
        logger.warning("%s cannot be renamed to %s: %s", folder, aside.name, one_line(error))
    else:
        logger.warning("%s is now %s; nothing needs it", folder, aside.name)


def _numbered(output_dir: Path) -> list[Path]:
    """All folders named `checkpoint-<step>`, by step. Raises `OSError` where the folder cannot be looked into."""
    try:
        entries = os.scandir(output_dir)  # `Path.glob` finds nothing where it must not look
    except FileNotFoundError:
        return []
    with entries:
        names = [entry.name for entry in entries if re.fullmatch(r"checkpoint-\d+", entry.name) and entry.is_dir()]
    return sorted((Path(output_dir) / name for name in names), key=step_of)


def step_of(folder: Path) -> int:
    """The number in `checkpoint-<step>`."""
    return int(folder.name.rpartition("-")[2])


def read_state(folder: Path) -> dict[str, Any]:
    """`training_state/state.json` of a checkpoint. Raises `UserError` if it holds none."""
    path = Path(folder) / "training_state/state.json"
    text = patiently(lambda: b"" if checksums.file_size(path) is None else path.read_bytes(), path)
    try:
        return json.loads(text)
    except ValueError:
        raise UserError(
            f"{folder} holds no training state ({path.name} is missing or torn): resume from a checkpoint-<step> folder, or "
            "start from its weights alone with --model_name_or_path"
        ) from None
