"""Checkpoints: a folder that `from_pretrained` accepts, with the training state beside the weights.

    checkpoint-<step>/config.json, model.safetensors, preprocessor_config.json      what users load
    checkpoint-<step>/training_state/optimizer.safetensors, state.json              what a run resumes from
    checkpoint-<step>/training_state/checksums.json                                 size and SHA-256 of each of these

A folder is written under another name, made durable and renamed, so a kill leaves no half of one; what a disk makes of it later
shows in the checksums. Tensors are safetensors and the rest is JSON: nothing a checkpoint holds is ever executed. There are no states
of random generators, because there are none to save.
"""

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from w2v2.errors import UserError, one_line
from w2v2.train import checksums
from w2v2.train.folder_swap import discard, open_to_others, publish, unfinished
from w2v2.train.launch import on_main_process
from w2v2.train.resuming import CHECKSUMS, checkpoints, read_state, step_of

logger = logging.getLogger(__name__)


def save_model(folder: Path, accelerator: Accelerator, model, feature_extractor) -> None:
    """Put the files that stock classes load into `folder`: weights, configuration and feature extractor. Call on all ranks.

    Raises `UserError`, on all of them, where they cannot be written; what `folder` held before is then still there.
    """
    weights = accelerator.get_state_dict(model)

    def save() -> None:
        with unfinished(Path(folder) / "model") as new:
            _write_model(new, accelerator.unwrap_model(model), weights, feature_extractor)
            for path in sorted(new.iterdir()):
                checksums.sync(path)
                os.replace(path, Path(folder) / path.name)
            new.rmdir()
            checksums.sync(Path(folder))

    if failure := on_main_process(accelerator, lambda: _attempt(save)):
        raise UserError(
            f"{folder}: the model could not be saved ({failure}): free space or mend the disk, and start the run again with "
            "--resume_from_checkpoint auto"
        )


def save_checkpoint(
    output_dir: Path,
    accelerator: Accelerator,
    model,
    optimizer,
    feature_extractor,
    state,
    keep: int,
    on_failure: str = "stop",
) -> Path | None:
    """Save `checkpoint-<step>` atomically and remove the oldest beyond `keep` (0: none). Call on all ranks.

    `state` has a `step` and an `as_dict()` that JSON can hold. A full or failing disk leaves all other checkpoints as they are, and the
    outcome is the same on all ranks: with `on_failure` "stop" a `UserError`, with "warn" None after a warning.
    """
    final = Path(output_dir) / f"checkpoint-{state.step}"
    weights = accelerator.get_state_dict(model)
    moments = _flatten(get_optimizer_state_dict(model, optimizer.optimizer, options=_gathered()))
    scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None

    def save() -> None:
        with unfinished(final) as folder:
            _write_model(folder, accelerator.unwrap_model(model), weights, feature_extractor)
            (folder / "training_state").mkdir()
            save_file(moments, folder / "training_state/optimizer.safetensors")
            open_to_others(folder)
            text = json.dumps(state.as_dict() | {"scaler": scaler, "has_checksums": True}, indent=2)
            (folder / "training_state/state.json").write_text(text, encoding="utf-8")
            checksums.seal(folder, CHECKSUMS)
            publish(folder, final)

    def save_and_rotate() -> str | None:
        if failure := _attempt(save):
            whole = checkpoints(output_dir)
            newest = f"the newest whole checkpoint is {whole[-1].name}" if whole else "there is no other checkpoint yet"
            return f"{final} could not be saved ({failure}); {newest}"
        if keep > 0:
            _rotate(output_dir, state.step, keep)
        return None

    failure = on_main_process(accelerator, save_and_rotate)
    if failure is None:
        return final
    if on_failure == "stop":
        raise UserError(f"{failure}: free space or mend the disk, and go on with --resume_from_checkpoint auto")
    if accelerator.is_main_process:
        logger.warning("%s; the run goes on, and the next save tries again", failure)
    return None


def _attempt(write: Callable[[], None]) -> str | None:
    """What kept a disk from taking what is written; None: nothing."""
    try:
        write()
    except (OSError, SafetensorError) as error:
        return one_line(error)
    return None


def _write_model(folder: Path, bare, weights: dict[str, torch.Tensor], feature_extractor) -> None:
    bare.save_pretrained(folder, state_dict=weights)
    bare.config.architectures = ["Wav2Vec2ForPreTraining"]
    bare.config.save_pretrained(folder)
    feature_extractor.save_pretrained(folder)
    open_to_others(folder)


def _rotate(output_dir: Path, step: int, keep: int) -> None:
    """Remove all but the newest `keep` up to this step; a run that went back to an older one leaves the newer ones alone.

    Damaged ones neither count nor go: at least the one just saved is whole, and stays.
    """
    upto = [folder for folder in checkpoints(output_dir) if step_of(folder) <= step]
    for old in upto[:-keep]:
        discard(old)


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
    groups = get_optimizer_state_dict(model, optimizer.optimizer)["param_groups"]
    set_optimizer_state_dict(
        model,
        optimizer.optimizer,
        {"state": state, "param_groups": groups},
        options=StateDictOptions(full_state_dict=True),
    )
    scaler = read_state(folder).get("scaler")
    if accelerator.scaler is not None and scaler:
        accelerator.scaler.load_state_dict(scaler)


def _gathered() -> StateDictOptions:
    return StateDictOptions(full_state_dict=True, cpu_offload=True)


def _flatten(optimizer_state: dict) -> dict[str, torch.Tensor]:
    return {
        f"{name}/{what}": torch.as_tensor(value).contiguous()
        for name, values in optimizer_state.get("state", {}).items()
        for what, value in values.items()
    }
