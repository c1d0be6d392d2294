"""Checkpoints: stock folders, restored to the bit, rotated by number, and never executed."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from tiny_run import Run, names
from transformers import (
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2ForPreTraining,
    Wav2Vec2ForSequenceClassification,
    Wav2Vec2Model,
)

from w2v2.errors import UserError
from w2v2.model.pretraining import PretrainingModel
from w2v2.train.checkpoint import CHECKSUMS, find_checkpoint, load_optimizer, read_state
from w2v2.train.durable import write_checksums

PRETRAINING_HEADS = ("quantizer.", "project_hid.", "project_q.")


@pytest.fixture
def run():
    return Run()


@pytest.mark.parametrize(
    ("stock", "head"),
    [
        (Wav2Vec2ForPreTraining, ()),
        (Wav2Vec2Model, ()),
        (Wav2Vec2ForCTC, ("lm_head.",)),
        (Wav2Vec2ForSequenceClassification, ("projector.", "classifier.")),
    ],
)
def test_stock_classes_load_a_checkpoint_whole(run, tmp_path, stock, head):
    folder = run.save(tmp_path, 2)
    model, report = stock.from_pretrained(folder, output_loading_info=True)
    unused = PRETRAINING_HEADS if stock is not Wav2Vec2ForPreTraining else ()
    assert all(key.startswith(unused) for key in report["unexpected_keys"])
    assert all(key.startswith(head) for key in report["missing_keys"])
    assert bool(report["unexpected_keys"]) == bool(unused) and bool(report["missing_keys"]) == bool(head)
    assert not report["mismatched_keys"]
    ours = dict(run.model.named_parameters())
    shared = {name: p for name, p in model.named_parameters() if not name.startswith(head or "no head")}
    assert len(shared) > 30
    for name, parameter in shared.items():
        assert torch.equal(parameter, ours[name if name in ours else f"wav2vec2.{name}"]), name


def test_a_checkpoint_has_the_stock_files_that_others_may_read(run, tmp_path):
    folder = run.save(tmp_path, 2)
    saved = json.loads((folder / "config.json").read_text())
    assert saved["architectures"] == ["Wav2Vec2ForPreTraining"] and run.model.config.mask_time_prob == 0.65
    masks = dict(apply_spec_augment=True, mask_time_prob=0.05, mask_time_length=10, mask_feature_prob=0.0)
    assert {name: saved[name] for name in masks} == masks  # as published BASE; pretraining's own are flags
    assert Wav2Vec2FeatureExtractor.from_pretrained(folder).do_normalize is True
    assert names(folder) == ["config.json", "model.safetensors", "preprocessor_config.json", "training_state"]
    assert len({path.stat().st_mode for path in folder.rglob("*.*")}) == 1


def test_optimizer_and_weights_come_back_to_the_bit(run, tmp_path):
    folder = run.save(tmp_path, 2)
    other = Run(seed=7, updates=0)
    other.model.load_state_dict(PretrainingModel.from_pretrained(folder).state_dict())
    load_optimizer(folder, other.accelerator, other.model, other.optimizer)
    expected, found = run.moments(), other.moments()
    assert expected.keys() == found.keys() and len(expected) > 100
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert [g["weight_decay"] for g in other.optimizer.param_groups] == [0.01, 0.0]
    run.update(5), other.update(5)
    assert all(torch.equal(a, b) for a, b in zip(run.model.parameters(), other.model.parameters(), strict=True))


def test_rotation_keeps_the_newest_by_number(run, tmp_path):
    for step in (8, 9, 10, 100):
        run.save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-100"]
    run.save(tmp_path, 101, keep=0)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-100", "checkpoint-101"]
    assert run.save(tmp_path, 4, keep=1).is_dir()  # a run that went back: what was just saved stays


def test_auto_without_a_checkpoint_starts_afresh(tmp_path):
    (tmp_path / "checkpoint-best").mkdir()
    for folder in (tmp_path, tmp_path / "absent"):
        assert find_checkpoint(folder, "auto") is None
    assert find_checkpoint(tmp_path, None) is None
    with pytest.raises(UserError, match="no such folder"):
        find_checkpoint(tmp_path, str(tmp_path / "checkpoint-2"))


def test_nothing_in_a_checkpoint_is_executed(run, tmp_path):
    folder = run.save(tmp_path / "run", 2)
    witness = tmp_path / "executed"

    class Planted:
        def __reduce__(self):
            return Path.touch, (witness,)

    bomb = pickle.dumps(Planted())
    for name in ("optimizer.bin", "optimizer.pt", "random_states_0.pkl", "scheduler.bin", "scaler.pt"):
        (folder / "training_state" / name).write_bytes(bomb)
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (folder / name).write_bytes(bomb)
    other = Run(seed=7, updates=0)
    PretrainingModel.from_pretrained(folder, use_safetensors=True)
    load_optimizer(find_checkpoint(tmp_path / "run", "auto"), other.accelerator, other.model, other.optimizer)
    assert read_state(folder)["step"] == 2
    assert not witness.exists()

    (folder / "training_state/optimizer.safetensors").write_bytes(bomb)
    write_checksums(folder, CHECKSUMS)  # whoever plants one can make its checksum
    with pytest.raises(UserError, match="optimizer"):
        load_optimizer(find_checkpoint(tmp_path / "run", "auto"), other.accelerator, other.model, other.optimizer)
    (folder / CHECKSUMS).write_bytes(bomb)
    with pytest.raises(UserError, match="checksums.json is damaged"):
        find_checkpoint(tmp_path / "run", str(folder))
    assert not witness.exists()
    pickle.loads(bomb)
    assert witness.exists()  # the bomb was live
