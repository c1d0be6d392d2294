"""What is known before the first update: a chunk at a time, it is what one pass over everything would give."""

import hashlib
import math
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import write_csv

from w2v2.data import batching
from w2v2.data.audio import SAMPLING_RATE
from w2v2.data.batching import Cursor, EffectiveBatches, crop_length, plan_update
from w2v2.data.collate import Framing
from w2v2.data.utterances import Utterances, load_utterances
from w2v2.errors import UserError
from w2v2.train import plan
from w2v2.train.plan import build_batches, identity, make_plan

FRAMING = Framing((10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2), 0.65, 10, 2, 12, 0.0, SAMPLING_RATE, normalize=False)


def make_args(output_dir=None, **changes):
    values = dict(data_root=None, output_dir=output_dir, min_seconds=2.0, max_seconds=None, crop_seconds=8.0)
    values |= dict(length_grid_seconds=0.32, batch_hours=0.02, micro_batch_seconds=30.0, seed=3, max_steps=5)
    values |= dict(
        dry_run=False,
        warmup_steps=1,
        validation_data=None,
        mask_time_prob=0.65,
        mask_time_length=10,
        mask_time_min_masks=2,
    )
    return SimpleNamespace(**values | changes)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    for module in (batching, plan):
        monkeypatch.setattr(module, "CHUNK", 7)


@pytest.fixture
def lengths():
    """In seconds, to a thousandth."""
    return np.random.default_rng(0).uniform(0.5, 14, 61).round(3).tolist()


def in_samples(seconds):
    return [round(length * SAMPLING_RATE) for length in seconds]


@pytest.mark.parametrize("most", [None, 12.0])
@pytest.mark.parametrize("least", [0.0, 2.0])
def test_utterances_are_the_rows_of_fitting_length_in_order(tmp_path, lengths, least, most):
    names = [f"/data/{row}.wav" for row in range(len(lengths))]
    found, unmeasured = load_utterances(
        [str(write_csv(tmp_path / "a.csv", names, lengths))],
        make_args(tmp_path / "run", min_seconds=least, max_seconds=most),
        FRAMING,
    )
    short = [max(least * SAMPLING_RATE, FRAMING.min_samples) > n for n in in_samples(lengths)]
    long = [n > (most or math.inf) * SAMPLING_RATE for n in in_samples(lengths)]
    kept = [row for row in range(len(lengths)) if not short[row] and not long[row]]
    assert found.table["audio"][:] == [names[row] for row in kept]
    assert found.num_samples.tolist() == found.table["num_samples"][:] == [in_samples(lengths)[row] for row in kept]
    assert found.dropped == {"too_short": sum(short), "too_long": sum(long), "unreadable": 0} and unmeasured == []
    assert found.num_samples.dtype == np.int32
    assert [file["filename"] for file in found.table.cache_files] == list(map(str, (tmp_path / "run/cache").iterdir()))


def test_a_dry_run_leaves_no_table_behind(tmp_path, lengths):
    manifest = write_csv(tmp_path / "a.csv", [f"/data/{row}.wav" for row in range(len(lengths))], lengths)
    dry, wet = (
        load_utterances([str(manifest)], make_args(tmp_path / "run", dry_run=dry), FRAMING)[0] for dry in (True, False)
    )
    assert not dry.table.cache_files and wet.table.cache_files and dry.table.to_list() == wet.table.to_list()
    assert len(list((tmp_path / "run/cache").iterdir())) == 1


def test_a_crop_too_short_for_a_masked_span_counts_as_too_short(tmp_path):
    """0.45 s holds a span of 20 frames and one beside it, but on a grid of 0.3 s only 0.32 s of it is heard."""
    framing = Framing(
        (10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2), 0.65, 20, 2, 12, 0.0, SAMPLING_RATE, normalize=False
    )
    manifest = write_csv(tmp_path / "a.csv", ["/a.wav", "/b.wav"], [0.45, 0.75])
    found, _ = load_utterances([str(manifest)], make_args(tmp_path, min_seconds=0.0, length_grid_seconds=0.3), framing)
    assert 0.32 < framing.min_samples / SAMPLING_RATE < 0.45
    assert found.table["audio"][:] == ["/b.wav"] and found.dropped["too_short"] == 1


def test_nothing_left_is_a_slip_that_counts_the_reasons(tmp_path):
    manifest = write_csv(tmp_path / "a.csv", ["/a.wav", "/b.wav", "/c.wav"], [1.0, 1.5, 30.0])
    with pytest.raises(UserError, match=r"left of 3 \(2 shorter than 2 s, 1 longer than --max_seconds, 0 unreadable"):
        load_utterances([str(manifest)], make_args(tmp_path, max_seconds=20.0), FRAMING)


def test_an_utterance_beyond_int32_is_named(tmp_path):
    manifest = write_csv(tmp_path / "a.csv", ["/a.wav"] * 8 + ["/endless.wav"], [3.0] * 8 + [40 * 3600.0])
    with pytest.raises(UserError, match="utterance /endless.wav has 40.0 h, more than 37.3"):
        load_utterances([str(manifest)], make_args(tmp_path), FRAMING)
    assert len(load_utterances([str(manifest)], make_args(tmp_path, max_seconds=20.0), FRAMING)[0].table) == 8


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
    batches = EffectiveBatches(
        samples,
        batch_samples=round(0.02 * 3600 * SAMPLING_RATE),
        crop_samples=8 * SAMPLING_RATE,
        grid_samples=round(grid * SAMPLING_RATE),
        seed=3,
    )
    cursor, rounds, drawn, padded = Cursor(), [], [], []
    for update in range(5):
        crops, cursor = batches.draw(cursor)
        cut = dict(num_ranks=num_ranks, micro_batch_samples=30 * SAMPLING_RATE)
        plans = [p for rank in range(num_ranks) for p in plan_update(crops, update, cursor, rank=rank, **cut)]
        rounds.append(plans[0].num_rounds)
        drawn.append(crops.num_samples.sum())
        padded.append(sum(len(p.crops.utterance) * p.crops.num_samples.max() for p in plans if not p.dummy))
    heard = crop_length(samples, 8 * SAMPLING_RATE, round(grid * SAMPLING_RATE)).sum()

    data = Utterances(None, samples.astype(np.int32), {"too_short": 4, "too_long": 0})
    found = make_plan(data, build_batches(data, args), args, num_ranks, 30.0)
    assert found["utterances"] == len(samples) and found["dropped"] == {"too_short": 4}
    assert found["hours"] == pytest.approx(samples.sum() / SAMPLING_RATE / 3600)
    assert found["batch_hours"] == pytest.approx(np.mean(drawn) / SAMPLING_RATE / 3600)
    assert found["micro_batches_per_update"] == np.mean(rounds)
    assert found["updates_per_epoch"] == pytest.approx(heard / np.mean(drawn))
    assert found["epochs"] == pytest.approx(5 * np.mean(drawn) / heard)
    assert found["cropped_fraction"] == pytest.approx(1 - heard / samples.sum())
    assert found["padded_fraction"] == pytest.approx(1 - sum(drawn) / sum(padded)) and found["padded_fraction"] > 0


def test_lengths_in_four_bytes_are_not_copied():
    lengths = np.full(10, 3 * SAMPLING_RATE, np.int32)
    assert build_batches(Utterances(None, lengths, {}), make_args()).num_samples is lengths
