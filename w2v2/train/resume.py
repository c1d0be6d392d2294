"""Which checkpoint a run goes on from: the newest one that is whole, or the one that the user names."""

import json
import logging
import os
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from w2v2.errors import UserError, one_line
from w2v2.train.durable import find_mismatch, remove

logger = logging.getLogger(__name__)

OPTIMIZER, STATE = "training_state/optimizer.safetensors", "training_state/state.json"
CHECKSUMS = "training_state/checksums.json"
FILES = ("config.json", "model.safetensors", OPTIMIZER, STATE)  # without one of these no run resumes


def read_state(folder: Path) -> dict[str, Any]:
    """`training_state/state.json` of a checkpoint. Raises `UserError` if it holds none."""
    try:
        return json.loads((Path(folder) / STATE).read_bytes())
    except (OSError, ValueError):
        raise UserError(
            f"{folder} holds no training state (state.json is missing or torn): resume from a checkpoint-<step> folder, or "
            "start from its weights alone with --model_name_or_path"
        ) from None


def checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoints in `output_dir` that are whole by their files' sizes, oldest first."""
    return [folder for folder in _numbered(output_dir) if find_damage(folder, contents=False) is None]


def find_checkpoint(output_dir: Path, resume_from: str | None) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` means: none, the newest whole one (`auto`), or that path.

    Its files are compared with their checksums. `auto` passes over newer ones that are damaged, with a warning each; it
    never starts anew beside checkpoints of which none is whole. Raises `UserError` then, and for a damaged path.
    """
    if resume_from is None:
        return None
    if resume_from == "auto":
        folder = _find_newest(output_dir)
    else:
        folder = Path(resume_from)
        flag = f"--resume_from_checkpoint {resume_from}"
        if not folder.is_dir():
            raise UserError(f"{flag}: no such folder; give a checkpoint-<step> folder or `auto`")
        read_state(folder)
        if damage := _examine(folder):
            raise UserError(f"{flag}: {damage}; give another checkpoint, or `auto` for the newest whole one")
    if folder and not (folder / CHECKSUMS).exists():
        logger.warning("%s is of a version that saved no checksums: its files load, more is not known", folder)
    return folder


def _find_newest(output_dir: Path) -> Path | None:
    damaged = {}
    for folder in reversed(_numbered(output_dir)):
        if (damage := _examine(folder)) is None:
            _set_aside(damaged)
            return folder
        logger.warning("%s is damaged and passed over: %s", folder, damage)
        damaged[folder] = damage
    for folder, damage in damaged.items():
        raise UserError(
            f"--resume_from_checkpoint auto: no checkpoint in {output_dir} is whole, the newest being {folder.name}, whose "
            f"{damage}; mend that, or start anew with --overwrite_output_dir"
        )
    return None


def _set_aside(damaged: dict[Path, str]) -> None:
    """Rename checkpoints whose damage their files' sizes do not show, so that rotation does not count them."""
    for folder in damaged:
        if find_damage(folder, contents=False) is None:
            aside = folder.with_name(folder.name + ".damaged")
            remove(aside)
            os.replace(folder, aside)
            logger.warning("%s is now %s; nothing needs it", folder, aside.name)


def find_damage(folder: Path, contents: bool = True) -> str | None:
    """What keeps a checkpoint from being resumed from, naming the file; None: it is whole.

    Without `contents` only sizes are compared. A checkpoint of a version that saved no checksums is whole if its files load.
    Raises `OSError` where a file cannot be read.
    """
    for name in FILES:
        if not (folder / name).is_file():
            return f"{name} is missing"
    if (folder / CHECKSUMS).is_file():
        return find_mismatch(folder, CHECKSUMS, FILES, contents)
    for name in FILES:
        try:
            if name.endswith(".safetensors"):
                with safe_open(folder / name, framework="numpy"):
                    pass
            else:
                values = json.loads((folder / name).read_bytes())
        except (ValueError, SafetensorError) as error:
            return f"{name} is torn ({one_line(error)})"
    return f"{CHECKSUMS} is missing" if "has_checksums" in values else None


def _examine(folder: Path) -> str | None:
    try:
        return find_damage(folder)
    except OSError as error:  # which may pass: no reason to go back to an older one
        advice = "start again when it can be, or remove it to go on from an older one"
        raise UserError(f"{folder} cannot be read ({one_line(error)}): {advice}") from None


def _numbered(output_dir: Path) -> list[Path]:
    """All folders named `checkpoint-<step>`, by step."""
    folders = Path(output_dir).glob("checkpoint-*")
    return sorted((f for f in folders if re.fullmatch(r"checkpoint-\d+", f.name) and f.is_dir()), key=step_of)


def step_of(folder: Path) -> int:
    """The number in `checkpoint-<step>`."""
    return int(folder.name.rpartition("-")[2])
