"""Where a resumed run stands: at the checkpoint's place, with its batches, or on request with others."""

import json

import numpy as np
import pyarrow as pa
import pytest
from conftest import run_here, tiny_config, write_recipe
from datasets import Dataset

import pretrain
from w2v2.arguments import PretrainArguments
from w2v2.data.batching import EffectiveBatches
from w2v2.data.cutting import CUT_VERSION
from w2v2.data.utterances import Utterances
from w2v2.errors import UserError
from w2v2.train.identity import differences, hash_ids, hash_places
from w2v2.train.log import read_metrics
from w2v2.train.state import RunState

SECOND = 16_000


def make_args(**changes):
    values = dict(train_data=["x"], output_dir="x", seed=3, batch_hours=0.002, crop_seconds=8.0, max_steps=9)
    return PretrainArguments(**values | changes)


def make_data(num_utterances, longer=0, folder="corpus", clip="clip", order=1):
    lengths = np.arange(num_utterances, dtype=np.int32) // 2 * 100 + 2 * SECOND + longer
    ids = [f"{folder}/{clip}{i // 2}-{i % 2}.wav" for i in range(num_utterances)]  # twins of equal length
    ids[:2] = ids[:2][::order]
    return Utterances(Dataset.from_dict({"id": ids}), lengths, {})


@pytest.fixture
def checkpoint(tmp_path):
    """Of a run over 20 utterances, in the middle of its third epoch."""
    tiny_config().save_pretrained(tmp_path)
    (tmp_path / "training_state").mkdir()
    fresh = RunState.start(make_args(), make_data(20), tiny_config(), None)
    saved = fresh.as_dict() | dict(step=7, epoch=2, position=11, heard_samples=12_345, micro_batch_seconds=200.0)
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
    "other clips of the same lengths": ({}, make_data(20, clip="cut"), ["other utterances, another order"]),
    "the same names in another folder": (
        {},
        make_data(20, folder="chunks_v2"),
        ["other paths (has the corpus moved?)"],
    ),
    "another order": ({}, make_data(20, order=-1), ["other utterances, another order"]),
}


@pytest.mark.parametrize("changed", CHANGES)
def test_other_batches_are_refused_or_accepted(checkpoint, changed):
    flags, data, named = CHANGES[changed]
    with pytest.raises(UserError, match="--accept_changed_batches") as refused:
        RunState.start(make_args(**flags), data, tiny_config(), checkpoint)
    args = make_args(**flags, accept_changed_batches=True)
    state = RunState.start(args, data, tiny_config(), checkpoint)
    for text in named:
        assert text in str(refused.value) and text in " ".join(state.notes)
    assert (state.step, state.heard_samples) == (7, 12_345)
    assert tuple(state.cursor) == ((2, 11) if len(data.table) > 11 else (3, 0))
    fresh = RunState.start(make_args(**flags), data, tiny_config(), None)
    assert state.as_dict()["identity"] == fresh.identity and "notes" not in state.as_dict() and fresh.notes == []


def test_a_folder_that_is_read_may_move_but_keeps_its_name(tmp_path):
    """Its ids are relative to it."""
    for name in ("old/chunks_v1", "new/chunks_v1", "new/chunks_v2"):
        (tmp_path / name).mkdir(parents=True)
    table = make_data(20).table
    moved, other, before = (hash_ids([str(folder)], table) for folder in sorted(tmp_path.glob("*/*"), key=str))
    assert before == moved != other
    (tmp_path / "new/chunks_v2/manifest.parquet").touch()  # which gives the ids of what was packed
    assert hash_ids([str(tmp_path / "new/chunks_v2")], table) == hash_ids(["train.csv"], table)


def test_a_checkpoint_that_knows_no_ids_goes_on_with_a_line(checkpoint):
    path = checkpoint / "training_state/state.json"
    saved = json.loads(path.read_text())
    del saved["identity"]["ids_sha256"], saved["settings"]
    path.write_text(json.dumps(saved))
    state = RunState.start(make_args(learning_rate=1.0), make_data(20, clip="cut"), tiny_config(), checkpoint)
    (note,) = state.notes
    assert "earlier version: neither the ids of the utterances nor the settings were compared" in note


def test_convs_of_an_earlier_version_were_not_frozen(checkpoint):
    path = checkpoint / "training_state/state.json"
    saved = json.loads(path.read_text())
    del saved["settings"]["freeze_feature_encoder"]
    path.write_text(json.dumps(saved))
    data = make_data(20), tiny_config(), checkpoint
    (note,) = RunState.start(make_args(freeze_feature_encoder=True), *data).notes
    assert note.endswith("freeze_feature_encoder True (was False)")
    assert RunState.start(make_args(), *data).notes == []


@pytest.mark.parametrize("saved_version", [None, CUT_VERSION + 1])
def test_another_cut_is_told_and_changes_no_batch(checkpoint, saved_version):
    path = checkpoint / "training_state/state.json"
    saved = json.loads(path.read_text())
    assert saved.pop("cut_version") == CUT_VERSION
    path.write_text(json.dumps(saved | ({"cut_version": saved_version} if saved_version else {})))
    state = RunState.start(make_args(), make_data(20), tiny_config(), checkpoint)
    (note,) = state.notes
    assert f"(cut_version {saved_version or 1}, now {CUT_VERSION}): dropout and Gumbel noise follow the new cut" in note
    assert tuple(state.cursor) == (2, 11) and state.as_dict()["cut_version"] == CUT_VERSION


def test_changed_settings_are_one_line_with_both_values(checkpoint):
    args = make_args(learning_rate=0.1, diversity_scope="effective_batch", micro_batch_seconds=3.0)
    state = RunState.start(args, make_data(20), tiny_config(hidden_dropout=0.25), checkpoint, "bf16")
    (note,) = state.notes
    assert note == (
        "other settings than the checkpoint's run had: learning_rate 0.1 (was 0.0005), diversity_scope effective_batch "
        "(was micro_batch), hidden_dropout 0.25 (was 0.0), mixed_precision bf16 (was no), micro_batch_seconds 3.0 (was 200.0)"
    )
    assert state.as_dict()["settings"]["learning_rate"] == 0.1


@pytest.mark.parametrize("num_utterances", [1, 2, 10, 11, 12, 13, 40])
def test_from_an_accepted_place_each_epoch_is_whole(checkpoint, num_utterances):
    data = make_data(num_utterances)
    state = RunState.start(make_args(accept_changed_batches=True), data, tiny_config(), checkpoint)
    batches = EffectiveBatches(
        data.num_samples, batch_samples=6 * SECOND, crop_samples=8 * SECOND, grid_samples=0, seed=3
    )
    cursor, heard = state.cursor, []
    while cursor.epoch < 6:
        crops, cursor = batches.draw(cursor)
        heard += zip(crops.passage.tolist(), crops.utterance.tolist(), strict=True)
    for epoch in (4, 5):
        assert sorted(u for e, u in heard if e == epoch) == list(range(num_utterances))


def test_a_run_goes_on_with_fewer_data_if_accepted(tmp_path, capsys):
    """Its place lies beyond their end; the next resume needs no flag any more."""
    values = dict(batch_hours=0.001, micro_batch_seconds=4, save_steps=2, dataloader_num_workers=0, report_to=["none"])
    config = write_recipe(tmp_path, {}, **values, use_cpu=True)
    fewer = tmp_path / "fewer.csv"
    fewer.write_text("\n".join((tmp_path / "train.csv").read_text().splitlines()[:3]))
    fewer_data = ("--train_data", fewer, "--seed", 43, "--resume_from_checkpoint", "auto")

    def run(*more):
        status = run_here(pretrain.main, config, "--output_dir", tmp_path / "run", *more)
        return status, capsys.readouterr()

    def saved(step):
        return json.loads((tmp_path / f"run/checkpoint-{step}/training_state/state.json").read_text())

    assert run("--max_steps", 2)[0] == 0
    assert saved(2)["epoch"] == 0 and saved(2)["position"] >= 2
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    status, printed = run("--max_steps", 4, *fewer_data)
    assert status == 2 and "seed 43 (was 42), utterances 2 (was 20)" in printed.err
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before
    status, printed = run("--max_steps", 4, *fewer_data, "--accept_changed_batches")
    assert status == 0, printed.err
    (line,) = [line for line in printed.out.splitlines() if "as accepted" in line]
    assert line.startswith("warning ") and "seed 43 (was 42), utterances 2 (was 20)" in line
    assert saved(4)["identity"] | {"seed": 43, "utterances": 2} == saved(4)["identity"] and saved(4)["epoch"] >= 1
    assert run("--max_steps", 6, *fewer_data)[0] == 0
    records = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [record["step"] for record in records if "loss" in record] == list(range(1, 7))
    assert "accept_changed_batches" not in (tmp_path / "run/pretrain_config.yaml").read_text()


def test_a_run_is_not_resumed_beyond_its_end(checkpoint):
    with pytest.raises(UserError, match=r"--max_steps 6: .* has 7 updates already"):
        RunState.start(make_args(max_steps=6), make_data(20), tiny_config(), checkpoint)
    assert RunState.start(make_args(max_steps=7), make_data(20), tiny_config(), checkpoint).step == 7


def test_starts_and_channels_are_hashed():
    table = pa.table({"id": ["u"], "start": [0.0], "channel": pa.array([0], pa.int32())})
    other = table.set_column(1, "start", pa.array([1.0]))
    left = table.set_column(2, "channel", pa.array([None], pa.int32()))
    hashes = {hash_places(Dataset(one)) for one in (table, other, left)}
    assert len(hashes) == 3 and hash_places(Dataset(table)) in hashes


def test_another_kind_of_order_is_a_difference():
    mixed = {"utterances": 3, "draws": {"a": 2}}
    assert "draws" in differences({"utterances": 3}, mixed) and "draws" in differences(mixed, {"utterances": 3})
    assert differences(mixed, dict(mixed)) == ""
