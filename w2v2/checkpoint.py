"""Checkpoints: a folder that `from_pretrained` accepts, with the training state beside the weights.

    checkpoint-<step>/config.json, model.safetensors, preprocessor_config.json      what users load
    checkpoint-<step>/training_state/optimizer.safetensors, state.json              what a run resumes from

A folder is written under another name, made durable and renamed, so a checkpoint that has its name is whole. Tensors are
safetensors and the rest is JSON: nothing a checkpoint holds is ever executed. There are no states of random generators,
because there are none to save.
"""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from w2v2.errors import UserError

_TEMPORARY = ".unfinished-"
_FILES = ("config.json", "model.safetensors", "training_state/optimizer.safetensors", "training_state/state.json")
_RUN_FILES = ("metrics.jsonl", "pretrain_config.yaml", "model.safetensors")


def save_model(folder: Path, accelerator: Accelerator, model, feature_extractor) -> None:
    """Write the folder that stock classes load: weights, configuration and feature extractor. Call on all ranks."""
    weights = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        bare = accelerator.unwrap_model(model)
        bare.save_pretrained(folder, state_dict=weights)
        bare.config.architectures = ["Wav2Vec2ForPreTraining"]
        bare.config.save_pretrained(folder)
        feature_extractor.save_pretrained(folder)


def save_checkpoint(
    output_dir: Path, accelerator: Accelerator, model, optimizer, feature_extractor, state, keep: int
) -> Path:
    """Save `checkpoint-<step>` atomically and remove the oldest beyond `keep` (0: none). Call on all ranks.

    `state` has a `step` and an `as_dict()` that JSON can hold.
    """
    final = Path(output_dir) / f"checkpoint-{state.step}"
    folder = final.with_name(_TEMPORARY + final.name)
    save_model(folder, accelerator, model, feature_extractor)
    tensors = _flatten(get_optimizer_state_dict(model, optimizer.optimizer, options=_gathered()))
    if accelerator.is_main_process:
        (folder / "training_state").mkdir()
        save_file(tensors, folder / "training_state/optimizer.safetensors")
        scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
        text = json.dumps(state.as_dict() | {"scaler": scaler}, indent=2)
        (folder / "training_state/state.json").write_text(text, encoding="utf-8")
        _make_durable(folder)
        if final.exists():  # only a run that repeats a step finds one
            remove(final)
        os.replace(folder, final)
        _sync(final.parent)
        if keep > 0:
            _rotate(output_dir, state.step, keep)
    accelerator.wait_for_everyone()
    return final


def _rotate(output_dir: Path, step: int, keep: int) -> None:
    """Remove all but the newest `keep` up to this step; a run that went back to an older one leaves the newer ones alone."""
    upto = [folder for folder in checkpoints(output_dir) if int(folder.name.rpartition("-")[2]) <= step]
    for old in upto[:-keep]:
        remove(old)


def load_optimizer(folder: Path, accelerator: Accelerator, model, optimizer) -> None:
    """Restore the optimizer's (and the loss scaler's) state; the hyperparameters are the run's own.

    Raises `UserError` when the file is missing or torn.
    """
    path = Path(folder) / "training_state/optimizer.safetensors"
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} is missing or torn ({error}): resume from another checkpoint, or start from the weights alone with "
            "--model_name_or_path"
        ) from None
    state: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, what = key.rpartition("/")
        state.setdefault(name, {})[what] = tensor
    groups = get_optimizer_state_dict(model, optimizer.optimizer, options=_gathered())["param_groups"]
    set_optimizer_state_dict(
        model,
        optimizer.optimizer,
        {"state": state, "param_groups": groups},
        options=StateDictOptions(full_state_dict=True),
    )
    scaler = read_state(folder).get("scaler")
    if accelerator.scaler is not None and scaler:
        accelerator.scaler.load_state_dict(scaler)


def read_state(folder: Path) -> dict[str, Any]:
    """`training_state/state.json` of a checkpoint. Raises `UserError` if it holds none."""
    path = Path(folder) / "training_state/state.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(
            f"{folder} holds no training state ({path.name} is missing or torn): resume from a checkpoint-<step> folder, or "
            "start from its weights alone with --model_name_or_path"
        ) from None


def checkpoints(output_dir: Path) -> list[Path]:
    """Whole checkpoints in `output_dir`, oldest first."""
    found = []
    for folder in Path(output_dir).glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", folder.name)
        if match and all((folder / name).is_file() for name in _FILES):
            found.append((int(match[1]), folder))
    return [folder for _, folder in sorted(found)]


def find_checkpoint(output_dir: Path, resume_from: str | None) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` means: none, the newest whole one (`auto`), or that path."""
    if resume_from is None:
        return None
    if resume_from == "auto":
        return (checkpoints(output_dir) or [None])[-1]
    if not Path(resume_from).is_dir():
        raise UserError(
            f"--resume_from_checkpoint {resume_from}: no such folder; give a checkpoint-<step> folder or `auto`"
        )
    read_state(Path(resume_from))
    return Path(resume_from)


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
    remains = [p for name in _RUN_FILES if (p := output_dir / name).exists()] + sorted(output_dir.glob("checkpoint-*"))
    if remains and not resumes and not overwrite:
        raise UserError(
            f"--output_dir {output_dir} already holds a run ({remains[0].name}): go on with --resume_from_checkpoint auto, "
            "start anew with --overwrite_output_dir, or give another folder"
        )
    if resumes and resume_from != "auto" and not dry_run:
        _refuse_newer(output_dir, Path(resume_from))
    if overwrite and (not resumes or resume_from == "auto"):
        for name in ("skipped_audio.jsonl", "non_finite_updates.jsonl", "plots", "runs"):
            remove(output_dir / name)
        for path in remains:
            remove(path)
    for folder in output_dir.glob(_TEMPORARY + "*"):
        remove(folder)
    output_dir.mkdir(parents=True, exist_ok=True)


def _refuse_newer(output_dir: Path, checkpoint: Path) -> None:
    """A run that goes back leaves later checkpoints of another past behind, which `auto` would take for its own."""
    whole = [folder.resolve() for folder in checkpoints(output_dir)]
    if checkpoint.resolve() in whole[:-1]:
        newer = whole[whole.index(checkpoint.resolve()) + 1]
        raise UserError(
            f"--resume_from_checkpoint {checkpoint}: {newer.name} is newer; remove what is newer, or resume into another --output_dir"
        )


def remove(path: Path) -> None:
    """Delete a file or folder; a checkpoint loses its name first, so that a half-deleted one is never taken for whole."""
    if path.is_dir() and not path.is_symlink():
        doomed = path.with_name(_TEMPORARY + "deleted-" + path.name)
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(path, doomed)
        shutil.rmtree(doomed)
    else:
        path.unlink(missing_ok=True)


def _gathered() -> StateDictOptions:
    return StateDictOptions(full_state_dict=True, cpu_offload=True)


def _flatten(optimizer_state: dict) -> dict[str, torch.Tensor]:
    return {
        f"{name}/{what}": torch.as_tensor(value).contiguous()
        for name, values in optimizer_state.get("state", {}).items()
        for what, value in values.items()
    }


def _make_durable(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
