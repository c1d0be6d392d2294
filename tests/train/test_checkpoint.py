"""Checkpoints: stock folders, whole or absent, restored to the bit, and never executed."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_batch
from safetensors.torch import load_file
from tiny_run import Run, names
from transformers import (
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2ForPreTraining,
    Wav2Vec2ForSequenceClassification,
    Wav2Vec2Model,
)

from w2v2.errors import UserError
from w2v2.hub import push
from w2v2.model.pretraining import PretrainingModel
from w2v2.train import checksums, folder_swap
from w2v2.train.checkpoint import load_optimizer
from w2v2.train.resuming import CHECKSUMS, checkpoints, claim_output_dir, find_checkpoint, read_state

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
def test_a_checkpoint_loads_in_stock_classes_with_nothing_missing_or_left_over(run, tmp_path, stock, head):
    folder = run.save(tmp_path, 2)
    model, report = stock.from_pretrained(folder, output_loading_info=True)
    unused = PRETRAINING_HEADS if stock is not Wav2Vec2ForPreTraining else ()
    assert all(key.startswith(unused) for key in report["unexpected_keys"]) and bool(report["unexpected_keys"]) == bool(
        unused
    )
    assert all(key.startswith(head) for key in report["missing_keys"]) and bool(report["missing_keys"]) == bool(head)
    assert not report["mismatched_keys"]
    ours = dict(run.model.named_parameters())
    shared = {name: p for name, p in model.named_parameters() if not name.startswith(head or "no head")}
    assert len(shared) > 30
    for name, parameter in shared.items():
        assert torch.equal(parameter, ours[name if name in ours else f"wav2vec2.{name}"]), name


def test_a_checkpoint_names_the_stock_architecture_and_brings_its_feature_extractor(run, tmp_path):
    folder = run.save(tmp_path, 2)
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["Wav2Vec2ForPreTraining"]
    assert Wav2Vec2FeatureExtractor.from_pretrained(folder).do_normalize is True
    assert names(folder) == ["config.json", "model.safetensors", "preprocessor_config.json", "training_state"]


def test_only_what_stock_classes_load_is_published(run, tmp_path):
    staged = push._stage(run.save(tmp_path, 2), tmp_path)
    assert names(staged) == ["config.json", "model.safetensors", "preprocessor_config.json"]


def test_a_loaded_checkpoint_gives_the_stock_loss_of_the_model_saved(run, tmp_path):
    stock = Wav2Vec2ForPreTraining.from_pretrained(run.save(tmp_path, 2)).eval()
    batch = make_batch(run.model.config, [9_000])
    run.model.eval()
    with torch.no_grad():
        ours = run.model.wav2vec2(batch.waveforms).last_hidden_state
        torch.testing.assert_close(ours, stock.wav2vec2(batch.waveforms).last_hidden_state, rtol=0, atol=0)


def test_optimizer_and_weights_come_back_to_the_bit_and_go_on_alike(run, tmp_path):
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


@pytest.mark.parametrize("broken", ["save_model", "save_file", "checksums.seal", "os.replace"])
def test_a_save_that_is_cut_short_leaves_no_checkpoint(run, tmp_path, monkeypatch, broken):
    whole = run.save(tmp_path, 2)

    def killed(*arguments, **keywords):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if broken == "save_model":  # between the weights and the configuration
            patch.setattr(type(run.model.config), "save_pretrained", killed)
        else:
            patch.setattr(f"w2v2.train.checkpoint.{broken}", killed)
        with pytest.raises(KeyboardInterrupt):
            run.save(tmp_path, 4)
    assert names(tmp_path) == [".unfinished-checkpoint-4", "checkpoint-2"]
    assert find_checkpoint(tmp_path, "auto") == whole

    claim_output_dir(tmp_path, False, "auto")
    assert names(tmp_path) == ["checkpoint-2"]
    assert find_checkpoint(tmp_path, "auto") != run.save(tmp_path, 4)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4"]


def test_a_checkpoint_being_removed_is_never_taken_for_whole(run, tmp_path, monkeypatch):
    folder = run.save(tmp_path, 2)
    rmtree = shutil.rmtree

    def killed(path, ignore_errors=False):
        if Path(path).exists():
            (Path(path) / "model.safetensors").unlink()
            raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        folder_swap.remove(folder)
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    assert checkpoints(tmp_path) == [] and not list(tmp_path.glob("checkpoint-*"))
    claim_output_dir(tmp_path, False, None)
    assert names(tmp_path) == []


def test_rotation_keeps_the_newest_by_number(run, tmp_path):
    for step in (8, 9, 10, 100):
        run.save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-100"]
    run.save(tmp_path, 101, keep=0)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-100", "checkpoint-101"]


def test_rotation_never_removes_what_was_just_saved(run, tmp_path):
    """As when a run goes back to an older checkpoint and newer ones are still there."""
    for step in (2, 100, 102):
        run.save(tmp_path, step)
    folder = run.save(tmp_path, 4, keep=2)
    assert folder.is_dir()


def test_a_repeated_step_replaces_its_checkpoint(run, tmp_path):
    run.save(tmp_path, 2)
    run.update(9)
    folder = run.save(tmp_path, 2)
    saved = load_file(folder / "model.safetensors")
    assert torch.equal(saved["project_q.bias"], dict(run.model.named_parameters())["project_q.bias"])
    assert names(tmp_path) == ["checkpoint-2"]


@pytest.mark.parametrize("lost", ["model.safetensors", "config.json", "training_state/state.json"])
def test_auto_takes_the_newest_whole_checkpoint(run, tmp_path, lost):
    expected = run.save(tmp_path, 9)
    (run.save(tmp_path, 10) / lost).unlink()
    (tmp_path / "checkpoint-best").mkdir()
    assert find_checkpoint(tmp_path, "auto") == expected


def test_without_a_checkpoint_auto_starts_afresh(tmp_path):
    assert find_checkpoint(tmp_path / "absent", "auto") is None
    assert find_checkpoint(tmp_path, None) is None


@pytest.mark.parametrize("torn", ["absent", "state", "optimizer", "no optimizer"])
def test_a_named_checkpoint_that_is_not_whole_is_refused_in_one_line(run, tmp_path, torn):
    folder = run.save(tmp_path, 2)
    state, optimizer = folder / "training_state/state.json", folder / "training_state/optimizer.safetensors"
    if torn == "absent":
        shutil.rmtree(folder)
    elif torn == "state":
        state.write_text(state.read_text()[:20])
    elif torn == "optimizer":
        optimizer.write_bytes(optimizer.read_bytes()[:100])
    else:
        optimizer.unlink()
    with pytest.raises(UserError, match="checkpoint-2") as error:
        load_optimizer(find_checkpoint(tmp_path, str(folder)), run.accelerator, run.model, run.optimizer)
    assert "\n" not in str(error.value)


def test_nothing_in_a_checkpoint_is_executed(run, tmp_path):
    folder = run.save(tmp_path / "run", 2)
    witness = tmp_path / "executed"

    class Planted:
        def __reduce__(self):
            return Path.touch, (witness,)

    bomb = pickle.dumps(Planted())
    for name in (
        "optimizer.bin",
        "optimizer.pt",
        "random_states_0.pkl",
        "scheduler.bin",
        "state.json.pkl",
        "scaler.pt",
    ):
        (folder / "training_state" / name).write_bytes(bomb)
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (folder / name).write_bytes(bomb)
    other = Run(seed=7, updates=0)
    PretrainingModel.from_pretrained(folder, use_safetensors=True)
    load_optimizer(find_checkpoint(tmp_path / "run", "auto"), other.accelerator, other.model, other.optimizer)
    assert read_state(folder)["step"] == 2
    assert not witness.exists()

    (folder / "training_state/optimizer.safetensors").write_bytes(bomb)
    checksums.seal(folder, CHECKSUMS)  # whoever plants one can make its checksum
    with pytest.raises(UserError, match="optimizer"):
        load_optimizer(find_checkpoint(tmp_path / "run", "auto"), other.accelerator, other.model, other.optimizer)
    (folder / CHECKSUMS).write_bytes(bomb)
    with pytest.raises(UserError, match="checksums.json is damaged"):
        find_checkpoint(tmp_path / "run", str(folder))
    assert not witness.exists()
    pickle.loads(bomb)
    assert witness.exists()  # the bomb was live


def test_a_run_is_overwritten_only_when_asked(run, tmp_path):
    mine, other = tmp_path / "mine", tmp_path / "other"
    checkpoint_of_other = run.save(other, 2)
    run.save(mine, 4)
    (mine / "metrics.jsonl").write_text("{}\n")
    before = {path: path.stat().st_mtime_ns for path in mine.rglob("*")}
    for resume_from in (None, str(checkpoint_of_other)):
        with pytest.raises(UserError, match="already holds a run.*--overwrite_output_dir"):
            claim_output_dir(mine, False, resume_from)
    for resume_from in ("auto", str(mine / "checkpoint-4")):
        claim_output_dir(mine, False, resume_from)
    claim_output_dir(mine, True, str(mine / "checkpoint-4"))
    assert {path: path.stat().st_mtime_ns for path in mine.rglob("*")} == before
    claim_output_dir(mine, True, None)
    assert names(mine) == []
    run.save(mine, 4)
    claim_output_dir(mine, True, "auto")  # `auto` may stand in a YAML file: whoever asks for both starts anew
    assert names(mine) == []


def test_a_run_does_not_go_back_behind_a_newer_checkpoint_in_its_folder(run, tmp_path):
    older = run.save(tmp_path, 2)
    run.save(tmp_path, 4)
    with pytest.raises(UserError, match="checkpoint-4 is newer"):
        claim_output_dir(tmp_path, False, str(older))
    claim_output_dir(tmp_path / "elsewhere", False, str(older))


def test_a_dry_run_claims_nothing(run, tmp_path):
    run.save(tmp_path, 2)
    claim_output_dir(tmp_path, True, None, dry_run=True)
    claim_output_dir(tmp_path / "absent", False, None, dry_run=True)
    assert names(tmp_path) == ["checkpoint-2"]
