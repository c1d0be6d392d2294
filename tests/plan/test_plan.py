"""What is known before the first update: a chunk at a time, it is what one pass over everything would give."""

import hashlib
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from accelerate import DistributedType
from conftest import tiny_config

from w2v2.audio.crops import SAMPLING_RATE
from w2v2.data import batching
from w2v2.data.batching import Cursor, crop_length, find_size, plan_update
from w2v2.data.sampling import build_batches
from w2v2.data.utterances import Utterances
from w2v2.plan.plan import describe, find_resources, make_plan
from w2v2.train import identity as identity_module
from w2v2.train.identity import identity


def make_args(**changes):
    values = dict(crop_seconds=8.0, length_grid_seconds=0.32, batch_hours=0.02, micro_batch_seconds=30.0, seed=3)
    values |= dict(max_steps=5, warmup_steps=1, validation_data=None, eval_split_name=None)
    values |= dict(cuda_graph=False, mask_time_prob=0.65, mask_time_length=10, mask_time_min_masks=2)
    return SimpleNamespace(**values | changes)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    for module in (batching, identity_module):
        monkeypatch.setattr(module, "CHUNK", 7)


@pytest.fixture
def lengths():
    """In seconds, to a thousandth."""
    return np.random.default_rng(0).uniform(0.5, 14, 61).round(3).tolist()


def in_samples(seconds):
    return [round(length * SAMPLING_RATE) for length in seconds]


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("n", [1, 7, 61])
def test_lengths_are_hashed_as_little_endian_int64(lengths, dtype, n):
    """What checkpoints hold: another formula would refuse them all."""
    samples = in_samples(lengths[:n])
    whole = hashlib.sha256(b"".join(length.to_bytes(8, "little", signed=True) for length in samples)).hexdigest()[:16]
    found = identity(make_args(), Utterances(None, np.array(samples, dtype), {}))
    assert (found["lengths_sha256"], found["utterances"]) == (whole, n)


@pytest.mark.parametrize("grid", [0.0, 0.32])
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_the_plan_says_what_the_ranks_will_do(lengths, num_ranks, grid):
    """Against every rank's own micro-batches, and the whole epoch's lengths at once."""
    args = make_args(length_grid_seconds=grid)
    samples = np.array(in_samples(lengths))
    batches = build_batches(Utterances(None, samples.astype(np.int32), {}), args)
    cursor, rounds, drawn, slots = Cursor(), [], [], 0
    for update in range(5):
        crops, cursor = batches.draw(cursor)
        cut = dict(num_ranks=num_ranks, micro_batch_samples=30 * SAMPLING_RATE)
        plans = [p for rank in range(num_ranks) for p in plan_update(crops, update, cursor, rank=rank, **cut)]
        rounds.append(plans[0].num_rounds)
        drawn.append(crops.num_samples.sum())
        slots += sum(-(-int(length) // 320) for length in crops.num_samples)
    heard = crop_length(samples, 8 * SAMPLING_RATE, round(grid * SAMPLING_RATE)).sum()

    left_out = {"too_short": 4, "too_long": 0}, {"too_short": 0.5, "too_long": 0}
    data = Utterances(None, samples.astype(np.int32), *left_out)
    found = make_plan(data, build_batches(data, args), args, num_ranks, 30.0)
    assert found["utterances"] == len(samples) and found["dropped"] == {"too_short": 4}
    assert found["dropped_hours"] == {"too_short": 0.5}
    assert found["hours_to_hear"] == pytest.approx(sum(drawn) / SAMPLING_RATE / 3600)
    edges, counts = found["lengths"]["seconds"], found["lengths"]["utterances"]
    assert (sum(counts), edges[0], edges[-1]) == (61, min(lengths), max(lengths)) and len(edges) == len(counts) + 1
    assert counts[0] == sum(length < edges[1] for length in lengths)
    assert found["hours"] == pytest.approx(samples.sum() / SAMPLING_RATE / 3600)
    assert found["batch_hours"] == pytest.approx(np.mean(drawn) / SAMPLING_RATE / 3600)
    assert found["micro_batches_per_update"] == np.mean(rounds)
    assert found["updates_per_epoch"] == pytest.approx(heard / np.mean(drawn))
    assert found["epochs"] == pytest.approx(5 * np.mean(drawn) / heard)
    assert found["cropped_fraction"] == pytest.approx(1 - heard / samples.sum())
    size = find_size(batches, num_ranks, 30 * SAMPLING_RATE)
    assert found["micro_batch_size"] == {"slots": size.slots, "rows": size.rows}
    padding = 1 - sum(drawn) / (320 * slots)
    assert found["padded_fraction"] == pytest.approx(padding) and 0 <= padding < 0.01 and (grid or padding)
    filled = make_plan(data, batches, make_args(length_grid_seconds=grid, cuda_graph=True), num_ranks, 30.0)
    num_pieces = sum(rounds) * num_ranks  # no dummy is among them here
    assert filled["padded_fraction"] == pytest.approx(1 - sum(drawn) / (320 * num_pieces * size.slots))
    said = f"micro-batches of at most {size.slots / 50:.1f} s on each of {num_ranks} device(s), {padding:.1%} padding"
    lines = describe(found | {"warnings": []})
    assert said in lines and "(left out: 4 too_short, 0.50 h)" in lines and "5 updates hear 0.1" in lines
    assert f": {found['updates_per_epoch']:.1f} updates an epoch" in lines
    lines = describe(found | {"warnings": [], "updates_per_epoch": 1 / 2_000, "epochs": 10_000.0})
    assert ": 2,000.0 epochs an update, 10,000.0 epochs" in lines


def test_lengths_in_four_bytes_are_not_copied():
    lengths = np.full(10, 3 * SAMPLING_RATE, np.int32)
    assert build_batches(Utterances(None, lengths, {}), make_args()).num_samples is lengths


def test_sharding_spreads_the_moments_alone(tmp_path):
    args = make_args(output_dir=str(tmp_path), freeze_feature_encoder=False, save_steps=5, save_total_limit=0)

    def find(num_processes, kind):
        found = find_resources(
            args, tiny_config(), {}, SimpleNamespace(num_processes=num_processes, distributed_type=kind)
        )
        return found["memory_gb"] * 1e9 / found["parameters"]

    assert (find(8, DistributedType.MULTI_GPU), find(8, DistributedType.FSDP)) == pytest.approx((16, 9))


def test_copies_of_shards_count_on_the_runs_disk_alone(tmp_path, monkeypatch):
    """What they take comes on top, and what lies there already is as good as free."""
    args = make_args(output_dir=str(tmp_path / "run"), freeze_feature_encoder=False, save_steps=5, save_total_limit=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    accelerator = SimpleNamespace(num_processes=1, distributed_type=None)

    def find(**streaming):
        found = find_resources(args, tiny_config(), {"streaming": streaming}, accelerator)
        return found["disk_gb"], found["free_disk_gb"]

    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "shard.tar").write_bytes(bytes(1_000_000))
    in_place, here = find(cache_dir=None, cache_gigabytes=0.0), find(cache_dir=str(cache), cache_gigabytes=0.5)
    assert here == pytest.approx((in_place[0] + 0.5, 0.001)) and in_place[1] == 0
    if Path("/dev/shm").is_dir() and Path("/dev/shm").stat().st_dev != tmp_path.stat().st_dev:
        assert find(cache_dir="/dev/shm/no_such_cache", cache_gigabytes=0.5) == in_place
