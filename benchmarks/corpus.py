"""The same utterances in several formats, in a temporary folder: what loader.py reads."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import soundfile

from w2v2.data.audio import SAMPLING_RATE, probe, read_pcm
from w2v2.data.packed import BYTES_PER_SAMPLE, parse_address, quantized
from w2v2.data.utterances import load_manifest
from w2v2.errors import UserError

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data_scripts"))

import pack_audio


def sample_manifest(manifest: str, data_root: str | None, hours: float) -> list[dict]:
    """Rows of a manifest, spread evenly over it, that hold at most about `hours` of audio."""
    table, _ = load_manifest(manifest, data_root=data_root, probe=probe)
    total = sum(table["num_samples"]) / SAMPLING_RATE / 3600
    count = max(1, min(len(table), int(len(table) * hours / total)))
    rows = table.select(np.linspace(0, len(table) - 1, count).astype(int)).to_list()
    return [{name: row[name] for name in ("id", "audio", "start", "num_samples")} for row in rows]


def synthesize(folder: Path, hours: float) -> list[dict]:
    """Rows of WAV files that compress as speech does: noise with a falling spectrum, in syllables, 2 to 20 s long."""
    rng, rows, missing = np.random.default_rng(0), [], round(hours * 3600 * SAMPLING_RATE)
    while missing > 0:
        length = int(SAMPLING_RATE * np.exp(rng.uniform(np.log(2), np.log(20))))
        spectrum = np.fft.rfft(rng.standard_normal(length))
        frequency = np.arange(len(spectrum)) / length * SAMPLING_RATE
        noise = np.fft.irfft(spectrum / (1 + (frequency / 500) ** 2), length)
        syllables = np.sin(2 * np.pi * 2 * np.arange(length) / SAMPLING_RATE + rng.uniform(0, 6)) ** 2
        speech = noise / np.abs(noise).max() * (0.3 * syllables + 0.003)
        path = folder / f"{len(rows):05d}.wav"
        soundfile.write(path, speech, SAMPLING_RATE, subtype="PCM_16")
        rows.append(dict(id=path.stem, audio=str(path), start=0.0, num_samples=length))
        missing -= length
    return rows


def make_formats(rows: list[dict], folder: Path) -> dict[str, str]:
    """Manifests of the utterances as FLAC (the files themselves, if they are), as Opus if libsndfile writes it, and packed."""
    manifests = {}
    if all(row["audio"].lower().endswith(".flac") for row in rows):
        manifests["flac"] = _write_rows(folder / "flac.jsonl", rows)
    else:
        manifests["flac"] = _copies(rows, folder, "flac", format="FLAC", subtype="PCM_16")
    if "OPUS" in soundfile.available_subtypes("OGG"):
        manifests["opus"] = _copies(rows, folder, "opus", format="OGG", subtype="OPUS")
    manifests["packed"] = str(folder / "packed")
    if pack_audio.main([manifests["flac"], "--output_dir", manifests["packed"], "--num_workers", "1"]):
        raise UserError("the audio could not be packed")
    return manifests


def _write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def _copies(rows: list[dict], folder: Path, name: str, **options) -> str:
    (folder / name).mkdir()
    copies = []
    for number, row in enumerate(rows):
        samples = read_pcm(row["audio"], round(row["start"] * SAMPLING_RATE), row["num_samples"])
        samples = samples if samples.dtype == np.int16 else quantized(samples)[0]
        path = folder / name / f"{number:06d}.{name}"
        with soundfile.SoundFile(path, "w", SAMPLING_RATE, 1, **options) as file:
            for first in range(
                0, len(samples), SAMPLING_RATE
            ):  # libsndfile's Ogg encoders overflow their stack on long blocks
                file.write(samples[first : first + SAMPLING_RATE])
        copies.append(row | {"audio": str(path), "start": 0.0})
    return _write_rows(folder / f"{name}.jsonl", copies)


def megabytes(audio: list[str]) -> float:
    """Size of the files, or of the packed samples, that these utterances are read from."""
    sizes = [
        BYTES_PER_SAMPLE * a.num_samples if (a := parse_address(path)) else os.path.getsize(path) for path in set(audio)
    ]
    return sum(sizes) / 1e6
