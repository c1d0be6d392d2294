"""Checkpoints: folders that `from_pretrained` accepts, with the training state beside the weights.

    checkpoint-<step>/config.json, model.safetensors, preprocessor_config.json      what users load
    checkpoint-<step>/training_state/optimizer.safetensors, state.json              what a run resumes from
    checkpoint-<step>/training_state/checksums.json                                 size and SHA-256 of each of these

A folder is written under another name, made durable and renamed: a kill leaves no half of one. Tensors are safetensors
and the rest is JSON: nothing a checkpoint holds is ever executed.
"""

import json
import logging
import os
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

from w2v2.errors import UserError, one_line
from w2v2.model.pretraining import FINETUNING_MASKS
from w2v2.train.durable import find_mismatch, match_modes, publish, remove, sync, unfinished, write_checksums
from w2v2.train.launch import on_main_process

logger = logging.getLogger(__name__)

OPTIMIZER, STATE = "training_state/optimizer.safetensors", "training_state/state.json"
CHECKSUMS = "training_state/checksums.json"
CONVS = "wav2vec2.feature_extractor."
FILES = ("config.json", "model.safetensors", OPTIMIZER, STATE)  # without one of these no run resumes


def save_checkpoint(output_dir: Path, run, keep: int, on_failure: str = "stop") -> Path | None:
    """Save `checkpoint-<step>` and remove the oldest beyond `keep` (0: none). Call on all ranks.

    `run` has `accelerator`, `model`, `optimizer`, `feature_extractor` and `state`. A full or failing disk leaves the
    other checkpoints as they are: `on_failure` "stop" raises a `UserError`, "warn" returns None after a warning.
    """
    accelerator, step = run.accelerator, run.state.step
    final = Path(output_dir) / f"checkpoint-{step}"

    # All ranks gather what may be sharded; the main process alone writes it.
    weights = accelerator.get_state_dict(run.model)
    gathered = StateDictOptions(full_state_dict=True, cpu_offload=True)
    optimizer = get_optimizer_state_dict(run.model, run.optimizer.optimizer, options=gathered)
    moments = {
        f"{name}/{moment}": torch.as_tensor(value).contiguous()
        for name, values in optimizer.get("state", {}).items()
        for moment, value in values.items()
    }
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
        # All but the newest whole ones up to this step go: after a return to an older one, the newer ones stay.
        for old in [folder for folder in checkpoints(output_dir) if step_of(folder) <= step][:-keep]:
            try:
                remove(old)
            except OSError as error:
                logger.warning(
                    "%s is no longer needed but cannot be removed (%s): remove it by hand", old, one_line(error)
                )
    return final


def save_model(folder: Path, accelerator: Accelerator, model, feature_extractor) -> None:
    """Put weights, configuration and feature extractor, as stock classes load them, into `folder`. Call on all ranks.

    Raises `UserError` on all ranks if they cannot be written; what `folder` held before is then still there.
    """
    weights, bare = accelerator.get_state_dict(model), accelerator.unwrap_model(model)
    on_main_process(accelerator, lambda: _replace_model(Path(folder), bare, weights, feature_extractor))


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
        advice = "free space or mend the disk, and start the run again with --resume_from_checkpoint auto"
        raise UserError(f"{folder}: the model could not be saved ({one_line(error)}): {advice}") from None


def _write_model(folder: Path, bare, weights: dict[str, torch.Tensor], feature_extractor) -> None:
    bare.save_pretrained(folder, state_dict=weights)
    path, changes = folder / "config.json", FINETUNING_MASKS | {"architectures": ["Wav2Vec2ForPreTraining"]}
    config = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    feature_extractor.save_pretrained(folder)


def checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoints in `output_dir` that are whole by their files' sizes, oldest first."""
    return [folder for folder in _numbered(output_dir) if find_damage(folder, contents=False) is None]


def find_checkpoint(output_dir: Path, resume_from: str | None) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` means: none, the newest whole one (`auto`), or that path.

    `auto` passes over damaged ones, with a warning each. Raises `UserError` for a damaged path, and where all are.
    """
    flag, newest = f"--resume_from_checkpoint {resume_from}", None
    if resume_from not in (None, "auto"):
        folder = Path(resume_from)
        if not folder.is_dir():
            raise UserError(f"{flag}: no such folder; give a checkpoint-<step> folder or `auto`")
        read_state(folder)
        if damage := find_damage(folder):
            raise UserError(f"{flag}: {damage}; give another checkpoint, or `auto` for the newest whole one")
        return folder
    for folder in reversed(_numbered(output_dir)) if resume_from else ():
        if (damage := find_damage(folder)) is None:
            return folder
        logger.warning("%s is damaged, so the one before it is tried: %s", folder, damage)
        newest = newest or f"{folder.name}, whose {damage}"
    if newest:
        advice = "mend that, or start anew with --overwrite_output_dir"
        raise UserError(f"{flag}: no checkpoint in {output_dir} is whole; the newest is {newest}; {advice}")
    return None


def find_damage(folder: Path, contents: bool = True) -> str | None:
    """What keeps a checkpoint from being resumed from, naming the file; None: it is whole.

    Without `contents` only sizes are compared. The first versions saved no checksums.
    """
    if missing := [name for name in FILES if not (folder / name).is_file()]:
        return f"{missing[0]} is missing"
    if (folder / CHECKSUMS).is_file():
        return find_mismatch(folder, CHECKSUMS, FILES, contents)
    return f"{CHECKSUMS} is missing" if b"has_checksums" in (folder / STATE).read_bytes() else None


def _numbered(output_dir: Path) -> list[Path]:
    """All folders named `checkpoint-<step>`, by step."""
    folders = Path(output_dir).glob("checkpoint-*")
    return sorted((f for f in folders if re.fullmatch(r"checkpoint-\d+", f.name) and f.is_dir()), key=step_of)


def step_of(folder: Path) -> int:
    """The number in `checkpoint-<step>`."""
    return int(folder.name.rpartition("-")[2])


def read_state(folder: Path) -> dict[str, Any]:
    """`training_state/state.json` of a checkpoint. Raises `UserError` if it holds none."""
    try:
        return json.loads((Path(folder) / STATE).read_bytes())
    except (OSError, ValueError):
        problem = "holds no training state (state.json is missing or torn): resume from a checkpoint-<step> folder"
        raise UserError(f"{folder} {problem}, or start from its weights alone with --model_name_or_path") from None


def load_optimizer(folder: Path, accelerator: Accelerator, model, optimizer) -> None:
    """Restore the optimizer's and the loss scaler's state; the hyperparameters are the run's own.

    Convs that are frozen now leave their moments behind. Those that were frozen begin with moments of zero.
    """
    path = Path(folder) / OPTIMIZER
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        advice = "resume from another checkpoint, or start from the weights alone with --model_name_or_path"
        raise UserError(f"{path} is missing or torn ({error}): {advice}") from None
    state: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        name, _, moment = key.rpartition("/")
        state[name][moment] = tensor
    for name, parameter in accelerator.unwrap_model(model).named_parameters():
        if name.startswith(CONVS) and parameter.requires_grad and name not in state:  # frozen until now
            moments = {moment: torch.zeros(parameter.shape) for moment in ("exp_avg", "exp_avg_sq")}
            state[name] = moments | {"step": torch.tensor(0.0)}
    groups = get_optimizer_state_dict(model, optimizer.optimizer)["param_groups"]
    options = StateDictOptions(full_state_dict=True)
    set_optimizer_state_dict(
        model, optimizer.optimizer, {"state": dict(state), "param_groups": groups}, options=options
    )
    scaler = read_state(folder).get("scaler")
    if accelerator.scaler is not None and scaler:
        accelerator.scaler.load_state_dict(scaler)
