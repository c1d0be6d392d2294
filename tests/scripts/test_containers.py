"""pretrain.py on tars and on Lhotse's cuts: the run that manifests of the same audio give, resumed, on two processes."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import webdataset
import yaml
from conftest import NOISY, ONE_UPDATE, assert_same_run, refusal, run_here, write_recipe
from lhotse import CutSet, Recording
from ranks import run_ranks

import pretrain

STEPS, SHARD = 6, 8  # updates, utterances of a tar


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """The folder of a run by manifests, and the flags of runs by tars and by cuts."""
    folder = tmp_path_factory.mktemp("containers")
    # An update has two micro-batches, on one process as on two: then noise is the same too.
    own = dict(batch_hours=0.002, micro_batch_seconds=6.8, max_steps=STEPS, eval_steps=3, dataloader_num_workers=0)
    config = write_recipe(folder, NOISY, **own, report_to=["none"], use_cpu=True)
    flags = yaml.safe_load(config.read_text())
    tars, cuts = {}, {}
    for split in ("train_data", "validation_data"):
        paths = [Path(path) for path in pd.read_csv(flags[split][0])["audio"]]
        with webdataset.ShardWriter(str(folder / f"{split}-%03d.tar"), maxcount=SHARD, verbose=0) as out:
            for path in paths:
                out.write({"__key__": path.stem, "wav": path.read_bytes()})
        tars[split] = [f"{folder}/{split}-*.tar"]
        cuts[split] = [f"{folder}/{split}.jsonl.gz"]
        CutSet.from_cuts(Recording.from_file(path).to_cut() for path in paths).to_file(cuts[split][0])
    for name, data in (("tars", tars), ("cuts", cuts)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(flags | data))
    assert run_here(pretrain.main, config, "--output_dir", folder / "by_manifest") == 0
    return folder


@pytest.mark.parametrize("form", ["tars", "cuts"])
def test_resumed_three_times_in_an_epoch_it_is_their_files_run(recipe, tmp_path, form):
    """Each time without what was kept of the containers, with or without a worker."""
    flags = ["--output_dir", tmp_path / "run", "--resume_from_checkpoint", "auto"]
    for step in range(1, 4):
        more = ["--dataloader_num_workers", step % 2, "--max_hours", ONE_UPDATE]
        assert run_here(pretrain.main, recipe / f"{form}.yaml", *flags, *more) == 75
        state = json.loads((tmp_path / f"run/checkpoint-{step}/training_state/state.json").read_text())
        assert state["epoch"] == 0 < state["position"]
        shutil.rmtree(tmp_path / "run/cache")
    assert run_here(pretrain.main, recipe / f"{form}.yaml", *flags) == 0
    assert_same_run(tmp_path / "run", recipe / "by_manifest")


def test_two_processes_share_the_tars(recipe):
    run_ranks(recipe / "logs", "pretrain.py", recipe / "tars.yaml", "--output_dir", recipe / "two")
    assert_same_run(recipe / "two", recipe / "by_manifest", exactly=False)


def test_a_shard_that_is_no_tar_is_named(recipe, tmp_path, capsys):
    shutil.copy(recipe / "train_data-000.tar", tmp_path / "a-0.tar")
    (tmp_path / "a-1.tar").write_text("not found")
    flags = ["--output_dir", tmp_path / "run", "--train_data", f"{tmp_path}/a-*.tar"]
    refusal(capsys, pretrain.main, recipe / "tars.yaml", *flags, named=[tmp_path / "a-1.tar", "is not a tar"])
