"""Crops become micro-batches: 16-bit samples as they stand, floats where a file needs them, the same sound on the device;
the same micro-batches from any number of workers, and one line for a worker that is lost or hangs.
"""

import contextlib
import json
import os
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import make_batch, run_here, tiny_config, write_csv, write_tones
from ranks import Program, environment, wait_for_records
from test_batching import SECOND, START, make_batches, rows
from torch.utils.data import Dataset
from transformers import Wav2Vec2FeatureExtractor

import pretrain
from w2v2.data import loader
from w2v2.data.batching import PlanStream
from w2v2.data.collate import CropDataset, lay_out, sound
from w2v2.data.loader import build_loader

ROOT = Path(__file__).parents[2]


def samples(*lengths, dtype=np.int16):
    rng = np.random.default_rng(0)
    return [rng.integers(-32_768, 32_768, n).astype(dtype) for n in lengths]


def test_sixteen_bits_stay_sixteen_bits():
    rows = samples(5, 3)
    laid = lay_out(rows, [0, 6], 10)
    assert laid.dtype == torch.int16
    assert laid.tolist() == [*rows[0].tolist(), 0, *rows[1].tolist(), 0]


def test_one_row_of_floats_makes_all_rows_floats():
    (pcm,) = samples(4)
    floats = np.array([0.25, -3.0], np.float32)
    laid = lay_out([pcm, floats], [0, 5], 8)
    assert laid.dtype == torch.float32
    assert laid.tolist() == [*(pcm.astype(np.float64) / 32_768).tolist(), 0.0, 0.25, -3.0, 0.0]


@pytest.mark.parametrize("normalize", [False, True])
def test_sound_is_what_the_feature_extractor_makes(normalize):
    config, lengths = tiny_config(), [9_001, 16_400, 640]
    rows = [row // 8 + 100 for row in samples(*lengths)]
    batch = make_batch(config, lengths)
    starts = (batch.rows.first * 320).tolist()
    extractor = Wav2Vec2FeatureExtractor(do_normalize=normalize)
    floats = [row / np.float32(32_768) for row in rows]
    heard, same = (sound(lay_out(own, starts, len(batch.samples), normalize)) for own in (rows, floats))
    assert heard.dtype == torch.float32
    expected = torch.zeros_like(heard)
    for row, start in zip(floats, starts, strict=True):
        own = extractor(row, sampling_rate=16_000).input_values[0]
        expected[start : start + len(row)] = torch.from_numpy(own)
    torch.testing.assert_close(heard, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(same, heard)


def test_every_frame_has_a_slot_of_its_own():
    """Utterance by utterance, by brute force: slots, gaps, masked frames, bounds, on the device and on the host."""
    config, lengths = tiny_config(), [16_400, 9_000, 9_001, 24_000, 5_120, 5_199, 5_200]
    batch, slot, masked = make_batch(config, lengths), 0, []
    for row, length in enumerate(lengths):
        alone = make_batch(config, [length], first=row)
        own, gap = batch.rows.lengths[row], batch.rows.gaps[row]
        assert (own, gap) == (alone.rows.lengths[0], alone.rows.gaps[0]) and (own - 1) * 320 + 400 <= length <= (
            own + gap
        ) * 320
        rows = batch.rows
        assert rows.first[row] == slot == rows.bounds[2 * row] and rows.bounds[2 * row + 1] == slot + own
        assert (rows.row[slot : slot + own + gap] == row).all() and rows.frames[row] == own
        assert rows.inside[slot : slot + own + gap].tolist() == [True] * own + [False] * gap
        assert torch.equal(batch.samples[slot * 320 : (slot + own + gap) * 320], alone.samples)
        assert batch.masked_rows.bounds[2 * row] == batch.masked_rows.first[row] == len(masked)
        assert (batch.masked_rows.row[len(masked) :][: len(alone.masked)] == row).all()
        masked += [slot + i for i in alone.masked.tolist()]
        assert batch.masked_rows.bounds[2 * row + 1] == batch.masked_rows.bounds[2 * row + 2] == len(masked)
        slot += own + gap
    assert batch.masked.tolist() == masked and batch.rows.bounds[-1] == slot == len(batch.rows.row)
    assert batch.masked_rows.lengths == tuple(batch.masked_rows.frames.tolist()) and batch.masked_rows.inside.all()


def test_groups_hold_each_masked_frame_once():
    rng = np.random.default_rng(0)
    for trial in range(40):
        lengths = (rng.uniform(0.5, 6 + 3 * trial % 12, 12) * 16_000).astype(int)
        batch = make_batch(tiny_config(), sorted(lengths.tolist(), reverse=True) if trial % 2 else lengths.tolist())
        places, rows = [], []
        for own, place, valid in batch.masked_groups():
            assert valid.sum(1).tolist() == batch.masked_rows.frames[own].tolist()
            least, most = int(batch.masked_rows.frames[own].min()), int(batch.masked_rows.frames[own].max())
            assert least >= 0.75 * most and valid.shape[1] - most < 16
            places += place[valid].tolist()
            rows += range(len(lengths))[own]
        assert places == list(range(len(batch.masked))) and rows == list(range(len(lengths)))


# -- the loader


class Echo(Dataset):
    """Gives back what it is asked for, from whichever worker."""

    def __getitem__(self, plan):
        return repr((plan.update, plan.piece, plan.dummy, rows(plan.crops)))


@pytest.mark.parametrize("num_workers", [1, 2])
def test_the_number_of_workers_changes_nothing(num_workers):
    stream = PlanStream(make_batches(), START, range(4), rank=1, num_ranks=2, micro_batch_samples=30 * SECOND)
    micro_batches = build_loader(Echo(), stream, num_workers=num_workers, prefetch_factor=2, pin_memory=False)
    assert list(micro_batches) == [Echo()[plan] for plan in stream]


def flags_for(folder: Path, manifest: Path, output_dir: Path, **changes) -> list[str]:
    tiny_config().save_pretrained(folder / "model")
    values = dict(train_data=[str(manifest)], config_name=str(folder / "model"), output_dir=str(output_dir))
    values |= dict(min_seconds=0.5, crop_seconds=1.3, batch_hours=0.006, micro_batch_seconds=12, max_steps=12)
    values |= dict(warmup_steps=2, logging_steps=1, save_steps=100, max_skipped_fraction=0.9, dataloader_num_workers=2)
    values |= dict(report_to=["none"], use_cpu=True, learning_rate=0.001) | changes
    config = folder / f"{output_dir.name}.yaml"
    config.write_text(yaml.safe_dump(values))
    return [str(config)]


def test_validation_does_not_follow_the_seed(tmp_path):
    """The same weights, another seed: the same crops, masks and distractors, and so the same loss."""
    seconds = [float(n) for n in np.random.default_rng(0).uniform(1.5, 4, 12).round(2)]
    manifest = write_csv(tmp_path / "train.csv", write_tones(tmp_path / "audio", seconds), seconds)
    changes = dict(validation_data=[str(manifest)], max_steps=1, warmup_steps=0, eval_steps=1, learning_rate=1e-12)
    assert run_here(pretrain.main, *flags_for(tmp_path, manifest, tmp_path / "first", **changes)) == 0
    changes |= dict(model_name_or_path=str(tmp_path / "first"), config_name=None)
    losses = []
    for seed in (1, 2):
        assert (
            run_here(pretrain.main, *flags_for(tmp_path, manifest, tmp_path / f"run{seed}", seed=seed, **changes)) == 0
        )
        lines = (tmp_path / f"run{seed}/metrics.jsonl").read_text().splitlines()
        losses += [value["eval_loss"] for value in map(json.loads, lines) if "eval_loss" in value]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def child_of(pid: int) -> int:
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = status.read_text().rpartition(")")[2].split()
            if int(fields[1]) == pid:
                return int(status.parent.name)
    raise AssertionError(f"{pid} has no child")


@pytest.mark.parametrize(
    "number, cause", [(signal.SIGKILL, "memory ran out"), (signal.SIGSEGV, "a damaged file crashed the decoder")]
)
def test_a_lost_worker_ends_the_run_with_one_line(tmp_path, number, cause):
    manifest = write_csv(tmp_path / "train.csv", write_tones(tmp_path / "audio", [2.0] * 12), [2.0] * 12)
    arguments = flags_for(tmp_path, manifest, tmp_path / "run", max_steps=100_000)
    errors = tmp_path / "errors.txt"
    run = Program(["pretrain.py", *arguments], errors, environment())
    try:
        wait_for_records(run, tmp_path / "run", 1)
        os.kill(child_of(run.pid), number)
        status = run.wait(60)
    finally:
        run.kill()
    lines = [line for line in errors.read_text().splitlines() if "error:" in line]
    # A thread of multiprocessing's may print a traceback of the broken connection; the script prints none.
    assert status == 2 and len(lines) == 1 and "run_script" not in errors.read_text(), errors.read_text()
    assert "a process that decodes audio" in lines[0] and cause in lines[0] and "--resume_from_checkpoint" in lines[0]


def test_an_endless_decode_ends_the_run_with_one_line(tmp_path, monkeypatch, capsys):
    manifest = write_csv(tmp_path / "train.csv", write_tones(tmp_path / "audio", [2.0] * 12), [2.0] * 12)
    monkeypatch.setattr(loader, "TIMEOUT_SECONDS", 2)
    monkeypatch.setattr(CropDataset, "read", lambda *_: threading.Event().wait(30))
    status = run_here(pretrain.main, *flags_for(tmp_path, manifest, tmp_path / "run"))
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert status == 2 and len(lines) == 1 and "no audio came for 2 s" in lines[0]
