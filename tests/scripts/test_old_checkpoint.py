"""A checkpoint that an earlier version wrote (commit 54c1115) resumes: its next updates hear the same, with other noise."""

import shutil
from pathlib import Path

import pytest
from conftest import NO_DROPOUT, run_here, write_recipe

import pretrain
from w2v2.train.log import read_metrics

SPEED = {"audio_seconds_per_second", "data_wait_fraction", "padded_fraction"}
LOSSES = {"loss": 0.05, "contrastive_loss": 0.05, "grad_norm": 0.15, "feature_penalty": 0.01, "eval_loss": 0.01}
NOISY = "accuracy diversity_loss codebook_perplexity codebook_perplexity_hard code_entropy distractors_left".split()
NOISY += [f"eval_{name}" for name in (*NOISY, "contrastive_loss", "feature_penalty")]
OLD = Path(__file__).parents[1] / "fixtures" / "checkpoint_of_54c1115"


def test_an_old_checkpoint_hears_the_same_next_updates(tmp_path, capsys):
    output_dir = tmp_path / "output"
    values = dict(output_dir=str(output_dir), data_root=str(tmp_path), batch_hours=0.004, micro_batch_seconds=8.0)
    values |= dict(crop_seconds=2.0, mask_time_length=5, max_steps=8, eval_steps=4)
    values |= dict(report_to=["none"], dataloader_num_workers=0)
    config = write_recipe(tmp_path, dict.fromkeys(NO_DROPOUT, 0.1) | {"layerdrop": 0.2}, **values)
    shutil.copytree(OLD, output_dir)
    assert run_here(pretrain.main, config, "--resume_from_checkpoint", "auto") == 0
    assert "warning       the checkpoint's run cut the same effective batches in another way" in capsys.readouterr().out
    found, expected = read_metrics(output_dir / "metrics.jsonl"), read_metrics(OLD / "metrics.jsonl")
    assert [(r["step"], "eval_loss" in r) for r in found] == [(r["step"], "eval_loss" in r) for r in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() >= theirs.keys()
        for name in theirs.keys() - SPEED - set(NOISY):
            assert ours[name] == pytest.approx(theirs[name], rel=LOSSES.get(name, 1e-5)), (theirs["step"], name)
