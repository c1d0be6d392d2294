"""What the drills share: a corpus, a tiny model, runs that are watched and killed from outside, comparisons."""

import argparse
import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
import psutil
import soundfile
import yaml
from common import ROOT, make_rows, read_lines, write_lines
from drilled import NUM_NEGATIVES
from transformers import Wav2Vec2Config

from w2v2.audio.crops import SAMPLING_RATE
from w2v2.errors import UserError

MODEL = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, conv_dim=[16] * 7,
    num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2, num_codevectors_per_group=12, codevector_dim=16,
    proj_codevector_dim=16, num_negatives=NUM_NEGATIVES, layerdrop=0.3,
)  # fmt: skip
DROPOUTS = ("hidden_dropout", "activation_dropout", "attention_dropout", "feat_proj_dropout", "feat_quantizer_dropout")
RECIPE = dict(
    min_seconds=0.5, crop_seconds=2.6, batch_hours=0.004, micro_batch_seconds=8.0, max_skipped_fraction=0.2,
    warmup_steps=4, learning_rate=0.001, logging_steps=1, eval_steps=5, save_steps=4, save_total_limit=2,
    dataloader_num_workers=1, report_to=["none"], use_cpu=True, collapse_action="none",
)  # fmt: skip
TIMINGS = ("audio_seconds_per_second", "data_wait_fraction")
SYNTHETIC_HOURS = 0.07
VALIDATION_ROWS = 8
LAUNCHER = ["-m", "accelerate.commands.launch", "--config_file", ROOT / "configs/accelerate/cpu_2_processes.yaml"]


def prepare(folder: Path, flags: argparse.Namespace, **changes) -> Path:
    """A corpus and two tiny models, `noisy` and `quiet` (no dropout), in `folder`. Returns the recipe as a YAML file.

    The corpus is synthetic, or up to `SYNTHETIC_HOURS` of a manifest's. One more file can be opened but not used,
    and another is absent. Raises `UserError` for a manifest with too few rows.
    """
    rows = make_rows(folder / "audio", SYNTHETIC_HOURS, flags.manifest, flags.data_root)
    if len(rows) < 2 * VALIDATION_ROWS:
        raise UserError(f"--manifest {flags.manifest}: {len(rows)} utterances of {SYNTHETIC_HOURS} h in all are too few; "
                        f"give {2 * VALIDATION_ROWS} shorter ones at least")  # fmt: skip
    soundfile.write(folder / "damaged.wav", np.full(3 * SAMPLING_RATE, np.nan), SAMPLING_RATE, subtype="FLOAT")
    for name in ("damaged", "absent"):
        rows.append(dict(id=name, audio=str(folder / f"{name}.wav"), start=0.0, num_samples=3 * SAMPLING_RATE))
    for name, dropout in (("noisy", 0.1), ("quiet", 0.0)):
        Wav2Vec2Config(**MODEL, **dict.fromkeys(DROPOUTS, dropout)).save_pretrained(folder / name)
    train = write_lines(folder / "train.jsonl", rows[VALIDATION_ROWS:])
    values = dict(train_data=[train], validation_data=[write_lines(folder / "dev.jsonl", rows[:VALIDATION_ROWS])])
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE | values | {"config_name": str(folder / "noisy")} | changes))
    return path


class Life:
    """One run of pretrain.py, killed where its `with` block ends before it does. Its output goes to OUTPUT_DIR.log.

    It ends this program with status 1 if the run fails, or is still going at `deadline` (of `time.monotonic`).
    """

    def __init__(
        self, recipe: Path, deadline: float, output_dir: Path, *flags, drilled: Sequence = (), num_processes: int = 1
    ):
        launcher = [*LAUNCHER, "--num_processes", num_processes] if num_processes > 1 else []
        command = [sys.executable, *launcher, ROOT / "benchmarks/drilled.py", *drilled, "AND", recipe]
        command = list(map(str, [*command, "--output_dir", output_dir, *flags]))
        environment = os.environ | dict(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
        self.watch, self.log = Watch(output_dir), Path(f"{output_dir}.log")
        self.deadline, self.started = deadline, time.monotonic()
        with self.log.open("w") as log:
            options = dict(cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)
            self.process = subprocess.Popen(command, **options)

    def __enter__(self) -> "Life":
        return self

    def __exit__(self, *_) -> None:
        """SIGKILL to the process and its descendants, workers and ranks; returns when none runs any more."""
        if self.process.poll() is not None:
            return
        main = psutil.Process(self.process.pid)
        family = [main, *main.children(recursive=True)]
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for member in family:  # ranks are in groups of their own
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        self.process.wait()
        while any(map(is_alive, family)):
            time.sleep(0.002)

    def wait_until(self, happened: Callable[[], bool] = lambda: False) -> bool:
        """Wait until something has happened, or the run ended: then False."""
        while (status := self.process.poll()) is None:
            if happened():
                return True
            if time.monotonic() > self.deadline:
                self.fail("the time was up")
            time.sleep(0.002)
        if status:
            self.fail(f"pretrain.py ended with status {status}")
        return False

    def sleep(self, seconds: float) -> bool:
        """Wait for these seconds; False when the run ended before."""
        until = time.monotonic() + seconds
        return self.wait_until(lambda: time.monotonic() >= until)

    def fail(self, why: str) -> NoReturn:
        """End the drill with status 1 and what the run has printed."""
        sys.exit(f"failed        {why}:\n{self.log.read_text()[-8000:]}")


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Watch:
    """Looks into a run's folder from outside; what an earlier life left does not count until this one has begun."""

    def __init__(self, output_dir: Path):
        self.output_dir = output_dir
        self.at_start, self.saved_before = self.records(), self.checkpoints()
        self.step = self.evaluated = 0  # last update logged, and last one that a validation was logged for

    def phases(self, max_steps: int = 0) -> list[str]:
        """The phases that the run may be in, the narrowest first; `start-up` before it has written its first line."""
        if (records := self.records()) == self.at_start:
            return ["start-up"]
        self.step = max((r["step"] for r in records if "loss" in r), default=0)
        self.evaluated = max((r["step"] for r in records if "eval_loss" in r), default=0)
        names, steps = os.listdir(self.output_dir), self.checkpoints()
        has_saved = steps[-1:] > self.saved_before[-1:]
        found = {
            "rotation": any(name.startswith(".unfinished-deleted-") for name in names),
            "save": any(name.startswith(".unfinished-checkpoint-") for name in names),
            "renamed": has_saved and len(steps) > RECIPE["save_total_limit"],
            "finish": self.step == max_steps and max_steps in steps,
            "validation": self.evaluated < self.step and self.step % RECIPE["eval_steps"] == 0,
            "update": True,
        }
        return [phase for phase, is_in in found.items() if is_in]

    def records(self) -> list[dict]:
        return read_lines(self.output_dir / "metrics.jsonl")

    def checkpoints(self) -> list[int]:
        """Steps of the finished checkpoints, in rising order."""
        return sorted(int(path.name.removeprefix("checkpoint-")) for path in self.output_dir.glob("checkpoint-*"))


# -- what a run heard and left


def losses(output_dir: Path) -> list[float]:
    return [record["loss"] for record in read_lines(output_dir / "metrics.jsonl") if "loss" in record]


def left_behind(output_dir: Path, last_step: int) -> dict[str, bytes]:
    """A finished run's last checkpoint, model, metrics without timings, and list of skipped files."""
    checkpoint = output_dir / f"checkpoint-{last_step}"
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file()]
    files += [output_dir / "model.safetensors", output_dir / "skipped_audio.jsonl"]
    found = {str(path.relative_to(output_dir)): path.read_bytes() for path in files}
    records = [{k: v for k, v in r.items() if k not in TIMINGS} for r in read_lines(output_dir / "metrics.jsonl")]
    return found | {"metrics.jsonl": "".join(json.dumps(record) + "\n" for record in records).encode()}


def differing_bytes(found: dict[str, bytes], expected: dict[str, bytes]) -> dict[str, int]:
    """How many bytes of each file differ; bytes that only one side has do."""
    counts = {}
    for name in sorted(found.keys() | expected.keys()):
        pairs = itertools.zip_longest(found.get(name, b""), expected.get(name, b""))
        counts[name] = sum(ours != theirs for ours, theirs in pairs)
    return {name: count for name, count in counts.items() if count}


def heard(folder: Path, num_ranks: int = 1) -> dict[int, Counter]:
    """Update → what all ranks together heard in it, of one life; updates that a kill left incomplete are left out."""
    lines = [line for rank in range(num_ranks) for line in read_lines(folder / f"rank{rank}.jsonl")]
    updates = {line["update"]: [other for other in lines if other["update"] == line["update"]] for line in lines}
    whole = {n: own for n, own in updates.items() if len(own) == num_ranks * own[0]["num_rounds"]}
    return {n: Counter(digest for line in own for digest in line["heard"]) for n, own in whole.items()}


def changed_batches(lives: Sequence[dict[int, Counter]], expected: dict[int, Counter]) -> int:
    """Updates that some life heard otherwise than the undisturbed run, or that no life made."""
    changed = {update for life in lives for update in life if life[update] != expected.get(update)}
    return len(changed | (expected.keys() - {update for life in lives for update in life}))
