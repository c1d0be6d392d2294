"""What the benchmarks share: speech that is made up or sampled, where a number was measured, how it is printed."""

import argparse
import io
import json
import multiprocessing
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import av
import numpy as np
import pandas
import pyarrow
import pyarrow.parquet
import soundfile
import torch

from w2v2.audio.crops import SAMPLING_RATE, read_pcm
from w2v2.errors import Parser
from w2v2.manifests.manifest import read_manifests

ROOT = Path(__file__).resolve().parents[1]
LIBRISPEECH = 281_241  # utterances of its 960 hours
PACKAGES = ("numpy", "torch", "transformers", "accelerate", "datasets", "pyarrow", "soundfile")


def make_parser(description: str, reads_audio: bool = False) -> argparse.ArgumentParser:
    """The parser of a benchmark; `reads_audio`: with flags for a manifest."""
    parser = argparse.ArgumentParser(description=description, formatter_class=Parser.Help)
    if reads_audio:
        parser.add_argument("--manifest", help="what pretrain.py takes as --train_data; None: synthesized audio")
        parser.add_argument("--data_root", help="folder that relative audio paths and $data_root stand for")
    return parser


def fresh_process(start: Callable | None = None, *args) -> ProcessPoolExecutor:
    """One new process, which calls `start` first. Its threads sleep where they wait: its CPU-seconds are work."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), start, args)


# -- speech


def speech_lengths(n: int, seed: int = 0) -> np.ndarray:
    """(n,) int32 lengths in samples, shaped like LibriSpeech's 960 hours: mean 12.3 s, seven in ten of 11 to 17 s.

    A mixture: 69.85 % normal (14.6 ± 1.15 s, none above 17), 30.05 % triangular (0.8 to 14 s, most frequent at 6),
    and 0.1 % from 17 s up with an exponential tail (3 s) to 35 s. A million are made at a time.
    """
    rng, lengths = np.random.default_rng(seed), np.empty(n, np.int32)
    for first in range(0, n, 1_000_000):
        size = min(1_000_000, n - first)
        kind = rng.random(size)
        body, short = np.minimum(rng.normal(14.6, 1.15, size), 17), rng.triangular(0.8, 6, 14, size)
        seconds = np.select([kind < 0.6985, kind < 0.999], [body, short], 17 + rng.exponential(3, size))
        lengths[first : first + size] = seconds.clip(0.8, 35) * SAMPLING_RATE
    return lengths


def make_rows(folder: Path, hours: float, manifests: str | Sequence[str] | None, data_root: str | None) -> list[dict]:
    """Rows for about `hours` of speech: spread evenly over manifests, or made up as WAV files in `folder`."""
    if manifests is None:
        return synthesize(folder, hours)
    manifests = [manifests] if isinstance(manifests, str) else manifests
    table, left_out, _ = read_manifests(manifests, data_root=data_root)
    if left_out:
        print(f"{len(left_out)} files are left out, the first: {left_out[0]['audio']}: {left_out[0]['reason']}")
    table = table.select(["id", "audio", "start", "num_samples"])
    share = hours * 3600 * SAMPLING_RATE / table["num_samples"].to_numpy().sum()
    count = max(1, min(len(table), int(len(table) * share)))
    return table.take(np.linspace(0, len(table) - 1, count).astype(int)).to_pylist()


def synthesize(folder: Path, hours: float) -> list[dict]:
    """WAV files that compress as speech does: noise with a falling spectrum, in syllables, 2 to 20 s long."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, rows, missing = np.random.default_rng(0), [], round(hours * 3600 * SAMPLING_RATE)
    while missing > 0:
        length = int(SAMPLING_RATE * np.exp(rng.uniform(np.log(2), np.log(20))))
        spectrum = np.fft.rfft(rng.standard_normal(length))
        frequency = np.arange(len(spectrum)) / length * SAMPLING_RATE
        noise = np.fft.irfft(spectrum / (1 + (frequency / 500) ** 2), length)
        syllables = np.sin(2 * np.pi * 2 * np.arange(length) / SAMPLING_RATE + rng.uniform(0, 6)) ** 2
        path = folder / f"{len(rows):05d}.wav"
        samples = noise / np.abs(noise).max() * (0.3 * syllables + 0.003)
        soundfile.write(path, samples, SAMPLING_RATE, subtype="PCM_16")
        rows.append(dict(id=path.stem, audio=str(path), start=0.0, num_samples=length))
        missing -= length
    return rows


def write_lines(path: Path, rows: Iterable[dict]) -> str:
    """A file of JSON lines, which serves as a manifest; returns its path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read_lines(path: Path) -> list[dict]:
    """The whole lines of a file of JSON lines; a line that a kill cut short is left out."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def write_files(rows: list[dict], folder: Path, suffix: str, codec: str | None) -> str:
    """A manifest of the utterances as files with this suffix: the files themselves, if they are.

    `codec` is that of FFmpeg, None for the 16 bits of libsndfile's formats.
    """
    copies = []
    for number, row in enumerate(rows):
        if not row["audio"].lower().endswith(suffix):
            path = str(folder / f"{number:06d}{suffix}")
            samples = read_pcm(row["audio"], round(row["start"] * SAMPLING_RATE), row["num_samples"])
            if codec:
                encode(path, samples, codec)
            else:
                soundfile.write(path, samples, SAMPLING_RATE, subtype="PCM_16")
            row = row | dict(audio=path, start=0.0)
        copies.append(row)
    return write_lines(folder / f"{suffix[1:]}.jsonl", copies)


def encode(path: str, samples: np.ndarray, codec: str) -> None:
    """Write samples, (S,) int16 or float32, with an encoder of FFmpeg at its default quality."""
    frame = av.AudioFrame.from_ndarray(samples[None], "s16" if samples.dtype == np.int16 else "flt", "mono")
    frame.sample_rate = SAMPLING_RATE
    with av.open(path, "w") as out:
        stream = out.add_stream(codec, rate=SAMPLING_RATE, layout="mono")
        out.start_encoding()
        context = stream.codec_context
        pieces = av.AudioResampler(context.format, "mono", SAMPLING_RATE, frame_size=context.frame_size)
        for piece in (*pieces.resample(frame), *pieces.resample(None), None):
            out.mux(stream.encode(piece))


def pack(rows: list[dict], folder: Path) -> str:
    """A folder of the same utterances, packed by `pack_audio.py`."""
    source, packed = write_lines(folder / "source.jsonl", rows), str(folder / "packed")
    command = [sys.executable, ROOT / "data_scripts/pack_audio.py", source, "--output_dir", packed]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return packed


def write_shards(rows: list[dict], folder: Path, form: str, per_shard: int = 64) -> str:
    """A folder of tars, or of Parquet files, with the same utterances as 16-bit WAV files."""
    folder.mkdir(parents=True)
    for first in range(0, len(rows), per_shard):
        files = []
        for number, row in enumerate(rows[first : first + per_shard], start=first):
            samples, file = (
                read_pcm(row["audio"], round(row["start"] * SAMPLING_RATE), row["num_samples"]),
                io.BytesIO(),
            )
            soundfile.write(file, samples, SAMPLING_RATE, subtype="PCM_16", format="WAV")
            files.append((f"{number:06d}.wav", file.getvalue()))
        path = folder / f"shard-{first // per_shard:05d}.{form}"
        if form == "parquet":
            audio = [{"bytes": content, "path": name} for name, content in files]
            pyarrow.parquet.write_table(pyarrow.table({"audio": audio}), path)
            continue
        with tarfile.open(path, "w") as tar:
            for name, content in files:
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return str(folder)


# -- numbers


def environment(*further_packages: str) -> dict:
    """Everything that a number needs beside it to be repeated: date, command, processor, threads, GPU, versions."""
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text(errors="replace").splitlines() if cpu_info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([os.path.basename(sys.executable), *sys.argv]),
        "platform": platform.platform(),
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in (*PACKAGES, *further_packages)},
    }


def median_spread(values: Iterable[float]) -> dict[str, float]:
    """Median, smallest and largest of repeated measurements."""
    values = [float(value) for value in values]
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def print_table(rows: Iterable[Sequence], headers: Sequence[str]) -> None:
    """Columns as wide as they need, numbers with four significant digits."""
    table = pandas.DataFrame(list(rows), columns=list(headers))
    print(table.to_string(index=False, float_format=lambda x: f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.4g}"))


def print_json(values: dict) -> None:
    """One line on standard output for programs; benchmarks print it last."""
    print(json.dumps(values, ensure_ascii=False, allow_nan=False), flush=True)
