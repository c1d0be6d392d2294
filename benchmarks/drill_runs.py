"""What the drills share: a corpus and a tiny model, runs of pretrain.py that are watched and killed from outside, and what they heard and left."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import soundfile
import yaml
from corpus import sample_manifest, synthesize
from transformers import Wav2Vec2Config

from w2v2.data.audio import SAMPLING_RATE
from w2v2.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
MODEL = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, conv_dim=[16] * 7, num_conv_pos_embeddings=16,
    num_conv_pos_embedding_groups=2, num_codevectors_per_group=12, codevector_dim=16, proj_codevector_dim=16, num_negatives=20,
    layerdrop=0.3,
)  # fmt: skip
DROPOUTS = ("hidden_dropout", "activation_dropout", "attention_dropout", "feat_proj_dropout", "feat_quantizer_dropout")
RECIPE = dict(
    min_seconds=0.5, crop_seconds=2.6, batch_hours=0.004, micro_batch_seconds=8.0, max_skipped_fraction=0.2, warmup_steps=4,
    learning_rate=0.001, logging_steps=1, eval_steps=5, save_steps=4, save_total_limit=2, dataloader_num_workers=1, report_to=["none"],
    use_cpu=True, collapse_action="none",
)  # fmt: skip
TIMINGS = ("audio_seconds_per_second", "data_wait_fraction")
SYNTHETIC_HOURS = 0.07
VALIDATION_ROWS = 8


class Failed(Exception):
    """A run did what it must not: the drill is lost."""


# -- what is run


def prepare(folder: Path, manifest: str | None = None, data_root: str | None = None, **changes) -> Path:
    """A corpus and two tiny models, `noisy` and `quiet` (no dropout), in `folder`. Returns the recipe as a YAML file.

    The corpus is synthetic, or up to `SYNTHETIC_HOURS` of a manifest's; one more file can be opened but not used, which shows only when
    it is its turn, and another is absent, which shows at each start. Raises `UserError` for a manifest with too few rows.
    """
    (folder / "audio").mkdir(parents=True)
    rows = (
        sample_manifest(manifest, data_root, SYNTHETIC_HOURS)
        if manifest
        else synthesize(folder / "audio", SYNTHETIC_HOURS)
    )
    if len(rows) < 2 * VALIDATION_ROWS:
        raise UserError(
            f"--manifest {manifest}: {len(rows)} utterances of {SYNTHETIC_HOURS} h in all are too few; give {2 * VALIDATION_ROWS} shorter ones at least"
        )
    damaged = folder / "audio/damaged.wav"
    soundfile.write(damaged, np.full(3 * SAMPLING_RATE, np.nan), SAMPLING_RATE, subtype="FLOAT")
    unusable = [
        dict(id=path.stem, audio=str(path), start=0.0, num_samples=3 * SAMPLING_RATE)
        for path in (damaged, folder / "audio/absent.wav")
    ]
    validation, training = rows[:VALIDATION_ROWS], [*rows[VALIDATION_ROWS:], *unusable]
    for name, part in (("train", training), ("dev", validation)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    for name, dropout in (("noisy", 0.1), ("quiet", 0.0)):
        Wav2Vec2Config(**MODEL, **dict.fromkeys(DROPOUTS, dropout)).save_pretrained(folder / name)
    data = dict(train_data=[str(folder / "train.jsonl")], validation_data=[str(folder / "dev.jsonl")])
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE | data | {"config_name": str(folder / "noisy")} | changes))
    return path


class Life:
    """One run of pretrain.py, from its start to its end or its killing; its output goes to a log beside `output_dir`."""

    def __init__(self, recipe: Path, output_dir: Path, *flags, drilled: Sequence = (), num_processes: int = 1):
        script = [ROOT / "benchmarks/drilled.py", *drilled, "--"] if drilled else [ROOT / "pretrain.py"]
        launcher = [
            "-m",
            "accelerate.commands.launch",
            "--config_file",
            ROOT / "configs/accelerate/cpu_2_processes.yaml",
        ]
        launcher = [*launcher, "--num_processes", num_processes] if num_processes > 1 else []
        command = [sys.executable, *launcher, *script, recipe, "--output_dir", output_dir, *flags]
        environment = os.environ | dict(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", PYTHONPATH=str(ROOT))
        self.log = Path(f"{output_dir}.log")
        self.started = time.monotonic()
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                list(map(str, command)), cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def __enter__(self) -> "Life":
        return self

    def __exit__(self, *_) -> None:
        if self.process.poll() is None:
            self.kill()

    def until(self, happened: Callable[[], bool], deadline: float, pause: float = 0.001) -> bool:
        """Wait until something has happened; False when the run ended before.

        Raises `Failed` if it ends with an error, and at `deadline` (of `time.monotonic`).
        """
        while (status := self.process.poll()) is None:
            if happened():
                return True
            if time.monotonic() > deadline:
                raise Failed(f"the time was up:\n{self.log.read_text()[-8000:]}")
            time.sleep(pause)
        if status:
            raise Failed(f"pretrain.py ended with status {status}:\n{self.log.read_text()[-8000:]}")
        return False

    def finish(self, deadline: float) -> None:
        """Wait for its end."""
        self.until(lambda: False, deadline, pause=0.05)

    def kill(self) -> None:
        """SIGKILL to its process group, loader workers included, and to ranks in groups of their own; returns when none runs any more."""
        try:
            family = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            family = []
        for kill in [lambda: os.killpg(self.process.pid, signal.SIGKILL), *(member.kill for member in family)]:
            with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
                kill()
        self.process.wait()
        while any(map(_runs, family)):
            time.sleep(0.002)


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# -- what is seen of it from outside


class Look(NamedTuple):
    """What the run's folder says of a run that has begun to train."""

    step: int  # last update logged
    evaluated: int  # last update that a validation was logged for
    checkpoints: tuple[int, ...]  # steps, in rising order
    has_saved: bool  # the newest of them is this life's
    is_saving: bool  # an unfinished checkpoint lies there
    is_removing: bool  # an old checkpoint has lost its name and still lies there


class Watch:
    """Looks into `output_dir` while a run goes on in it; what an earlier life left there does not count until this one has begun."""

    def __init__(self, output_dir: Path):
        self.output_dir, self.metrics = output_dir, output_dir / "metrics.jsonl"
        self.at_start = self.seen = self._signature()
        self.steps, self.saved_before = (0, 0), self._checkpoints() if output_dir.exists() else ()

    def look(self) -> Look | None:
        """None before the run has begun to write its metrics (it rewrites the file then)."""
        signature = self._signature()
        if signature == self.at_start:
            return None
        if signature != self.seen:
            self.seen, self.steps = signature, _last_steps(self.metrics)
        names, steps = os.listdir(self.output_dir), self._checkpoints()
        has_saved = steps[-1:] > self.saved_before[-1:]
        is_saving = any(name.startswith(".unfinished-checkpoint-") for name in names)
        is_removing = any(name.startswith(".unfinished-deleted-") for name in names)
        return Look(*self.steps, steps, has_saved, is_saving, is_removing)

    def _checkpoints(self) -> tuple[int, ...]:
        names = os.listdir(self.output_dir)
        return tuple(sorted(int(n[11:]) for n in names if n.startswith("checkpoint-") and n[11:].isdigit()))

    def _signature(self) -> tuple | None:
        try:
            status = self.metrics.stat()
        except OSError:
            return None
        return status.st_ino, status.st_size, status.st_mtime_ns


def _last_steps(metrics: Path) -> tuple[int, int]:
    steps = {"loss": 0, "eval_loss": 0}
    for record in read_lines(metrics):
        steps |= {name: record["step"] for name in steps if name in record}
    return steps["loss"], steps["eval_loss"]


def read_lines(path: Path) -> list[dict]:
    """Whole lines; what a kill cut short, or a run has not written to its end, is left out."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            pass
    return records


# -- what it heard and left


def losses(output_dir: Path) -> list[float]:
    return [record["loss"] for record in read_lines(output_dir / "metrics.jsonl") if "loss" in record]


def left_behind(output_dir: Path, last_step: int) -> dict[str, bytes]:
    """What a finished run is known by: its last checkpoint whole, its model, its metrics without timings, its list of skipped files."""
    checkpoint = output_dir / f"checkpoint-{last_step}"
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file()] + [output_dir / "model.safetensors"]
    found = {str(path.relative_to(output_dir)): path.read_bytes() for path in files}
    records = [{k: v for k, v in r.items() if k not in TIMINGS} for r in read_lines(output_dir / "metrics.jsonl")]
    found["metrics.jsonl"] = "".join(json.dumps(record) + "\n" for record in records).encode()
    found["skipped_audio.jsonl"] = (output_dir / "skipped_audio.jsonl").read_bytes()
    return found


def differing_bytes(found: dict[str, bytes], expected: dict[str, bytes]) -> dict[str, int]:
    """How many bytes of each file differ; bytes that only one side has do."""
    counts = {}
    for name in found.keys() | expected.keys():
        ours, theirs = (np.frombuffer(files.get(name, b""), np.uint8) for files in (found, expected))
        shared = min(len(ours), len(theirs))
        counts[name] = int((ours[:shared] != theirs[:shared]).sum()) + max(len(ours), len(theirs)) - shared
    return {name: count for name, count in sorted(counts.items()) if count}


def heard(folder: Path, num_ranks: int = 1) -> dict[int, Counter]:
    """Update → what all ranks together heard in it, of one life; updates that a kill left without a rank's line are left out."""
    ranks = [
        {line["update"]: line["heard"] for line in read_lines(folder / f"rank{rank}.jsonl")}
        for rank in range(num_ranks)
    ]
    whole = set.intersection(*map(set, ranks))
    return {update: Counter(digest for rank in ranks for digest in rank[update]) for update in whole}


def changed_batches(lives: Sequence[dict[int, Counter]], expected: dict[int, Counter]) -> int:
    """Updates that some life heard otherwise than the undisturbed run, or that no life made."""
    changed = {update for life in lives for update in life if life[update] != expected.get(update)}
    return len(changed | (expected.keys() - {update for life in lives for update in life}))
