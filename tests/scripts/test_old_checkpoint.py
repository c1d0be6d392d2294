"""A checkpoint that an earlier version wrote (commit 54c1115) resumes, and the next updates are those of that version."""

import shutil
from pathlib import Path

import pytest
from conftest import NO_DROPOUT, run_here, write_recipe

import pretrain
from w2v2.train.log import read_metrics

OLD = Path(__file__).parents[1] / "fixtures" / "checkpoint_of_54c1115"


def test_an_old_checkpoint_has_the_same_next_updates(tmp_path):
    output_dir = tmp_path / "output"
    values = dict(output_dir=str(output_dir), data_root=str(tmp_path), batch_hours=0.004, micro_batch_seconds=8.0)
    values |= dict(crop_seconds=2.0, mask_time_length=5, max_steps=8, eval_steps=4)
    values |= dict(report_to=["none"], dataloader_num_workers=0)
    config = write_recipe(tmp_path, dict.fromkeys(NO_DROPOUT, 0.1) | {"layerdrop": 0.2}, **values)
    shutil.copytree(OLD, output_dir)
    assert run_here(pretrain.main, config, "--resume_from_checkpoint", "auto") == 0
    found, expected = read_metrics(output_dir / "metrics.jsonl"), read_metrics(OLD / "metrics.jsonl")
    assert [(r["step"], "eval_loss" in r) for r in found] == [(r["step"], "eval_loss" in r) for r in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() >= theirs.keys()
        for name in theirs.keys() - {"audio_seconds_per_second", "data_wait_fraction"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), (theirs["step"], name)
