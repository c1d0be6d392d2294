"""Audio that is not what it says: each file gives exactly the samples asked for, or a reason, and harms no other."""

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from audio_mutants import speech, write_originals
from conftest import run_here, tiny_config, write_tones
from safetensors.torch import load_file
from test_collate import flags_for
from test_crops import set_flac_length

import pretrain
from w2v2.audio.crops import SAMPLING_RATE, AudioError, measure_length, read_crop, read_pcm
from w2v2.audio.inspection import measure_lengths
from w2v2.data.batching import Crops, Cursor, MicroBatchPlan
from w2v2.data.collate import CropDataset, Framing
from w2v2.data.utterances import load_manifest

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _no_hang():
    """A reader that waits for what never comes fails its test within a minute and a half."""

    def ring(*_):
        raise TimeoutError("hangs")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(90)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def run_mutants(folder, seed, count, timeout):
    command = [sys.executable, str(ROOT / "tests" / "audio_mutants.py"), str(folder), str(seed), str(count)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    try:
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        pytest.fail(f"hangs at {(folder / 'last.txt').read_text()}")
    assert result.returncode == 0, f"{(folder / 'last.txt').read_text()}: {result.returncode} {result.stderr[-2000:]}"
    return json.loads(result.stdout)


@pytest.mark.parametrize(
    ("seed", "count"), [(0, 450), *(pytest.param(seed, 3_000, marks=pytest.mark.slow) for seed in (1, 2, 3))]
)
def test_damaged_files_give_samples_or_a_reason(tmp_path, seed, count):
    signal.alarm(0)
    total = run_mutants(tmp_path, seed, count, timeout=80 if count < 1_000 else 900)
    assert min(total["read"], total["refused"]) > count / 5


def odd_files(folder: Path) -> dict[str, str]:
    """Path → a word of the reason why it cannot be read."""
    speech_file = folder / "speech.wav"
    soundfile.write(speech_file, speech(48_000), SAMPLING_RATE)
    found = {f"text.{suffix}": "not audio" for suffix in "flac wav au snd vox mp3 raw".split()}
    for name in found:
        (folder / name).write_bytes(b"these are words and no audio at all\n" * 200)
    found |= {"empty.wav": "empty file", "folder.wav": "is a folder", "pipe.wav": "is a pipe"}
    (folder / "empty.wav").touch()
    (folder / "folder.wav").mkdir()
    os.mkfifo(folder / "pipe.wav")
    with socket.socket(socket.AF_UNIX) as listener, contextlib.chdir(folder):  # a socket's name may not be long
        listener.bind("socket.wav")
    found |= {"socket.wav": "cannot be opened", f"{'long' * 100}.wav": "too long", "null\0.wav": "null"}
    links = {"endless.wav": "/dev/zero", "dangling.wav": "gone.wav", "circle.wav": "circle.wav"}
    for name, target in links.items():
        (folder / name).symlink_to(target)
    found |= {"endless.wav": "or a device", "circle.wav": "symbolic links"}
    found |= dict.fromkeys(("dangling.wav", "gone.wav", "speech.wav/inside.wav"), "does not exist")
    soundfile.write(folder / "nothing.wav", np.zeros(0), SAMPLING_RATE)
    found["nothing.wav"] = "not audio"
    for value in (np.nan, np.inf, -np.inf, 3e38):
        soundfile.write(folder / f"{value}.wav", np.full(48_000, value, np.float32), SAMPLING_RATE, subtype="FLOAT")
        found[f"{value}.wav"] = "holds samples up to 3e+38" if value == 3e38 else "NaN or infinite"
    for rate in (1, 999, 900_000, 2**31 - 1):
        content = bytearray(speech_file.read_bytes())
        content[24:28] = struct.pack("<I", rate)
        (folder / f"rate{rate}.wav").write_bytes(content)
        found[f"rate{rate}.wav"] = f"claims {rate} samples a second"
    if os.geteuid():
        (folder / "secret.wav").write_bytes(speech_file.read_bytes())
        (folder / "secret.wav").chmod(0)
        found["secret.wav"] = "permissions"
    return {str(folder / name): reason for name, reason in found.items()}


def test_what_cannot_be_read_says_why_at_once(tmp_path):
    bad = odd_files(tmp_path)
    for path, reason in bad.items():
        for read in (lambda path: read_pcm(path, 100, 40_000), read_crop):
            with pytest.raises(AudioError, match=reason.replace("+", r"\+")) as error:
                read(path)
            assert error.value.path == path and error.value.reason.isprintable()
    good = str(tmp_path / "speech.wav")
    found = measure_lengths([good, *bad], measure_length, tmp_path / "cache")
    assert found[good] == 48_000
    loud = [str(tmp_path / f"{value}.wav") for value in ("nan", "inf", "-inf", "3e+38")]  # their headers are fine
    for path, reason in bad.items():
        assert found[path] == 48_000 if path in loud else reason in found[path], path


@pytest.mark.parametrize(
    ("name", "written_as"), [("a.wav", "FLAC"), ("a.ogg", "MP3"), ("a.mp3", "WAV"), ("a.flac", "OGG"), ("a.txt", "WAV")]
)
def test_a_wrong_name_is_no_obstacle(tmp_path, name, written_as):
    soundfile.write(tmp_path / name, speech(40_000), SAMPLING_RATE, format=written_as)
    assert read_pcm(str(tmp_path / name), 5_000, 20_000).shape == (20_000,)


def peak_of(path: str, start: int, num_samples: int) -> float:
    tracemalloc.start()
    try:
        assert len(read_pcm(path, start, num_samples)) == num_samples
        return tracemalloc.get_traced_memory()[1] / 1e6
    finally:
        tracemalloc.stop()


def test_a_crop_of_two_hours_takes_the_memory_of_a_crop(tmp_path):
    path = tmp_path / "long.wav"
    with soundfile.SoundFile(path, "w", 48_000, 2) as file:
        file.write(speech(48_000, 2))
    num_bytes = 2 * 3600 * 48_000 * 4
    with open(path, "r+b") as file:  # zeros that take no room on the disk
        file.truncate(44 + num_bytes)
        for at, size in ((4, 36 + num_bytes), (40, num_bytes)):
            file.seek(at)
            file.write(struct.pack("<I", size))
    assert measure_length(str(path)) == 2 * 3600 * SAMPLING_RATE
    assert peak_of(str(path), 3600 * SAMPLING_RATE, 15 * SAMPLING_RATE) < 40


def test_a_flac_without_length_takes_the_memory_of_a_crop(tmp_path):
    path = tmp_path / "piped.flac"
    with soundfile.SoundFile(path, "w", SAMPLING_RATE, 1) as file:
        for _ in range(20):
            file.write(np.zeros(60 * SAMPLING_RATE, np.int16))  # 38 MB once decoded
    set_flac_length(path, 0)
    assert peak_of(str(path), 600 * SAMPLING_RATE, 15 * SAMPLING_RATE) < 20


@pytest.mark.parametrize("kind", ["w64", "caf", "sparse"])
def test_a_header_that_claims_2_40_frames_takes_no_memory(tmp_path, kind):
    path = tmp_path / f"a.{'w64' if kind == 'sparse' else kind}"
    soundfile.write(path, speech(32_000), SAMPLING_RATE, subtype="PCM_16")
    content = bytearray(path.read_bytes())
    at = content.index(b"data") + (4 if kind == "caf" else 16)
    content[at : at + 8] = struct.pack(">q" if kind == "caf" else "<q", 1 << 41)
    path.write_bytes(content)
    if kind == "sparse":
        try:
            os.truncate(path, 1 << 41)
        except OSError:
            pytest.skip("this file system holds no file of 2 TB")
    tracemalloc.start()
    with contextlib.suppress(AudioError):
        assert len(read_pcm(str(path), 16_000, 8_000)) == 8_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6


def plan_of(rows, starts, lengths):
    columns = (np.asarray(x, np.int64) for x in (rows, np.zeros(len(rows)), starts, lengths))
    return MicroBatchPlan(Crops(*columns), 0, 0, 1, sum(lengths), False, Cursor())


def mixed_manifest(folder: Path) -> tuple[Path, list[str], list[str]]:
    """Good and bad files in turn, with durations; the ids of the good and of the bad."""
    folder.mkdir()
    bad = {path: 3.0 for path in odd_files(folder) if "\0" not in path and "inside" not in path}
    soundfile.write(folder / "short.wav", speech(32_000), SAMPLING_RATE)
    bad[str(folder / "short.wav")] = 9.0
    originals = write_originals(folder)
    for path in originals:
        if path.suffix in (".flac", ".ogg", ".opus", ".mp3"):
            cut = path.with_name(f"cut-{path.name}")
            cut.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
            bad[str(cut)] = 3.0
    good = {str(path): 1.4 for path in originals}
    good |= {str(path): 2.0 for path in write_tones(folder / "tones", [2.0] * (len(bad) - len(good) + 2))}
    rows, ids = [], {"good": [], "bad": []}
    for number in range(max(len(good), len(bad))):
        for kind, files in (("good", good), ("bad", bad)):
            if number < len(files):
                path, seconds = list(files.items())[number]
                rows.append({"id": f"{kind}{number}", "audio": path, "duration": seconds})
                ids[kind].append(f"{kind}{number}")
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path, ids["good"], ids["bad"]


def test_a_batch_with_bad_files_is_the_batch_without_them(tmp_path):
    manifest, good, bad = mixed_manifest(tmp_path / "audio")
    table, _ = load_manifest([str(manifest)])
    framing = Framing(tiny_config(layerdrop=0.3), normalize=False)
    data = CropDataset(table, framing, seed=3)
    lengths = [20_000] * len(table)
    batch = data[plan_of(range(len(table)), [100] * len(table), lengths)]
    readable = [row for row, name in enumerate(table["id"]) if name in good]
    alone = data[plan_of(readable, [100] * len(readable), [20_000] * len(readable))]
    assert {entry["id"] for entry in batch.skipped} == set(bad) and alone.skipped == []
    assert all(entry["reason"] and entry["audio"] for entry in batch.skipped)
    for name in ("samples", "num_samples", "keys", "masked", "kept"):
        assert torch.equal(getattr(batch, name), getattr(alone, name)), name
    for ours, theirs in ((batch.rows, alone.rows), (batch.masked_rows, alone.masked_rows)):
        assert torch.equal(ours.bounds, theirs.bounds) and ours[4:] == theirs[4:]
    assert (batch.heard_samples, batch.original_samples) == (alone.heard_samples, alone.original_samples)
    assert torch.isfinite(batch.samples.float()).all()


def test_a_run_hears_all_good_files_and_lists_the_bad(tmp_path, monkeypatch):
    """The oracle: the same run where every bad file is simply missing ends with the same weights, to the bit."""
    manifest, good, bad = mixed_manifest(tmp_path / "audio")
    assert run_here(pretrain.main, *flags_for(tmp_path, manifest, tmp_path / "run")) == 0
    listed = [json.loads(line) for line in (tmp_path / "run/skipped_audio.jsonl").read_text().splitlines()]
    assert sorted(entry["id"] for entry in listed) == sorted(bad)
    assert all(entry["reason"] for entry in listed)
    metrics = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["epoch"] > 1 and metrics[-1]["skipped_audio"] == len(bad)
    assert all(np.isfinite(record["loss"]) and np.isfinite(record["grad_norm"]) for record in metrics)

    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    missing = [row | ({"audio": f"/nowhere/{row['id']}.wav"} if row["id"] in bad else {}) for row in rows]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in missing))
    assert run_here(pretrain.main, *flags_for(tmp_path, manifest, tmp_path / "other")) == 0
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "other"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
