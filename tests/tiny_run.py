"""A tiny model that is saved, and what befalls its files: what the tests of checkpoints share."""

import builtins
import contextlib
import io
import os
import resource
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate import Accelerator
from conftest import make_batch, tiny_config
from safetensors.torch import load_file, save_file
from transformers import Wav2Vec2FeatureExtractor

from w2v2.model.pretraining import PretrainingModel
from w2v2.train.checkpoint import save_checkpoint
from w2v2.train.run_folder import HOLDER_FILE, LOCK_FILE, prepare_run_folder

MODEL, OPTIMIZER = "model.safetensors", "training_state/optimizer.safetensors"
STATE, CHECKSUMS = "training_state/state.json", "training_state/checksums.json"


@dataclass
class State:
    step: int

    def as_dict(self):
        return {"step": self.step, "epoch": 1}


class Run:
    """A tiny model with an AdamW that has moments."""

    def __init__(self, seed=0, updates=2):
        torch.manual_seed(seed)
        self.accelerator = Accelerator(cpu=True)
        self.feature_extractor = Wav2Vec2FeatureExtractor(do_normalize=True)
        model = PretrainingModel(tiny_config()).train()
        groups = [{"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.01}]
        groups += [{"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0}]
        self.model, self.optimizer = self.accelerator.prepare(model, torch.optim.AdamW(groups, lr=1e-3, fused=True))
        for update in range(updates):
            self.update(update)

    def update(self, seed):
        torch.manual_seed(seed)
        self.optimizer.zero_grad()
        config = self.accelerator.unwrap_model(self.model).config
        self.model(make_batch(config, [9_000], seed=seed)).loss.backward()
        self.optimizer.step()

    def save(self, folder, step, keep=0, on_failure="stop"):
        self.state = State(step)
        return save_checkpoint(folder, self, keep, on_failure)

    def moments(self):
        states = self.optimizer.optimizer.state_dict()["state"]
        return {(i, name): value.clone() for i, state in states.items() for name, value in state.items()}


def names(folder):
    """What lies in a run's folder, beside the files that say who is at work there."""
    return sorted({path.name for path in folder.iterdir()} - {LOCK_FILE, HOLDER_FILE})


def prepare(folder, resume=None, overwrite=False, **flags):
    """What `prepare_run_folder` makes of these flags."""
    values = dict(dry_run=False, model_name_or_path=None, config_name=None) | flags
    values |= dict(
        output_dir=str(folder), resume_from_checkpoint=resume and str(resume), overwrite_output_dir=overwrite
    )
    return prepare_run_folder(SimpleNamespace(**values), Accelerator(cpu=True))


def tensors(checkpoint):
    """Weights and moments, read from the files; copied, so that no file stays mapped."""
    found = load_file(checkpoint / MODEL) | load_file(checkpoint / OPTIMIZER)
    return {name: value.clone() for name, value in found.items()}


def same(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def contents(folder):
    """Relative path → bytes, of every file but those that say who is at work there."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name not in (LOCK_FILE, HOLDER_FILE)]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def flip(path: Path, bit: int):
    """Flip one bit, counted from the file's beginning."""
    damaged = bytearray(path.read_bytes())
    damaged[bit // 8] ^= 1 << bit % 8
    path.write_bytes(damaged)


@contextlib.contextmanager
def file_size_limit(num_bytes):
    """No file of this process grows beyond so many bytes: a write then fails as on a full disk, with another number."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Tap:
    """Stands before every call by which a save changes the disk: the one numbered `at` first meets `mishap(name, tap)`.

    `made` are the calls' names, `synced` the files and folders (by inode) that were made durable.
    """

    def __init__(self, patch, at, mishap):
        self.made, self.synced, self._at, self._mishap = [], set(), at, mishap
        for name in ("replace", "mkdir", "rmdir", "unlink", "fsync"):
            patch.setattr(os, name, self._before(name, getattr(os, name)))
        for writer in ("w2v2.train.checkpoint.save_file", "transformers.modeling_utils.safe_save_file"):
            patch.setattr(writer, self._before("save_file", save_file))
        for module in (io, builtins):
            patch.setattr(module, "open", self._before("open", open))

    def _before(self, name, call):
        def made(*arguments, **keywords):
            if name != "open" or "w" in (keywords.get("mode") or "".join(arguments[1:2])):
                self.made.append(name)
                if len(self.made) == self._at + 1:
                    self._mishap(name, self)
            result = call(*arguments, **keywords)
            if name == "fsync":
                self.synced.add(os.fstat(arguments[0]).st_ino)
            return result

        return made
