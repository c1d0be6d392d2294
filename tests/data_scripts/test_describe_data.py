"""Describing a corpus: every figure against what was put there, repetitions under any codec, and no false ones."""

import json
import sys
from pathlib import Path

import describe_data
import numpy as np
import pytest
import soundfile
import soxr
from conftest import error_line
from encoding import encode
from fingerprints import count_repeated, find_repeated, take_fingerprint
from matplotlib.image import imread
from test_prepare import run

from w2v2.audio.crops import read_crop

RATE = 16_000


def speak(seed: int, seconds: float = 4.0) -> np.ndarray:
    """Harmonics of a wandering pitch under formants that change with each syllable, (S,) at 16 kHz, about −20 dBFS."""
    rng = np.random.default_rng(seed)
    syllables = np.linspace(0, seconds, round(seconds / 0.15))
    t = np.arange(round(seconds * RATE)) / RATE

    def wander(low, high):
        return np.interp(t, syllables, rng.uniform(low, high, len(syllables)))

    phase = 2 * np.pi * np.cumsum(wander(90, 160)) / RATE
    formants, loudness = [wander(300, 900), wander(900, 2_500), wander(2_300, 3_300)], wander(0, 1)
    voice = sum(
        np.sin(n * phase) * sum(np.exp(-(((n * 125 - formant) / 150) ** 2)) for formant in formants)
        for n in range(1, 28)
    )
    return (0.1 * voice * loudness / np.sqrt(np.mean((voice * loudness) ** 2))).astype(np.float32)


# -- repetitions


def through(codec: str, suffix: str, rate: int = 48_000, bit_rate: int = 32_000):
    def change(samples, folder):
        encode(folder / f"a{suffix}", soxr.resample(samples, RATE, rate), rate, codec, bit_rate=bit_rate)
        return read_crop(str(folder / f"a{suffix}"))

    return change


CHANGES = {
    "opus": through("libopus", ".ogg"),
    "mp3": through("libmp3lame", ".mp3", 44_100, 64_000),
    "telephone": lambda samples, _: soxr.resample(soxr.resample(samples, RATE, 8_000), 8_000, RATE),
    "quieter": lambda samples, _: samples / 8,
    "trimmed": lambda samples, _: samples[5_921:-3_333],
    "padded": lambda samples, _: np.pad(samples, (12_345, 6_789)),
    "excerpt": lambda samples, _: samples[20_000:46_000],
    "noisy": lambda samples, _: samples + 0.006 * np.random.default_rng(1).standard_normal(len(samples)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_same_recording_is_found(tmp_path, name):
    recordings = [speak(seed) for seed in range(6)]
    changed = [CHANGES[name](samples, tmp_path).astype(np.float32) for samples in recordings[1:4]]
    pairs = find_repeated([take_fingerprint(samples) for samples in recordings + changed])
    assert pairs == [(1, 6), (2, 7), (3, 8)]


def test_other_recordings_are_not():
    """Also not what the same voice says otherwise, silence, hum, or noise."""
    hum = np.sin(2 * np.pi * 400 * np.arange(4 * RATE) / RATE)
    others = [np.zeros(4 * RATE), np.zeros(5 * RATE), np.zeros(100), np.zeros(0)]
    others += [0.1 * np.random.default_rng(n).standard_normal(4 * RATE) + hum * (n % 2) for n in range(20)]
    recordings = [speak(seed) for seed in range(30)] + others
    assert find_repeated([take_fingerprint(samples.astype(np.float32)) for samples in recordings]) == []
    assert find_repeated([]) == []


def test_copies_are_counted_once_less_than_there_are():
    prints = [take_fingerprint(speak(seed)) for seed in [0, 1, 2, *[1] * 12, 0]]
    assert count_repeated(find_repeated(prints)) == {*range(3, 16)}
    assert count_repeated([(0, 3), (1, 2), (2, 3), (0, 1)]) == {1, 2, 3}


# -- a corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A manifest of one fault each, and of sound recordings; 24 rows."""
    folder = tmp_path_factory.mktemp("corpus")
    files, last = {f"good{n}.wav": speak(n, 3 + n / 4) for n in range(12)}, speak(50)
    files |= {"silent.wav": np.full(4 * RATE, 1e-4), "clipped.wav": np.clip(20 * speak(51), -1, 1)}
    files |= {"pause.wav": np.pad(speak(52, 2), (0, 5 * RATE)), "short.wav": speak(53, 1), "long.wav": speak(54, 9)}
    files |= {"copy.flac": files["good3.wav"], "sides.wav": np.stack([last, 0.1 * speak(55) - last], axis=1)}
    for name, samples in files.items():
        soundfile.write(folder / name, np.rint(samples * 32_767).astype(np.int16), RATE)
    encode(folder / "again.webm", soxr.resample(files["good5.wav"], RATE, 48_000), 48_000, "libopus")
    (folder / "broken.flac").write_bytes((folder / "copy.flac").read_bytes()[:9_000])
    (folder / "text.wav").write_bytes(b"this is no audio")
    lines = ["id,audio,start,duration,speaker,language"]
    for number, name in enumerate([*files, "again.webm", "broken.flac"]):
        seconds = len(files.get(name, files["good3.wav"])) / RATE if name != "again.webm" else 4.25
        lines.append(f"u{number},{name},0,{seconds},s{number % 3},{'sw' if number < 5 else 'en'}")
    lines += ["beyond,good0.wav,1,9,s0,en", "gone,text.wav,0,,s1,en", "part,long.wav,4,5,s2,en"]
    (folder / "all.csv").write_text("\n".join(lines))
    return folder


def describe(corpus, output, *flags) -> dict:
    assert run(describe_data, corpus / "all.csv", "--output_dir", output, *flags) == 0

    def refuse(word):
        raise AssertionError(word)

    return json.loads((output / "description.json").read_text(), parse_constant=refuse)


def test_every_figure_is_what_was_put_there(corpus, tmp_path, capsys):
    found = describe(corpus, tmp_path, "--max_seconds", 8)
    out = capsys.readouterr().out
    good = sum(3 + n / 4 for n in range(12))
    hours = (good + 4 + 4 + 7 + 1 + 9 + 3.75 + 4 + 4.25 + 3.75 + 9 + 5) / 3600
    assert found["utterances"] == 23 and found["hours"] == pytest.approx(hours)
    assert found["seconds"]["100%"] == 9 and found["seconds"]["0%"] == 1
    by_length = {one["from"]: one["utterances"] for one in found["histogram"]}
    assert by_length == {1: 1, 2: 6, 4: 14, 8: 2}
    assert sum(one["hours"] for one in found["histogram"]) == pytest.approx(hours)
    assert found["speaker"]["number"] == 3 and found["language"]["largest"]["sw"]["utterances"] == 5
    files = found["files"]
    assert (files["files"], files["unreadable"]) == (22, 1) and "text.wav" in files["unreadable_examples"][0]["audio"]
    assert files["rate"] == {"16000": 20, "48000": 1} and files["channels"] == {"1": 20, "2": 1}
    assert sum(files["codec"].values()) == 21 and files["codec"]["WAV PCM_16"] == 18
    left_out = {name: one["utterances"] for name, one in found["left_out"].items()}
    assert left_out == {"too_short": 1, "too_long": 2, "unreadable": 1, "unmeasured": 1}
    suspicious = {name: [one["id"] for one in kind["examples"]] for name, kind in found["sample"]["suspicious"].items()}
    assert suspicious == {
        "unreadable": ["u20", "beyond"], "silent": ["u12"], "clipped": ["u13"], "antiphase": ["u18"],
        "exact_repetition": ["u17"], "near_repetition": ["u19", "part"], "mostly_silent": ["u14"],
    }  # fmt: skip
    assert "23 utterances" in out and "near_repetition          2" in out and "such as u19" in out
    assert imread(tmp_path / "description.png").shape[0] > 1_000


def test_a_sample_is_spread_and_said(corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "librosa", None)
    found = describe(corpus, tmp_path, "--sample", 4)
    out, err = capsys.readouterr()
    assert found["sample"]["utterances"] == 4 and found["utterances"] == 23
    assert "30 s of each of 4 utterances (a repetition's chance to be among these is 17.39%)" in out
    assert "the package librosa is missing; pip install librosa" in err and "Traceback" not in err
    assert imread(tmp_path / "description.png").shape[0] < 500  # histograms alone


def test_level_and_silence_are_measured(tmp_path):
    tone = 0.1 * np.sqrt(2) * np.sin(2 * np.pi * 440 * np.arange(3 * RATE) / RATE)  # −20 dBFS for 3 s
    soundfile.write(tmp_path / "a.wav", np.concatenate([tone, np.zeros(RATE)]), RATE, subtype="FLOAT")
    row = {"audio": str(tmp_path / "a.wav"), "start": 0.0, "num_samples": 3 * RATE}
    assert describe_data.look_into(row)["level"] == pytest.approx(-20, abs=1e-3)
    assert describe_data.look_into(row | {"num_samples": 4 * RATE})["silence"] == 0.25
    assert describe_data.look_into(row | {"start": 2.5, "num_samples": RATE})["silence"] == 0.5
    assert describe_data.look_into(row | {"start": 3.0, "num_samples": RATE})["reasons"] == ["silent"]


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["all.csv", "--max_seconds", 1], "--max_seconds 1 is below --min_seconds 2"),
        (["all.tsv"], "manifest all.tsv does not exist"),
        (["all.csv", "--sample", 0], "--sample"),
    ],
)
def test_a_slip_is_one_line(corpus, capsys, monkeypatch, flags, complaint):
    monkeypatch.chdir(corpus)
    assert run(describe_data, *flags) == 2
    assert complaint in error_line(capsys.readouterr().err)
