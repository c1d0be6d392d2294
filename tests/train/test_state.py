"""Where a resumed run stands: at the checkpoint's place, with its batches, or on request with others."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import run_here, tiny_config, write_csv, write_tones

import pretrain
from w2v2.data.batching import EffectiveBatches
from w2v2.data.utterances import Utterances
from w2v2.errors import UserError
from w2v2.train.log import read_metrics
from w2v2.train.plan import identity
from w2v2.train.state import RunState

SECOND = 16_000


def make_args(**changes):
    values = dict(seed=3, batch_hours=0.002, crop_seconds=8.0, length_grid_seconds=0.32, max_steps=9)
    values |= dict(mask_time_prob=0.65, mask_time_length=10, mask_time_min_masks=2, accept_changed_batches=False)
    return SimpleNamespace(**values | changes)


def make_data(num_utterances, longer=0):
    lengths = np.arange(num_utterances, dtype=np.int32) * 100 + 2 * SECOND + longer
    return Utterances(range(num_utterances), lengths, {})


@pytest.fixture
def checkpoint(tmp_path):
    """Of a run over 20 utterances, in the middle of its third epoch."""
    tiny_config().save_pretrained(tmp_path)
    (tmp_path / "training_state").mkdir()
    saved = dict(step=7, epoch=2, position=11, heard_samples=12_345, identity=identity(make_args(), make_data(20)))
    (tmp_path / "training_state/state.json").write_text(json.dumps(saved))
    return tmp_path


CHANGES = {
    "seed": (dict(seed=4), make_data(20), ["seed 4 (was 3)"]),
    "batch and crop": (
        dict(batch_hours=0.003, crop_seconds=7.0),
        make_data(20),
        ["0.003 (was 0.002)", "7.0 (was 8.0)"],
    ),
    "more data": ({}, make_data(30), ["utterances 30 (was 20)", "lengths_sha256"]),
    "less data": ({}, make_data(9), ["utterances 9 (was 20)"]),
    "as much as was heard": ({}, make_data(11), ["utterances 11 (was 20)"]),
    "other lengths": ({}, make_data(20, longer=1), ["lengths_sha256"]),
}


@pytest.mark.parametrize("changed", CHANGES)
def test_other_batches_are_refused_with_both_values_or_accepted(checkpoint, changed):
    flags, data, named = CHANGES[changed]
    with pytest.raises(UserError, match="--accept_changed_batches") as refused:
        RunState.start(make_args(**flags), data, tiny_config(), checkpoint)
    args = make_args(**flags, accept_changed_batches=True)
    state = RunState.start(args, data, tiny_config(), checkpoint)
    for text in named:
        assert text in str(refused.value) and text in " ".join(state.changes)
    assert (state.step, state.heard_samples) == (7, 12_345)
    assert tuple(state.cursor) == ((2, 11) if len(data.table) > 11 else (3, 0))
    assert state.as_dict()["identity"] == identity(args, data) and "changes" not in state.as_dict()
    assert RunState.start(make_args(**flags), data, tiny_config(), None).changes == []


@pytest.mark.parametrize("accept", [False, True])
def test_the_same_batches_go_on_where_they_were(checkpoint, accept):
    args = make_args(accept_changed_batches=accept)
    state = RunState.start(args, make_data(20), tiny_config(), checkpoint)
    assert tuple(state.cursor) == (2, 11) and state.changes == []


@pytest.mark.parametrize("num_utterances", [1, 2, 10, 11, 12, 13, 40])
def test_from_an_accepted_place_every_utterance_is_heard_once_in_the_following_epochs(checkpoint, num_utterances):
    data = make_data(num_utterances)
    state = RunState.start(make_args(accept_changed_batches=True), data, tiny_config(), checkpoint)
    batches = EffectiveBatches(
        data.num_samples, batch_samples=6 * SECOND, crop_samples=8 * SECOND, grid_samples=0, seed=3
    )
    cursor, heard = state.cursor, []
    while cursor.epoch < 6:
        crops, cursor = batches.draw(cursor)
        heard += zip(crops.epoch.tolist(), crops.utterance.tolist(), strict=True)
    for epoch in (4, 5):
        assert sorted(u for e, u in heard if e == epoch) == list(range(num_utterances))


def test_a_run_goes_on_with_fewer_data_where_that_is_accepted(tmp_path, capsys):
    """Its place lies beyond their end; the next resume needs no flag any more."""
    seconds = [1.0 + 0.1 * number for number in range(16)]
    paths = write_tones(tmp_path / "audio", seconds)
    tiny_config().save_pretrained(tmp_path / "model")
    whole, fewer = (write_csv(tmp_path / f"{n}.csv", paths[:n], seconds[:n]) for n in (16, 3))

    def run(data, max_steps, *more, seed=1):
        flags = f"--config_name {tmp_path}/model --output_dir {tmp_path}/run --batch_hours 0.001 --micro_batch_seconds 4 --min_seconds 0.5 "
        flags += f"--logging_steps 1 --save_steps 2 --dataloader_num_workers 0 --report_to none --use_cpu --seed {seed}"
        status = run_here(pretrain.main, "--train_data", data, "--max_steps", max_steps, *flags.split(), *more)
        return status, capsys.readouterr()

    def saved(step):
        return json.loads((tmp_path / f"run/checkpoint-{step}/training_state/state.json").read_text())

    auto = ("--resume_from_checkpoint", "auto")
    assert run(whole, 2)[0] == 0
    assert saved(2)["epoch"] == 0 and saved(2)["position"] >= 3
    status, printed = run(fewer, 4, *auto, seed=2)
    assert status == 2 and "seed 2 (was 1), utterances 3 (was 16)" in printed.err
    status, printed = run(fewer, 4, *auto, "--accept_changed_batches", seed=2)
    assert status == 0, printed.err
    (line,) = [line for line in printed.out.splitlines() if "as accepted" in line]
    assert line.startswith("warning ") and "seed 2 (was 1), utterances 3 (was 16)" in line
    assert saved(4)["identity"] | {"seed": 2, "utterances": 3} == saved(4)["identity"] and saved(4)["epoch"] >= 1
    assert run(fewer, 6, *auto, seed=2)[0] == 0
    records = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 7))
    assert "accept_changed_batches" not in (tmp_path / "run/pretrain_config.yaml").read_text()


def test_a_run_is_not_resumed_to_end_before_it_stands(checkpoint):
    with pytest.raises(UserError, match=r"--max_steps 6: .* has 7 updates already"):
        RunState.start(make_args(max_steps=6), make_data(20), tiny_config(), checkpoint)
    assert RunState.start(make_args(max_steps=7), make_data(20), tiny_config(), checkpoint).step == 7
