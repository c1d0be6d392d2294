"""Segmenting: Silero's own stretches of speech, nothing lost between cuts, every hour accounted for, the same after a kill."""

import csv
import json
import os
import re
import signal
import tarfile
import time
import tracemalloc
from pathlib import Path

import espeakng_loader
import measure_audio
import numpy as np
import pytest
import segment
import silero_vad
import soundfile
import soxr
import torch
import voice_activity
from conftest import error_line
from corpus_files import map_finished
from demo_speech import Espeak, Voice
from encoding import encode
from test_pack_resume import run_program
from test_prepare import run

from w2v2.audio.crops import read_crop
from w2v2.errors import UserError
from w2v2.manifests.manifest import read_manifests

RATE = 16_000
WORDS = "the farmer found a golden key near the river and the young teacher carried seven candles home"
SETTINGS = voice_activity.Settings(
    min_seconds=2.0, max_seconds=20.0, threshold=0.5, min_silence_seconds=0.5, pad_seconds=0.1
)


@pytest.fixture(scope="module")
def speech() -> np.ndarray:
    """About half a minute that espeak-ng speaks without a pause, (S,) float32 at 16 kHz."""
    espeak = Espeak(espeakng_loader.get_library_path(), espeakng_loader.get_data_path())
    espeak.use(Voice("s", "train", "en-us+m3", 160, 50, 50, 60.0, "0"))
    spoken = espeak.say(" and ".join([WORDS] * 5)) / np.float32(32_768)
    spoken = soxr.resample(spoken, espeak.sampling_rate, RATE)
    loud = np.flatnonzero(np.abs(spoken) > 0.01)
    return spoken[loud[0] : loud[-1] + 1]


def join(*parts) -> np.ndarray:
    """Numbers are seconds of faint noise between the parts of speech."""
    noise = np.random.default_rng(0)
    made = [p if isinstance(p, np.ndarray) else 3e-4 * noise.standard_normal(round(p * RATE)) for p in parts]
    return np.concatenate(made).astype(np.float32)


@pytest.fixture
def corpus(tmp_path, speech) -> Path:
    """A folder: one recording with stretches of 5 s, 1 s and half a minute; one of 4 s; one of noise alone."""
    folder = tmp_path / "audio"
    folder.mkdir()
    five, one, four = speech[: 5 * RATE], speech[:RATE], speech[-4 * RATE :]
    soundfile.write(folder / "long.wav", join(1.5, five, 1.0, one, 1.2, speech, 2.0), RATE)
    soundfile.write(folder / "short.flac", join(0.8, four, 0.9), RATE)
    soundfile.write(folder / "noise.wav", join(6.0), RATE)
    return folder


def cut(*argv, status=0, workers=0) -> None:
    assert run(segment, *argv, "--num_workers", workers) == status


def rows_of(path: Path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def extent(row: dict) -> tuple[int, int]:
    start = round(float(row["start"]) * RATE)
    return start, start + round(float(row["duration"]) * RATE)


def extents(path: Path, name: str = "") -> list[tuple[int, int]]:
    return [extent(row) for row in rows_of(path) if name in row["audio"]]


# -- which frames are speech


@pytest.mark.parametrize("size", [777, 5_120, 10**9])
def test_probabilities_are_the_packages_own(speech, size):
    samples = join(0.5, speech[: 7 * RATE + 77], 0.3)
    expected = silero_vad.load_silero_vad().audio_forward(torch.from_numpy(samples)[None], RATE)[0].numpy()
    blocks = [samples[at : at + size] for at in range(0, len(samples), size)]
    found, num_samples = voice_activity.load_detector().find_probabilities(blocks)
    assert num_samples == len(samples) and expected.max() > 0.9 > 0.1 > expected.min()
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_package_that_computes_otherwise_is_refused(monkeypatch):
    monkeypatch.setattr(voice_activity.SpeechDetector, "_forward", lambda self, x, state: (torch.zeros(len(x)), None))
    with pytest.raises(UserError, match="pip install silero-vad==6.2.3"):
        voice_activity.load_detector.__wrapped__()


@pytest.mark.parametrize("kind", ["wav", "flac at 44.1 kHz, two channels", "webm"])
def test_stretches_are_those_of_the_whole_file(tmp_path, speech, kind):
    samples = join(1.0, speech[: 6 * RATE], 0.8, speech[6 * RATE : 9 * RATE], 1.5, speech[: RATE // 2], 0.7)
    path = tmp_path / f"a.{kind.split()[0]}"
    if kind == "wav":
        soundfile.write(path, samples, RATE)
    elif kind == "webm":
        encode(path, soxr.resample(samples, RATE, 48_000), 48_000, "libopus")
    else:
        soundfile.write(path, np.stack([soxr.resample(samples, RATE, 44_100)] * 2, axis=1), 44_100)
    cut(path.parent, "--output", tmp_path / "s.csv", "--min_seconds", 0.01, "--max_seconds", 3600)
    options = dict(min_silence_duration_ms=500, speech_pad_ms=100)
    model = silero_vad.load_silero_vad()
    expected = silero_vad.get_speech_timestamps(torch.from_numpy(read_crop(str(path))), model, **options)
    assert extents(tmp_path / "s.csv") == [(one["start"], one["end"]) for one in expected] and len(expected) == 3


def test_speech_is_found_where_it_was_put(corpus, tmp_path, speech):
    cut(corpus, "--output", tmp_path / "s.csv")
    long, length = extents(tmp_path / "s.csv", "long"), len(speech)
    placed = [(1.5 * RATE, 6.5 * RATE), (9.7 * RATE, 9.7 * RATE + length)]
    edges = [long[0], (long[1][0], long[-1][1])]
    np.testing.assert_allclose(edges, placed, atol=0.2 * RATE)
    np.testing.assert_allclose(extents(tmp_path / "s.csv", "short"), [(0.8 * RATE, 4.8 * RATE)], atol=0.2 * RATE)
    assert not extents(tmp_path / "s.csv", "noise")


# -- where long speech is cut


@pytest.mark.parametrize("seed", range(20))
def test_long_stretches_are_cut_in_the_least_likely_frame(seed):
    rng = np.random.default_rng(seed)
    probabilities = rng.integers(50, 60, 4_000) / np.float32(60)
    least = int(rng.integers(1_000, 32_000))
    most = 2 * least + 512 + int(rng.integers(0, 300_000))
    start = int(rng.integers(0, 10_000))
    stop = start + int(rng.integers(1, 1_900_000))
    parts = list(voice_activity.cut_long(probabilities, start, stop, least, most))
    assert [part[0] for part in parts] == [start, *(part[1] for part in parts[:-1])] and parts[-1][1] == stop
    assert all(end - begin <= most for begin, end in parts)
    assert len(parts) == 1 or all(end - begin >= least for begin, end in parts)
    for begin, end in parts[:-1]:
        allowed = [f for f in range(4_000) if begin + least <= f * 512 + 256 <= min(begin + most, stop - least)]
        assert end == max(allowed, key=lambda f: (-probabilities[f], f)) * 512 + 256


def test_nothing_is_lost_or_heard_twice_between_cuts(corpus, tmp_path):
    whole, parts = tmp_path / "whole.csv", tmp_path / "parts.csv"
    cut(corpus, "--output", whole, "--max_seconds", 3600)
    cut(corpus, "--output", parts, "--max_seconds", 9)
    assert len(extents(parts)) > len(extents(whole)) + 1
    for begin, end in extents(whole, "long"):
        inside = [part for part in extents(parts, "long") if begin <= part[0] < end]
        assert inside[0][0] == begin and inside[-1][1] == end
        assert all(a[1] == b[0] for a, b in zip(inside, inside[1:], strict=False))
        assert all(2 * RATE <= b - a <= 9 * RATE for a, b in inside)


# -- rows and hours


def test_every_hour_is_kept_or_counted(corpus, tmp_path, capsys):
    (corpus / "broken.flac").write_bytes((corpus / "short.flac").read_bytes()[:20_000])
    (corpus / "text.wav").write_bytes(b"this is no audio")
    cut(corpus, "--output", tmp_path / "s.csv", "--min_seconds", 3)
    out, err = capsys.readouterr()
    names = r"[\d.]+(?= hours in| rows| kept| without| of speech| unreadable)"
    total, rows, kept, unheard, short, unreadable, unknown = map(float, re.findall(names, out))
    lengths = {path.name: soundfile.info(path).duration for path in corpus.iterdir() if path.name != "text.wav"}
    assert total == pytest.approx(sum(lengths.values()) / 3600, abs=1e-4) and (rows, unknown) == (5, 1)
    assert kept == pytest.approx(sum(b - a for a, b in extents(tmp_path / "s.csv")) / RATE / 3600, abs=1e-4)
    assert short == pytest.approx(1.2 / 3600, abs=2e-4) and unreadable == pytest.approx(5.7 / 3600, abs=1e-4)
    assert kept + unheard + short + unreadable == pytest.approx(total, abs=3e-4)
    skipped = {Path(json.loads(line)["audio"]).name for line in open(tmp_path / "s.skipped.jsonl")}
    assert skipped == {"broken.flac", "text.wav"} and "2 left out" in err


def test_rows_keep_what_holds_for_a_part(tmp_path, speech, capsys):
    """A call: one speaker on each channel, two rows a channel. What is spoken outside of the rows is not heard."""
    left, right = join(0.5, speech[: 5 * RATE], 10.0), join(8.0, speech[: 6 * RATE], 1.5)
    soundfile.write(tmp_path / "call.wav", np.stack([left, right], axis=1), RATE)
    lines = ["id,audio,start,duration,channel,speaker,label,language,text"]
    lines += [
        f"{c}{n},call.wav,{start},{seconds},{c},{c}{c},calm,sw,hello"
        for c in "AB"
        for n, start, seconds in ((1, 0, 4), (2, 7.5, 7.5))
    ]
    (tmp_path / "calls.csv").write_text("\n".join(lines))
    output = tmp_path / "lists" / "s.csv"
    cut(tmp_path / "calls.csv", "--output", output)
    assert "the column text is dropped" in capsys.readouterr().out
    first, second = rows_of(output)
    assert (first["speaker"], first["label"], first["language"], first["channel"]) == ("AA", "calm", "sw", "A")
    assert (second["speaker"], second["channel"]) == ("BB", "B") and "text" not in first
    assert first["id"] == f"A1:{extent(first)[0]}" and second["id"].startswith("B2:")
    assert extent(first)[1] <= 4 * RATE and extent(second)[0] >= 7.5 * RATE
    table = read_manifests([str(output)])[0].to_pylist()
    assert [row["channel"] for row in table] == [0, 1] and os.path.samefile(table[0]["audio"], tmp_path / "call.wav")
    heard = read_crop(table[1]["audio"], extent(second)[0], table[1]["num_samples"], channel=1)
    assert np.sqrt(np.mean(heard**2)) > 0.01


def test_channels_beyond_the_letters_are_numbers(tmp_path, speech):
    soundfile.write(tmp_path / "array.wav", np.stack([join(0.5, speech[: 4 * RATE], 0.5)] * 9, axis=1), RATE)
    (tmp_path / "array.csv").write_text("id,audio,duration,channel\na,array.wav,5,0\nb,array.wav,5,8\n")
    cut(tmp_path / "array.csv", "--output", tmp_path / "s.csv")
    assert read_manifests([str(tmp_path / "s.csv")])[0]["channel"].to_pylist() == [0, 8]


def test_members_of_a_tar_are_cut_in_place(corpus, tmp_path):
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        for path in sorted(corpus.iterdir()):
            tar.add(path, path.name)
    cut(corpus, "--output", tmp_path / "lists" / "files.csv")
    cut(tmp_path / "all.tar", "--output", tmp_path / "lists" / "tar.csv")
    in_tar, in_files = (sorted(extents(tmp_path / "lists" / name)) for name in ("tar.csv", "files.csv"))
    assert in_tar == in_files
    for row in read_manifests([str(tmp_path / "lists" / "tar.csv")])[0].to_pylist():
        heard = read_crop(row["audio"], round(row["start"] * RATE), row["num_samples"])
        assert ".tar:" in row["audio"] and np.sqrt(np.mean(heard**2)) > 0.01


def test_shards_hold_the_utterances(corpus, tmp_path):
    cut(corpus, "--output_dir", tmp_path / "packed")
    rows, packed = rows_of(tmp_path / "packed.csv"), read_manifests([str(tmp_path / "packed")])[0].to_pylist()
    assert [row["id"] for row in packed] == [row["id"] for row in rows]
    for row, old in zip(packed, rows, strict=True):
        start, stop = extent(old)
        expected = read_crop(str(tmp_path / old["audio"]), start, stop - start)
        np.testing.assert_array_equal(read_crop(row["audio"], round(row["start"] * RATE), row["num_samples"]), expected)


def test_memory_does_not_grow_with_the_recording(tmp_path):
    path = tmp_path / "long.wav"
    with soundfile.SoundFile(path, "w", 48_000, 2) as file:
        for _ in range(600):
            file.write(np.zeros((48_000, 2), np.int16))  # ten minutes: 230 MB as floats
    voice_activity.load_detector()
    tracemalloc.start()
    voice_activity.segment_recording(str(path), None, [(0, 600 * RATE)], SETTINGS)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6


# -- interruptions


def test_a_killed_run_goes_on_to_the_same_bytes(corpus, tmp_path, monkeypatch):
    cut(corpus, "--output", tmp_path / "whole.csv")
    output, log = tmp_path / "s.csv", tmp_path / "s.segmenting" / "utterances.jsonl"
    slowly = (
        "import sys, time, segment; find = segment.find_utterances\n"
        "segment.find_utterances = lambda *a, **k: (find(*a, **k), time.sleep(3))[0]; segment.main(sys.argv[1:])"
    )
    process = run_program(slowly, str(corpus), "--output", str(output), "--num_workers", "0")
    deadline = time.monotonic() + 60
    while not log.exists() or len(log.read_text().splitlines()) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not output.exists()
    with open(log, "a") as file:
        file.write('{"key": "[[')  # a line that the kill cut short
    again, find = [], segment.find_utterances
    monkeypatch.setattr(segment, "find_utterances", lambda r, **k: again.append(r.audio) or find(r, **k))
    cut(corpus, "--output", output)
    assert output.read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert sorted(Path(name).name for name in again) == ["noise.wav", "short.flac"]  # the longest was first
    # A changed recording is heard again, and the others are not.
    again.clear()
    soundfile.write(corpus / "noise.wav", join(7.0), RATE)
    cut(corpus, "--output", output)
    assert [Path(name).name for name in again] == ["noise.wav"]


def test_worker_processes_find_the_same(corpus, tmp_path):
    cut(corpus, "--output", tmp_path / "a.csv")
    cut(corpus, "--output", tmp_path / "b.csv", workers=2)
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()


@pytest.mark.parametrize("order", [["1/2", "0/2"], ["3/4", "0/4", "2/4", "1/4"], ["0/3", "2/3"]])
def test_slices_join_to_the_bytes_of_one_run(corpus, tmp_path, monkeypatch, order):
    """The last order lacks a part: the join segments what is missing."""
    (corpus / "broken.flac").write_bytes((corpus / "short.flac").read_bytes()[:20_000])
    measured, output = tmp_path / "m.parquet", tmp_path / "parts.csv"
    assert run(measure_audio, corpus, "--output", measured) == 0
    cut(measured, "--output", tmp_path / "whole.csv")
    find, heard = segment.find_utterances, []
    monkeypatch.setattr(segment, "find_utterances", lambda r, **k: heard.append(Path(r.audio).stem) or find(r, **k))
    for part in order:
        cut(measured, "--output", output, "--slice", part)
        assert not output.exists()
    cut(measured, "--output", output)
    # Only what cannot be read is tried again.
    assert sorted(name for name in heard if name != "broken") == ["long", "noise", "short"]
    for suffix in (".csv", ".skipped.jsonl"):
        assert output.with_suffix(suffix).read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()


def test_a_worker_that_dies_is_one_line():
    with pytest.raises(UserError, match="a worker process died at one of 3: run it again"):
        list(map_finished(os._exit, [3], 1))


# -- slips


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--output", "s.tsv"], "end its name in .csv"),
        ([], "give --output FILE.csv, or --output_dir FOLDER"),
        (["--output", "s.csv", "--max_seconds", 3], "--max_seconds 3 is below twice --min_seconds"),
        (["--output", "s.csv", "--threshold", 1], "--threshold"),
        (["--output", "s.csv", "--min_seconds", 20, "--max_seconds", 60], "no speech of 20 s or more"),
        (["--output", "done.csv", "--pad_seconds", 0.2], "give --overwrite, or another output"),
        (["--output_dir", "audio"], "or holds other files or a source"),
    ],
)  # fmt: skip
def test_a_slip_is_one_line(corpus, tmp_path, capsys, monkeypatch, flags, complaint):
    monkeypatch.chdir(tmp_path)
    (corpus / "long.wav").unlink()
    if "done.csv" in flags:
        cut(corpus, "--output", "done.csv")
    cut(corpus, *flags, status=2)
    assert complaint in error_line(capsys.readouterr().err)
