"""What the start of a run costs with manifests of millions of rows: seconds by stage, bytes a row; of plan.py.

Private memory is what the process owns (RssAnon in Linux's status). Resident memory counts the mapped pages of
manifests besides, which all processes share and which the system takes back when it needs room.
"""

import csv
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
from common import speech_lengths
from transformers import Wav2Vec2Config

from w2v2.audio.crops import SAMPLING_RATE
from w2v2.data.batching import Cursor, plan_update
from w2v2.data.collate import Framing
from w2v2.data.sampling import build_batches
from w2v2.data.utterances import Utterances, load_utterances
from w2v2.plan.plan import make_plan
from w2v2.train.identity import hash_ids, identity

FORMATS = ("parquet", "csv")
FRAMING = Framing(Wav2Vec2Config(), normalize=False)  # BASE's
SCHEMA = pa.schema({"id": pa.string(), "audio": pa.string(), "num_samples": pa.int64(), "speaker": pa.string()})
PART = 500_000  # rows that are made at a time


def write_manifest(path: Path, n: int) -> None:
    """Rows as LibriSpeech's would be: `id`, `audio`, `num_samples` or `duration`, `speaker`; 90 bytes of text each."""
    lengths = speech_lengths(n)

    def parts() -> Iterator[pa.Table]:
        for first in range(0, n, PART):
            rows = range(first, min(n, first + PART))
            ids = [f"{row // 3000:05d}-{row // 50:07d}-{row:09d}" for row in rows]
            audio = [f"train/{row // 3000:05d}/{row // 50:07d}/{row:09d}.flac" for row in rows]
            speakers = [f"speaker{row // 3000}" for row in rows]
            yield pa.table([ids, audio, pa.array(lengths[rows], pa.int64()), speakers], schema=SCHEMA)

    if path.suffix == ".parquet":
        with pq.ParquetWriter(path, SCHEMA) as writer:
            for table in parts():
                writer.write_table(table)
        return
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "audio", "duration", "speaker"])
        for table in parts():
            columns = table.to_pydict()
            columns["num_samples"] = [f"{length / SAMPLING_RATE:.4f}" for length in columns["num_samples"]]
            writer.writerows(zip(*columns.values(), strict=True))


def start_run(path: Path, recipe: SimpleNamespace) -> tuple[dict[str, float], Utterances]:
    """Seconds of each stage from manifests to the plan of the first update; and what the run then holds."""
    output_dir = str(path.with_suffix(".run"))
    args = SimpleNamespace(**vars(recipe), output_dir=output_dir, data_root=str(path.parent), dry_run=False)
    args.min_seconds, args.max_seconds = 1.0, None
    seconds, started = {}, time.perf_counter()

    def note(stage: str) -> None:
        nonlocal started
        seconds[stage], started = time.perf_counter() - started, time.perf_counter()

    utterances, _ = load_utterances([str(path)], args, FRAMING)
    note("read")
    batches = build_batches(utterances, args)
    crops, cursor = batches.draw(Cursor())
    plan_update(crops, 0, cursor, rank=0, num_ranks=8, micro_batch_samples=round(200 * SAMPLING_RATE))
    note("first_plan")
    identity(args, utterances)
    hash_ids([str(path)], utterances.table)
    note("identity")
    make_plan(utterances, batches, args, 8, 200.0)
    note("make_plan")
    return seconds | {"rows": len(utterances.table)}, utterances


def measure_start(path: Path, recipe: SimpleNamespace, small: Path) -> dict[str, float]:
    """`start_run`, and bytes a row beyond what the process had after the start with a `small` manifest. Linux alone."""
    start_run(small, recipe)
    before, peak, done = read_memory(), [0, 0], threading.Event()

    def watch() -> None:
        while not done.wait(0.2):
            peak[:] = map(max, peak, read_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        found, held = start_run(path, recipe)
    finally:
        done.set()
        watcher.join()
    kinds, rows = ("private", "resident"), found["rows"]
    after = read_memory()
    del held
    found |= {f"{kind}_peak": (most - had) / rows for kind, most, had in zip(kinds, peak, before, strict=True)}
    return found | {f"{kind}_after": (now - had) / rows for kind, now, had in zip(kinds, after, before, strict=True)}


def read_memory() -> tuple[int, int]:
    """Private and resident bytes of this process. smaps_rollup would walk all mapped pages, and stop the reading."""
    lines = Path("/proc/self/status").read_text().splitlines()
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith(("VmRSS", "RssAnon"))}
    return sizes["RssAnon"], sizes["VmRSS"]
