"""pretrain.py as the drills run it: on a slow disk, with all that it hears written down, or without Gumbel noise.

    python benchmarks/drilled.py [--slow_disk_ms 20] [--record FOLDER] [--no_gumbel] AND arguments of pretrain.py …

Nothing of the program is replaced. With `--slow_disk_ms` each fsync, renaming and removal of a file waits before it
is done, so that a kill can fall between two of them. With `--record` each rank appends a line for each micro-batch
that it trains on to FOLDER/rank<r>.jsonl: digests of all that an utterance is to the model.
"""

import hashlib
import json
import os
import runpy
import shutil  # noqa: F401  (asks for the system's functions when it is imported: before they are wrapped)
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import ROOT, make_parser

from w2v2.data.collate import PretrainBatch, sound
from w2v2.data.masking import distractors
from w2v2.model import objective
from w2v2.model.pretraining import PretrainingModel

NUM_NEGATIVES = 20


def main() -> None:
    split = sys.argv.index("AND")  # accelerate takes a "--" away
    parser = make_parser(__doc__)
    parser.add_argument("--slow_disk_ms", type=float, default=0.0)
    parser.add_argument("--record", type=Path)
    parser.add_argument("--no_gumbel", action="store_true")
    args = parser.parse_args(sys.argv[1:split])
    if args.record:
        record(args.record)
    if args.no_gumbel:
        objective.gumbel_noise = torch.zeros_like
    if args.slow_disk_ms:
        for name in ("fsync", "replace", "unlink", "rmdir"):
            setattr(os, name, delay(getattr(os, name), args.slow_disk_ms / 1000))
    sys.argv = ["pretrain.py", *sys.argv[split + 1 :]]
    runpy.run_path(str(ROOT / "pretrain.py"), run_name="__main__")


def delay(function: Callable, seconds: float) -> Callable:
    return lambda *args, **kwargs: (time.sleep(seconds), function(*args, **kwargs))[1]


def record(folder: Path) -> None:
    """Have the model write down what it is trained on, on this rank."""
    folder.mkdir(parents=True, exist_ok=True)
    path, forward = folder / f"rank{os.environ.get('RANK', 0)}.jsonl", PretrainingModel.forward

    def recorded(model: PretrainingModel, batch: PretrainBatch, *args, **kwargs):
        if model.training:
            line = {"update": batch.plan.update, "num_rounds": batch.plan.num_rounds, "heard": digests(batch)}
            with path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        return forward(model, batch, *args, **kwargs)

    PretrainingModel.forward = recorded


def digests(batch: PretrainBatch) -> list[str]:
    """One for each utterance of a micro-batch, whatever stands beside it: of its key (seed, epoch and utterance), the
    samples of its crop, its mask and its distractors. None for a dummy.
    """
    found, slot = [], len(batch.samples) // len(batch.rows.row)
    masked = batch.masked_rows.split(batch.masked)
    for row, first in enumerate(batch.rows.first.tolist() if batch.weight else []):
        samples = sound(batch.samples[first * slot :][: int(batch.num_samples[row])])
        key, count = batch.keys[row : row + 1], batch.masked_rows.frames[row : row + 1]
        drawn = distractors(key, count, int(count), NUM_NEGATIVES)
        parts = (part.contiguous().numpy().tobytes() for part in (key, samples, masked[row] - first, drawn))
        found.append(hashlib.sha256(b"".join(parts)).hexdigest()[:20])
    return found


if __name__ == "__main__":
    main()
