"""Checkpoints: folders that `from_pretrained` accepts, with the training state beside the weights.

    checkpoint-<step>/config.json, model.safetensors, preprocessor_config.json      what users load
    checkpoint-<step>/training_state/optimizer.safetensors, state.json              what a run resumes from
    checkpoint-<step>/training_state/checksums.json                                 size and SHA-256 of each of these

A folder is written under another name, made durable and renamed: a kill leaves no half of one. Tensors are safetensors and
the rest is JSON: nothing a checkpoint holds is ever executed. No state of a random generator is saved, because a run has none.
"""

import json
import logging
import os
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
from w2v2.train.durable import match_modes, publish, remove, sync, unfinished, write_checksums
from w2v2.train.launch import on_main_process
from w2v2.train.resume import CHECKSUMS, OPTIMIZER, STATE, checkpoints, read_state, step_of

logger = logging.getLogger(__name__)


def save_checkpoint(output_dir: Path, run, keep: int, on_failure: str = "stop") -> Path | None:
    """Save `checkpoint-<step>` and remove the oldest beyond `keep` (0: none). Call on all ranks.

    A full or failing disk leaves all other checkpoints as they are, and the outcome is the same on all ranks.

    Args:
        run: has `accelerator`, `model`, `optimizer`, `feature_extractor`, and a `state` with `step` and `as_dict()`.
        on_failure: "stop" raises a `UserError`, "warn" returns None after a warning.
    """
    accelerator, step = run.accelerator, run.state.step
    final = Path(output_dir) / f"checkpoint-{step}"

    # All ranks gather what may be sharded; the main process alone writes it.
    weights = accelerator.get_state_dict(run.model)
    gathered = StateDictOptions(full_state_dict=True, cpu_offload=True)
    moments = _flatten(get_optimizer_state_dict(run.model, run.optimizer.optimizer, options=gathered))
    try:
        on_main_process(accelerator, lambda: _write_checkpoint(final, run, weights, moments))
    except UserError as failure:
        others = checkpoints(output_dir)
        newest = f"the newest whole checkpoint is {others[-1].name}" if others else "there is no other checkpoint yet"
        if on_failure == "stop":
            advice = "free space or mend the disk, and go on with --resume_from_checkpoint auto"
            raise UserError(f"{failure}; {newest}: {advice}") from None
        if accelerator.is_main_process:
            logger.warning("%s; %s; the run goes on, and the next save tries again", failure, newest)
        return None
    if keep and accelerator.is_main_process:
        _rotate(output_dir, step, keep)
    return final


def save_model(folder: Path, accelerator: Accelerator, model, feature_extractor) -> None:
    """Put weights, configuration and feature extractor, as stock classes load them, into `folder`. Call on all ranks.

    Raises `UserError` on all ranks if they cannot be written; what `folder` held before is then still there.
    """
    weights, bare = accelerator.get_state_dict(model), accelerator.unwrap_model(model)
    try:
        on_main_process(accelerator, lambda: _replace_model(Path(folder), bare, weights, feature_extractor))
    except UserError as failure:
        advice = "free space or mend the disk, and start the run again with --resume_from_checkpoint auto"
        raise UserError(f"{failure}: {advice}") from None


def _write_checkpoint(final: Path, run, weights: dict[str, torch.Tensor], moments: dict[str, torch.Tensor]) -> None:
    scaler = run.accelerator.scaler.state_dict() if run.accelerator.scaler is not None else None
    state = run.state.as_dict() | {"scaler": scaler, "has_checksums": True}
    try:
        with unfinished(final) as folder:
            _write_model(folder, run.accelerator.unwrap_model(run.model), weights, run.feature_extractor)
            (folder / "training_state").mkdir()
            save_file(moments, folder / OPTIMIZER)
            (folder / STATE).write_text(json.dumps(state, indent=2), encoding="utf-8")
            match_modes(folder)
            write_checksums(folder, CHECKSUMS)
            publish(folder, final)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{final} could not be saved ({one_line(error)})") from None


def _replace_model(folder: Path, bare, weights: dict[str, torch.Tensor], feature_extractor) -> None:
    try:
        with unfinished(folder / "model") as new:
            _write_model(new, bare, weights, feature_extractor)
            match_modes(new)
            for path in sorted(new.iterdir()):
                sync(path)
                os.replace(path, folder / path.name)
            new.rmdir()
            sync(folder)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: the model could not be saved ({one_line(error)})") from None


def _write_model(folder: Path, bare, weights: dict[str, torch.Tensor], feature_extractor) -> None:
    bare.save_pretrained(folder, state_dict=weights)
    bare.config.architectures = ["Wav2Vec2ForPreTraining"]
    bare.config.save_pretrained(folder)
    feature_extractor.save_pretrained(folder)


def _flatten(optimizer_state: dict) -> dict[str, torch.Tensor]:
    """AdamW's moments under `<parameter>/<moment>`."""
    return {
        f"{name}/{moment}": torch.as_tensor(value).contiguous()
        for name, values in optimizer_state.get("state", {}).items()
        for moment, value in values.items()
    }


def _rotate(output_dir: Path, step: int, keep: int) -> None:
    """Remove all but the newest `keep` up to `step`; a run that went back to an older one leaves the newer ones alone.

    Damaged ones neither count nor go. The one just saved is whole, and stays.
    """
    upto = [folder for folder in checkpoints(output_dir) if step_of(folder) <= step]
    for old in upto[:-keep]:
        try:
            remove(old)
        except OSError as error:
            logger.warning("%s is not needed any more but cannot be removed: %s", old, one_line(error))


def load_optimizer(folder: Path, accelerator: Accelerator, model, optimizer) -> None:
    """Restore the optimizer's and the loss scaler's state; the hyperparameters are the run's own.

    Raises `UserError` if the file cannot be loaded.
    """
    path = Path(folder) / OPTIMIZER
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} is missing or torn ({error}): resume from another checkpoint, or start from the weights alone with "
            "--model_name_or_path"
        ) from None
    state: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, moment = key.rpartition("/")
        state.setdefault(name, {})[moment] = tensor
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
