"""One long run, watched from outside: does anything grow? And ten thousand resumes of the sampler: does every one go
on where it stood?

    python benchmarks/soak.py --minutes 60          # tiny updates, with validation, saves and rotation throughout
    python benchmarks/soak.py --resumes 10000       # the sampler alone, at LibriSpeech's size, within three epochs

Memory of the run and of its loader workers, open files, threads, bytes under the checkpoints and in logs are sampled
every few seconds, the time of an update is read from metrics.jsonl. The first five minutes (or sixth part), and all
before the first rotation, are warm-up. A line is fitted to the rest. *Flat*: with 95 % confidence a quantity changes in
an hour by less than its tolerance (2 % of its mean; what `COUNTED` says). *Grows*: with 95 % confidence by more. Else
*open*: a longer run would tell. The last line is JSON; exit status 1 if something grows or a resume goes elsewhere.
"""

import itertools
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas
import psutil
from common import LIBRISPEECH, environment, make_parser, print_json, print_table, read_lines, speech_lengths
from drill_runs import RECIPE, Life, prepare

from w2v2.audio.crops import SAMPLING_RATE
from w2v2.cli import run_script
from w2v2.data.batching import Cursor, EffectiveBatches, MicroBatchPlan, PlanStream
from w2v2.errors import UserError

NUM_BLOCKS = 40
EVERY = 40  # updates between validations, and between saves
FIRST_ROTATION = (RECIPE["save_total_limit"] + 1) * EVERY  # from this update on checkpoints are as many as they stay
# What is counted, and its tolerance: a micro-batch on its way from a worker is 11 files of shared memory.
COUNTED = {"open files": 1.0, "threads": 1.0, "files of batches": 11.0}
UNINTERRUPTED = 2_000  # updates: 3.4 epochs of 960 h


# -- a run


def fit(values: pandas.Series, tolerance: float | None = None) -> dict:
    """A line through the medians of `NUM_BLOCKS` blocks of equal time: slope an hour, its standard error, verdict.

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
    return {"mean": mean, "slope": float(slope), "error": error, "verdict": verdict}


def sample(pid: int, output_dir: Path) -> dict[str, float]:
    """What a run takes at this moment."""
    main = psutil.Process(pid)
    saved = {path.name: tree_bytes(path) for path in output_dir.glob("*checkpoint-*")}
    return {
        "MB of the main process": main.memory_info().rss / 1e6,
        "MB of its workers": sum(worker.memory_info().rss for worker in main.children(recursive=True)) / 1e6,
        **open_files(pid),
        "threads": float(main.num_threads()),
        "newest": max((int(name.rpartition("-")[2]) for name in saved), default=0),
        "MB of checkpoints": sum(saved.values()) / 1e6,
        "MB of logs": (tree_bytes(output_dir) - sum(saved.values())) / 1e6,
    }


def open_files(pid: int) -> dict[str, float]:
    """How many files a process has open: those that batches come in, which come and go, and the others."""
    targets = [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()]
    batches = sum(target.startswith(("/dev/shm/", "/memfd:")) for target in targets)
    return {"open files": float(len(targets) - batches), "files of batches": float(batches)}


def tree_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def watch(args, folder: Path) -> tuple[pandas.DataFrame, list[dict]]:
    """What was sampled of a run of `args.minutes`, by hours since its start, and its records of training."""
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
    return pandas.DataFrame(samples).set_index("hours"), [r for r in read_lines(metrics) if "loss" in r]


def soak(args, folder: Path) -> dict:
    samples, records = watch(args, folder)
    rotated = samples.index[samples.pop("newest") >= FIRST_ROTATION]
    if not len(rotated):
        raise UserError(f"--minutes {args.minutes:g} did not suffice for {FIRST_ROTATION} updates; let it run longer")
    warm_up = max(min(5.0, args.minutes / 6) / 60, rotated[0])
    updates = pandas.DataFrame(records)
    seconds = 3600 * updates["batch_hours"] / updates["audio_seconds_per_second"]
    hours = (seconds * updates["step"].diff().fillna(updates["step"])).cumsum() / 3600
    columns = {**samples, "ms of an update": pandas.Series(1000 * seconds.to_numpy(), index=hours)}
    trends = {name: fit(values[values.index > warm_up], COUNTED.get(name)) for name, values in columns.items()}
    trends["MB of logs"]["verdict"] = "reported"  # they grow as they are meant to
    print_table([[name, *t.values()] for name, t in trends.items()], ["", "mean", "slope an hour", "± (s.e.)", ""])
    grows = [name for name, trend in trends.items() if trend["verdict"] == "grows"]
    counts = {"updates": int(updates["step"].iloc[-1]), "minutes": args.minutes, "warm_up_minutes": 60 * warm_up}
    return {**counts, "samples": len(samples), "trends": trends, "grows": grows}


# -- resumes of the sampler


def is_same(ours: list[MicroBatchPlan], theirs: list[MicroBatchPlan]) -> bool:
    """Whether two updates are the same in every crop, piece and cursor."""
    return len(ours) == len(theirs) and all(
        a[1:] == b[1:] and all(map(np.array_equal, a.crops, b.crops)) for a, b in zip(ours, theirs, strict=True)
    )


def resume_often(num_resumes: int, num_updates: int = UNINTERRUPTED, num_utterances: int = LIBRISPEECH) -> dict:
    """Resumes from random updates, on 1 and on 8 ranks: how many went on otherwise, and the time to a first plan."""
    lengths, rng = speech_lengths(num_utterances), np.random.default_rng(0)
    recipe = {"batch_samples": 1.6 * 3600, "crop_samples": 15.38, "grid_samples": 0.32}
    recipe = {name: round(seconds * SAMPLING_RATE) for name, seconds in recipe.items()}
    cuts = [dict(rank=rank, num_ranks=n, micro_batch_samples=200 * SAMPLING_RATE) for rank, n in ((0, 1), (5, 8))]

    def plan(cursor: Cursor, updates: range, cut: dict) -> list[list[MicroBatchPlan]]:
        """Micro-batches by update, from a sampler made anew."""
        plans = PlanStream(EffectiveBatches(lengths, **recipe, seed=0), cursor, updates, **cut)
        return [list(own) for _, own in itertools.groupby(plans, lambda plan: plan.update)]

    uninterrupted = [plan(Cursor(), range(num_updates), cut) for cut in cuts]
    different, milliseconds = 0, []
    for _ in range(num_resumes):
        which, update = int(rng.integers(len(cuts))), int(rng.integers(1, num_updates))
        cursor, started = uninterrupted[which][update - 1][0].following, time.perf_counter()
        (plans,) = plan(cursor, range(update, update + 1), cuts[which])
        milliseconds.append(1000 * (time.perf_counter() - started))
        different += not is_same(plans, uninterrupted[which][update])
    found = {"resumes": num_resumes, "different": different}
    found |= {"mean_ms": float(np.mean(milliseconds)), "max_ms": max(milliseconds), "updates": num_updates}
    return found | {"epochs": uninterrupted[0][-1][0].following.epoch + 1, "utterances": num_utterances}


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__, reads_audio=True)
    parser.add_argument("--minutes", type=float, default=0, help="of one run, start included")
    parser.add_argument("--resumes", type=int, default=0, help="of the sampler alone")
    parser.add_argument("--interval", type=float, default=5, help="seconds between two samples")
    parser.add_argument("--num_workers", type=int, default=1, help="of the loader")
    args = parser.parse_args(argv)
    if args.minutes < 0 or args.resumes < 0 or not args.minutes + args.resumes or not args.interval > 0:
        raise UserError("give --minutes or --resumes, greater than 0")
    found = {}
    if args.resumes:
        found["resumes"] = resumed = resume_often(args.resumes)
        print("{resumes:,} resumes, {different} went on otherwise; first plan after {mean_ms:.1f} ms on average, "
              "{max_ms:.1f} ms at most".format(**resumed))  # fmt: skip
    if args.minutes:
        with tempfile.TemporaryDirectory(prefix="soak_") as folder:
            found["run"] = soak(args, Path(folder))
    print_json({"benchmark": "soak", **found, **environment()})
    sys.exit(bool(found.get("run", {}).get("grows") or found.get("resumes", {}).get("different")))


if __name__ == "__main__":
    run_script(main)
