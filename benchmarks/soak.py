"""One long run, watched from outside: does anything grow? And ten thousand resumes of the sampler: does every one go
on where it stood?

    python benchmarks/soak.py --minutes 60          # tiny updates, with validation, saves and rotation throughout
    python benchmarks/soak.py --resumes 10000       # the sampler alone, at LibriSpeech's size, within three epochs

Of the run, every few seconds: resident memory of the main process and of its loader workers, open files, threads,
bytes under the checkpoints, bytes of logs, and the seconds of an update (from metrics.jsonl, without validation and
saves). The first five minutes (or sixth part), and all before the first rotation, are left out as warm-up. The rest
is cut into 40 blocks of equal time, and a straight line is fitted to their medians by least squares. *Flat*: with 95
% confidence a quantity changes in an hour by less than its tolerance (2 % of its mean; one file or thread; of the
files of shared memory in which batches come from the workers, one micro-batch). *Grows*: with 95 % confidence by
more. Else *open*: a longer run would tell. Logs have a line for every logged update, and are reported only. The last
line is JSON; exit status 1 if something grows or a resume goes elsewhere.
"""

import itertools
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas
import psutil
from common import LIBRISPEECH, environment, make_parser, print_json, print_table, read_lines, speech_lengths
from drill_runs import RECIPE, Life, prepare

from w2v2.cli import run_script
from w2v2.data.audio import SAMPLING_RATE
from w2v2.data.batching import Cursor, EffectiveBatches, MicroBatchPlan, PlanStream
from w2v2.errors import UserError

NUM_BLOCKS = 40
EVERY = 40  # updates between validations, and between saves
FIRST_ROTATION = (RECIPE["save_total_limit"] + 1) * EVERY  # from this update on checkpoints are as many as they stay
# What is counted, and its tolerance: a micro-batch on its way from a worker is 11 files.
COUNTED = {"open files": 1.0, "threads": 1.0, "files of batches": 11.0}
UNINTERRUPTED = 2_000  # updates: 3.4 epochs of 960 h


# -- a run


class Trend(NamedTuple):
    """A straight line through a quantity over time."""

    mean: float
    slope: float  # an hour
    error: float  # standard error of the slope
    verdict: str


def fit(values: pandas.Series, tolerance: float | None = None) -> Trend:
    """A line through the medians of `NUM_BLOCKS` blocks of equal time; see the module's docstring for the verdict.

    `values` have hours as their index. Neighbouring samples are alike, blocks less so: of single samples the standard
    error would come out too small.
    """
    blocks = values.reset_index().groupby(pandas.cut(values.index, NUM_BLOCKS, labels=False)).median().to_numpy()
    if len(blocks) < 4:
        raise UserError("--minutes: too few samples for a line; let it run longer")
    (slope, _), covariance = np.polyfit(*blocks.T, 1, cov=True)
    mean, error = float(blocks[:, 1].mean()), float(np.sqrt(covariance[0, 0]))
    allowed = 0.02 * mean if tolerance is None else tolerance
    verdict = "flat" if abs(slope) + 2 * error < allowed else "grows" if slope - 2 * error > allowed else "open"
    return Trend(mean, float(slope), error, verdict)


def sample(pid: int, output_dir: Path) -> dict[str, float]:
    """What a run takes at this moment."""
    main = psutil.Process(pid)
    saved = {path.name: tree_bytes(path) for path in output_dir.glob("*checkpoint-*")}
    in_all = sum(saved.values())
    return {
        "MB of the main process": main.memory_info().rss / 1e6,
        "MB of its workers": sum(worker.memory_info().rss for worker in main.children(recursive=True)) / 1e6,
        **open_files(pid),
        "threads": float(main.num_threads()),
        "newest": max((int(name.rpartition("-")[2]) for name in saved), default=0),
        "MB of checkpoints": in_all / 1e6,
        "MB of logs": (tree_bytes(output_dir) - in_all) / 1e6,
    }


def open_files(pid: int) -> dict[str, float]:
    """How many files a process has open: those that batches come in, which come and go, and the others."""
    targets = [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()]
    batches = sum(target.startswith(("/dev/shm/", "/memfd:")) for target in targets)
    return {"open files": float(len(targets) - batches), "files of batches": float(batches)}


def tree_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def watch(args, folder: Path) -> tuple[pandas.DataFrame, Path]:
    """What was sampled of a run of `args.minutes`, by hours since its start, and its metrics."""
    changes = dict(max_steps=10**9, lr_scheduler_type="constant", logging_steps=10, eval_steps=EVERY, save_steps=EVERY)
    changes |= dict(report_to=["tensorboard"], dataloader_num_workers=args.num_workers)
    recipe, output_dir = prepare(folder, args, **changes), folder / "run"
    metrics, samples, end = output_dir / "metrics.jsonl", [], time.monotonic() + 60 * args.minutes
    with Life(recipe, end, output_dir) as life:
        is_going, began = life.wait_until(metrics.exists), time.monotonic()
        life.deadline += 60 + args.interval  # the last sample may be late
        while is_going and (now := time.monotonic()) < end:
            try:
                samples.append({"hours": (now - began) / 3600, **sample(life.process.pid, output_dir)})
            except (psutil.NoSuchProcess, FileNotFoundError):  # something was removed meanwhile: the next one counts
                pass
            is_going = life.sleep(args.interval)
        if not is_going:
            life.fail("the run ended by itself")
    return pandas.DataFrame(samples).set_index("hours"), metrics


def update_times(metrics: Path) -> tuple[pandas.Series, int]:
    """Milliseconds of an update by hours of training, and the last update."""
    training = pandas.DataFrame([record for record in read_lines(metrics) if "loss" in record])
    seconds = 3600 * training["batch_hours"] / training["audio_seconds_per_second"]
    hours = (seconds * training["step"].diff().fillna(training["step"])).cumsum() / 3600
    return pandas.Series(1000 * seconds.to_numpy(), index=hours), int(training["step"].iloc[-1])


def soak(args, folder: Path) -> dict:
    samples, metrics = watch(args, folder)
    rotated = samples.index[samples.pop("newest") >= FIRST_ROTATION]
    if not len(rotated):
        raise UserError(f"--minutes {args.minutes:g} did not suffice for {FIRST_ROTATION} updates; let it run longer")
    warm_up = max(min(5.0, args.minutes / 6) / 60, rotated[0])
    times, num_updates = update_times(metrics)
    columns = {**samples, "ms of an update": times}
    trends = {name: fit(values[values.index > warm_up], COUNTED.get(name)) for name, values in columns.items()}
    trends["MB of logs"] = trends["MB of logs"]._replace(verdict="reported")  # they grow as they are meant to
    print_table([[name, *trend] for name, trend in trends.items()], ["", "mean", "slope an hour", "± (s.e.)", ""])
    return {
        "updates": num_updates,
        "minutes": args.minutes,
        "warm_up_minutes": 60 * warm_up,
        "samples": len(samples),
        "trends": {name: trend._asdict() for name, trend in trends.items()},
        "grows": [name for name, trend in trends.items() if trend.verdict == "grows"],
    }


# -- resumes of the sampler


def is_same(ours: list[MicroBatchPlan], theirs: list[MicroBatchPlan]) -> bool:
    """Whether two updates are the same in every crop, piece and cursor."""
    return len(ours) == len(theirs) and all(
        a[1:] == b[1:] and all(map(np.array_equal, a.crops, b.crops)) for a, b in zip(ours, theirs, strict=True)
    )


def resume_often(num_resumes: int, num_updates: int = UNINTERRUPTED, num_utterances: int = LIBRISPEECH) -> dict:
    """Resumes from random updates, on 1 and on 8 ranks: how many went on otherwise, and the time to a first plan."""
    lengths, rng = speech_lengths(num_utterances), np.random.default_rng(0)
    recipe = dict(batch_samples=round(1.6 * 3600 * SAMPLING_RATE), crop_samples=round(15.38 * SAMPLING_RATE))
    recipe |= dict(grid_samples=round(0.32 * SAMPLING_RATE), seed=0)
    cuts = [dict(rank=rank, num_ranks=n, micro_batch_samples=200 * SAMPLING_RATE) for rank, n in ((0, 1), (5, 8))]

    def plan(cursor: Cursor, updates: range, cut: dict) -> list[list[MicroBatchPlan]]:
        """Micro-batches by update, from a sampler made anew."""
        plans = PlanStream(EffectiveBatches(lengths, **recipe), cursor, updates, **cut)
        return [list(own) for _, own in itertools.groupby(plans, lambda plan: plan.update)]

    uninterrupted = [plan(Cursor(), range(num_updates), cut) for cut in cuts]
    different, seconds = 0, []
    for _ in range(num_resumes):
        which, update = int(rng.integers(len(cuts))), int(rng.integers(1, num_updates))
        cursor = uninterrupted[which][update - 1][0].following
        started = time.perf_counter()
        (plans,) = plan(cursor, range(update, update + 1), cuts[which])
        seconds.append(time.perf_counter() - started)
        different += not is_same(plans, uninterrupted[which][update])
    return {
        "resumes": num_resumes,
        "different": different,
        "mean_ms": 1000 * float(np.mean(seconds)),
        "max_ms": 1000 * max(seconds),
        "updates": num_updates,
        "epochs": uninterrupted[0][-1][0].following.epoch + 1,
        "utterances": num_utterances,
    }


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__, reads_audio=True)
    parser.add_argument("--minutes", type=float, default=0, help="of one run, start included (default: no run)")
    parser.add_argument("--resumes", type=int, default=0, help="of the sampler alone (default: %(default)s)")
    parser.add_argument("--interval", type=float, default=5, help="seconds between two samples (default: %(default)s)")
    parser.add_argument("--num_workers", type=int, default=1, help="of the loader (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.minutes < 0 or args.resumes < 0 or not args.minutes + args.resumes or not args.interval > 0:
        raise UserError("give --minutes or --resumes, greater than 0")
    found = {}
    if args.resumes:
        found["resumes"] = resumed = resume_often(args.resumes)
        print(f"{resumed['resumes']:,} resumes, {resumed['different']} went on otherwise; first plan after "
              f"{resumed['mean_ms']:.1f} ms on average, {resumed['max_ms']:.1f} ms at most")  # fmt: skip
    if args.minutes:
        with tempfile.TemporaryDirectory(prefix="soak_") as folder:
            found["run"] = soak(args, Path(folder))
    print_json({"benchmark": "soak", **found, **environment()})
    sys.exit(bool(found.get("run", {}).get("grows") or found.get("resumes", {}).get("different")))


if __name__ == "__main__":
    run_script(main)
