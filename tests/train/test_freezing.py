"""Frozen convs stay as they are, hold nothing of the optimizer and change no other gradient, however a run is launched."""

import pytest
import torch
from accelerate import Accelerator
from conftest import NOISY, assert_same_run, refusal, run_here, tiny_config, write_recipe
from ranks import Ranks
from safetensors.torch import load_file
from transformers import Wav2Vec2ForPreTraining
from two_ranks import FIVE, build_model, pieces, settings

import pretrain
from w2v2.train.update import accumulate

CONVS, FREEZE = "wav2vec2.feature_extractor.", "--freeze_feature_encoder"
MODEL, MOMENTS = "model.safetensors", "checkpoint-4/training_state/optimizer.safetensors"


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """Four updates from given weights, as a YAML file."""
    folder = tmp_path_factory.mktemp("recipe")
    Wav2Vec2ForPreTraining(tiny_config(**NOISY)).save_pretrained(folder / "weights")
    start = dict(config_name=None, model_name_or_path=str(folder / "weights"))
    values = dict(batch_hours=0.002, micro_batch_seconds=4.0, max_steps=4, save_steps=2, eval_steps=4)
    return write_recipe(folder, NOISY, **values, **start, dataloader_num_workers=0, report_to=["none"], use_cpu=True)


@pytest.fixture(scope="module")
def frozen(flags, tmp_path_factory):
    """A run of one process with frozen convs."""
    return finish(flags, tmp_path_factory.mktemp("runs") / "frozen", FREEZE)


@pytest.fixture(scope="module")
def free(flags, tmp_path_factory):
    return finish(flags, tmp_path_factory.mktemp("runs") / "free")


def finish(flags, output_dir, *more):
    assert run_here(pretrain.main, flags, "--output_dir", output_dir, *more) == 0
    return output_dir


def moved(folder, before):
    """The parameters that differ from `before`, the weights of another folder."""
    found, start = load_file(folder / MODEL), load_file(before / MODEL)
    assert found.keys() == start.keys()
    return {name for name, value in found.items() if not torch.equal(value, start[name])}


def counted(folder):
    """Parameter → updates that its moments have seen."""
    moments = load_file(folder / MOMENTS)
    return {name.removesuffix("/step"): int(value) for name, value in moments.items() if name.endswith("/step")}


def is_conv(name):
    return name.startswith(CONVS)


def test_frozen_convs_stay_and_all_else_moves(flags, frozen):
    start = flags.parent / "weights"
    parameters = {name for name, _ in Wav2Vec2ForPreTraining(tiny_config()).named_parameters()}
    others = {name for name in parameters if not is_conv(name)}
    assert len(others) < len(parameters)
    assert moved(frozen, start) == others
    assert counted(frozen) == dict.fromkeys(others, 4)
    assert {name.rpartition("/")[0] for name in load_file(frozen / MOMENTS)} == others


def test_two_processes_freeze_alike_sharded_or_not(flags, frozen, tmp_path):
    """None of them waits for a gradient that never comes."""
    for name, script in (("whole", ["pretrain.py"]), ("sharded", ["tests/sharded.py", "pretrain"])):
        with Ranks(tmp_path / f"{name}_logs", *script, flags, "--output_dir", tmp_path / name, FREEZE) as ranks:
            assert ranks.statuses() == [0, 0], ranks.said(0) + ranks.said(1)
        assert moved(tmp_path / name, flags.parent / "weights") == set(counted(frozen))
    assert_same_run(tmp_path / "sharded", tmp_path / "whole", exactly=False)


@pytest.mark.parametrize("recomputed", [(), ("encoder", "convs")], ids=["kept", "recomputed"])
@pytest.mark.parametrize("large", [False, True], ids=["BASE", "LARGE"])
def test_the_other_gradients_are_those_of_free_convs(large, recomputed):
    """With the feature penalty, which only the convs feel."""
    gradients = []
    for freezes in (False, True):
        model = build_model(**NOISY, large=large)
        model.recomputed = frozenset(recomputed)
        if freezes:
            model.freeze_feature_encoder()
        accumulate(Accelerator(cpu=True), model, pieces(model.config, FIVE), settings())
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    free, frozen = gradients
    assert {name for name, g in frozen.items() if g is None} == {name for name in free if is_conv(name)}
    assert all(torch.equal(g, free[name]) for name, g in frozen.items() if g is not None)
    assert all(g.any() for g in free.values())


def test_a_frozen_run_resumes_exactly(flags, frozen, tmp_path):
    resumed = finish(flags, tmp_path / "run", FREEZE, "--resume_from_checkpoint", frozen / "checkpoint-2")
    assert not moved(resumed, frozen) and counted(resumed) == counted(frozen)


def test_thawing_is_told_and_begins_new_moments(flags, frozen, tmp_path, capsys):
    thawed = finish(flags, tmp_path / "run", "--resume_from_checkpoint", frozen / "checkpoint-2")
    assert "freeze_feature_encoder False (was True)" in capsys.readouterr().out
    assert any(map(is_conv, moved(thawed, frozen / "checkpoint-2")))
    assert {is_conv(name): steps for name, steps in counted(thawed).items()} == {True: 2, False: 4}


def test_freezing_later_is_told_and_drops_moments(flags, free, tmp_path, capsys):
    later = finish(flags, tmp_path / "run", FREEZE, "--resume_from_checkpoint", free / "checkpoint-2")
    assert "freeze_feature_encoder True (was False)" in capsys.readouterr().out
    changed = moved(later, free / "checkpoint-2")
    assert changed and not any(map(is_conv, changed))
    assert set(counted(later).values()) == {4} and not any(map(is_conv, counted(later)))
    assert any(map(is_conv, moved(free, free / "checkpoint-2")))


def test_random_convs_are_not_frozen(flags, tmp_path, capsys):
    start = ("--model_name_or_path=", "--config_name", flags.parent / "model")
    words = (flags, "--output_dir", tmp_path / "run", FREEZE, *start)
    refusal(capsys, pretrain.main, *words, named=[FREEZE, "--model_name_or_path"])
