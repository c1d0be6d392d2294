"""pretrain.py as the drills run it: on a disk that takes its time, with everything it hears written down, or without Gumbel noise.

    python benchmarks/drilled.py [--slow_disk_ms 20] [--record FOLDER] [--no_gumbel] -- arguments of pretrain.py …

Nothing of the program is replaced: with `--slow_disk_ms` each fsync, renaming and removal of a file waits before it is done, so that a
kill from outside can fall between two of them. With `--record` each rank appends a line an update to FOLDER/rank<r>.jsonl: digests of
all that an utterance is to the model (utterance and epoch, samples of its crop, mask, distractors). Gumbel noise follows the cut of an
effective batch, so runs that cut otherwise are compared without it.
"""

import argparse
import hashlib
import json
import os
import shutil  # noqa: F401  (asks for the system's functions when it is imported: before they are wrapped)
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import torch  # noqa: E402
from drill_runs import MODEL  # noqa: E402

import pretrain  # noqa: E402
from w2v2.cli import run_script  # noqa: E402
from w2v2.data.collate import FULL_SCALE, PretrainBatch  # noqa: E402
from w2v2.data.masking import distractors  # noqa: E402
from w2v2.model import objective  # noqa: E402
from w2v2.train.update import Feed  # noqa: E402

SLOW = ("fsync", "replace", "unlink", "rmdir")


def main() -> None:
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slow_disk_ms", type=float, default=0.0)
    parser.add_argument("--record", type=Path)
    parser.add_argument("--no_gumbel", action="store_true")
    args = parser.parse_args(sys.argv[1:split])
    sys.argv = ["pretrain.py", *sys.argv[split + 1 :]]
    if args.record:
        record(args.record)
    if args.no_gumbel:
        objective.gumbel_noise = torch.zeros_like
    if args.slow_disk_ms:
        for name in SLOW:
            setattr(os, name, delayed(getattr(os, name), args.slow_disk_ms / 1000))
    run_script(pretrain.main)


def delayed(function: Callable, seconds: float) -> Callable:
    def wait_first(*args, **kwargs):
        time.sleep(seconds)
        return function(*args, **kwargs)

    return wait_first


def record(folder: Path) -> None:
    """Have every feed write down, once an update has been handed out, what was in it on this rank."""
    folder.mkdir(parents=True, exist_ok=True)
    path, hand_out = folder / f"rank{os.environ.get('RANK', 0)}.jsonl", Feed.update

    def recorded(feed: Feed) -> Iterator[PretrainBatch]:
        heard: list[str] = []
        for batch in hand_out(feed):
            heard += digests(batch) if batch.weight else []
            number = batch.plan.update
            yield batch
        with path.open("a") as file:
            file.write(json.dumps({"update": number, "heard": heard}) + "\n")

    Feed.update = recorded


def digests(batch: PretrainBatch) -> list[str]:
    """One for each utterance of a micro-batch, whatever stands beside it."""
    found = []
    for row, frames in enumerate(batch.lengths):
        samples = batch.waveforms[row, : int(batch.num_samples[row])]
        samples = samples.float() / FULL_SCALE if samples.dtype == torch.int16 else samples
        key, masked = (
            batch.keys[row : row + 1],
            batch.num_masked[row : row + 1],
        )  # the key is of (seed, epoch, utterance)
        drawn = distractors(key, masked, int(masked), MODEL["num_negatives"])
        digest = hashlib.sha256()
        for tensor in (key, samples, batch.mask[row, :frames], drawn):
            digest.update(tensor.contiguous().numpy().tobytes())
        found.append(digest.hexdigest()[:20])
    return found


if __name__ == "__main__":
    main()
