"""One long run, watched from outside: does anything grow? And ten thousand resumes of the sampler: does every one go on where it stood?

    python benchmarks/soak.py --minutes 60          # tiny updates, with validation, saves and rotation throughout
    python benchmarks/soak.py --resumes 10000       # the sampler alone, at LibriSpeech's size, from random places of three epochs

Of the run, every few seconds: resident memory of the main process and of its loader workers, open files, threads, bytes under the
checkpoints, bytes of logs, and the seconds of an update (from metrics.jsonl, without validation and saves). The first five minutes (or sixth
part), and all before the first rotation, are left out as warm-up; the rest is cut into 40 blocks of equal time, and a straight line is
fitted to their medians by least squares. *Flat*: with 95 % confidence a quantity changes in an hour by less than its tolerance (2 % of
its mean; one file or thread; of the files of shared memory in which batches come from the workers, one micro-batch). *Grows*: with 95 %
confidence by more. Else *open*: a longer run would tell. Logs have a line for every logged update, and are reported only. The last line is JSON; exit status 1 if something grows or a resume goes elsewhere.
"""

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

sys.path[:0] = [
    str(Path(__file__).parent),
    str(Path(__file__).parents[1]),
    str(Path(__file__).parents[1] / "data_scripts"),
]

import numpy as np  # noqa: E402
import psutil  # noqa: E402
from corpus_files import Parser, exit_status  # noqa: E402
from drill_runs import RECIPE, Failed, Life, prepare, read_lines  # noqa: E402
from report import environment, json_line, print_table  # noqa: E402
from ways_to_batch import speech_lengths  # noqa: E402

from w2v2.data.audio import SAMPLING_RATE  # noqa: E402
from w2v2.data.batching import Cursor, EffectiveBatches, MicroBatchPlan, PlanStream  # noqa: E402
from w2v2.errors import UserError  # noqa: E402

NUM_BLOCKS = 40
EVERY = dict(eval_steps=40, save_steps=40)
SETTLED = (RECIPE["save_total_limit"] + 1) * EVERY[
    "save_steps"
]  # updates after which checkpoints are as many as they stay
# What is counted, and its tolerance: a micro-batch on its way from a worker is 11 files.
COUNTED = {"open files": 1.0, "threads": 1.0, "files of batches": 11.0}
REPORTED = ("MB of logs",)  # grow as they are meant to
LIBRISPEECH = 281_241
UNINTERRUPTED = 2_000  # updates: 3.4 epochs of 960 h


# -- a run


class Trend(NamedTuple):
    """A straight line through a quantity over time."""

    mean: float
    slope: float  # an hour
    error: float  # standard error of the slope
    verdict: str


def fit(hours: np.ndarray, values: np.ndarray, tolerance: float | None = None) -> Trend:
    """Least squares over the medians of `NUM_BLOCKS` blocks of equal time; see the module's docstring for the verdict.

    Neighbouring samples are alike, blocks less so: of single samples the standard error would come out too small.
    """
    edges = np.linspace(hours[0], hours[-1], NUM_BLOCKS + 1)[1:-1]
    block = np.digitize(hours, edges)
    kept = [block == number for number in np.unique(block)]
    x, y = (np.array([np.median(column[rows]) for rows in kept]) for column in (hours, values))
    if len(x) < 3:
        raise UserError("--minutes: too few samples for a line; let it run longer")
    centred = x - x.mean()
    slope = float(centred @ y / (centred @ centred))
    residuals = y - y.mean() - slope * centred
    error = float(np.sqrt(residuals @ residuals / (len(x) - 2) / (centred @ centred)))
    allowed = 0.02 * float(y.mean()) if tolerance is None else tolerance
    verdict = "flat" if abs(slope) + 2 * error < allowed else "grows" if slope - 2 * error > allowed else "open"
    return Trend(float(y.mean()), slope, error, verdict)


def sample(life: Life, output_dir: Path) -> dict[str, float] | None:
    """What the run takes at this moment; None if it has ended."""
    try:
        main = psutil.Process(life.process.pid)
        workers = main.children(recursive=True)
        values = {
            "MB of the main process": main.memory_info().rss / 1e6,
            "MB of its workers": sum(worker.memory_info().rss for worker in workers) / 1e6,
            **open_files(main.pid),
            "threads": float(main.num_threads()),
        }
    except (psutil.NoSuchProcess, FileNotFoundError):
        return None
    folders = list(output_dir.glob("*checkpoint-*"))
    saved = sum(map(tree_bytes, folders))
    values["newest"] = max((int(path.name.rpartition("-")[2]) for path in folders), default=0)
    return values | {"MB of checkpoints": saved / 1e6, "MB of logs": tree_bytes(output_dir) / 1e6 - saved / 1e6}


def open_files(pid: int) -> dict[str, float]:
    """How many files a process has open: those that batches come in, which come and go, and the others."""
    batches = others = 0
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            is_batch = os.readlink(link).startswith(("/dev/shm/", "/memfd:"))
        except FileNotFoundError:  # closed meanwhile
            continue
        batches, others = batches + is_batch, others + (not is_batch)
    return {"open files": float(others), "files of batches": float(batches)}


def tree_bytes(folder: Path) -> int:
    """Bytes of the files under a folder from which others are being removed."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            pass
    return total


def watch(args, folder: Path) -> tuple[np.ndarray, dict[str, np.ndarray], Path]:
    """Hours since the start (n,), what was sampled then, each (n,), and the metrics of a run of `args.minutes`."""
    changes = dict(max_steps=10**9, lr_scheduler_type="constant", logging_steps=10, **EVERY)
    changes |= dict(report_to=["tensorboard"])
    recipe = prepare(folder, args.manifest, args.data_root, dataloader_num_workers=args.num_workers, **changes)
    output_dir, hours, samples = folder / "run", [], []
    end = time.monotonic() + 60 * args.minutes
    with Life(recipe, output_dir) as life:
        life.until(lambda: (output_dir / "metrics.jsonl").exists(), end)
        began = time.monotonic()
        while (now := time.monotonic()) < end and (values := sample(life, output_dir)):
            hours.append((now - began) / 3600)
            samples.append(values)
            if not life.until(lambda: time.monotonic() >= now + args.interval, end + 60):
                break
        if now < end:
            raise Failed(f"the run ended by itself:\n{life.log.read_text()[-8000:]}")
    columns = {name: np.array([values[name] for values in samples]) for name in samples[0]}
    return np.array(hours), columns, output_dir / "metrics.jsonl"


def update_seconds(metrics: Path) -> tuple[np.ndarray, np.ndarray, int]:
    """Hours of training up to each logged update and the seconds of one before it, both (n,), and the number of updates."""
    training = [record for record in read_lines(metrics) if "loss" in record]
    steps = np.array([record["step"] for record in training])
    seconds = np.array([3600 * record["batch_hours"] / record["audio_seconds_per_second"] for record in training])
    return np.cumsum(seconds * np.diff(steps, prepend=0)) / 3600, seconds, int(steps[-1])


def soak(args, folder: Path) -> dict:
    hours, columns, metrics = watch(args, folder)
    settled = hours[columns.pop("newest") >= SETTLED]
    if not len(settled):
        raise UserError(f"--minutes {args.minutes:g} did not suffice for {SETTLED} updates; let it run longer")
    warm_up = max(min(5.0, args.minutes / 6) / 60, settled[0])
    trends = {}
    for name, values in columns.items():
        later = hours > warm_up
        trends[name] = fit(hours[later], values[later], COUNTED.get(name))
    hours_of_updates, seconds, num_updates = update_seconds(metrics)
    later = hours_of_updates > warm_up
    trends["ms of an update"] = fit(hours_of_updates[later], 1000 * seconds[later])
    for name in REPORTED:
        trends[name] = trends[name]._replace(verdict="reported")
    print_table([[name, *trend] for name, trend in trends.items()], ["", "mean", "slope an hour", "± (s.e.)", ""])
    return {
        "updates": num_updates,
        "minutes": args.minutes,
        "warm_up_minutes": 60 * warm_up,
        "samples": len(hours),
        "trends": {name: trend._asdict() for name, trend in trends.items()},
        "grows": [name for name, trend in trends.items() if trend.verdict == "grows"],
    }


# -- resumes of the sampler


def same(ours: list[MicroBatchPlan], theirs: list[MicroBatchPlan]) -> bool:
    """Whether two updates are the same in every crop, piece and cursor."""
    return len(ours) == len(theirs) and all(
        a[1:] == b[1:] and all(np.array_equal(x, y) for x, y in zip(a.crops, b.crops, strict=True))
        for a, b in zip(ours, theirs, strict=True)
    )


def next_update(stream: PlanStream) -> list[MicroBatchPlan]:
    plans = iter(stream)
    first = next(plans)
    return [first, *(next(plans) for _ in range(first.num_rounds - 1))]


def resume_often(num_resumes: int, num_updates: int = UNINTERRUPTED, num_utterances: int = LIBRISPEECH) -> dict:
    """Resumes from random updates of an uninterrupted stream, on 1 and on 8 ranks; how many went on otherwise, and the time to a first plan."""
    lengths, rng = speech_lengths(num_utterances), np.random.default_rng(0)
    recipe = dict(batch_samples=round(1.6 * 3600 * SAMPLING_RATE), crop_samples=round(15.38 * SAMPLING_RATE))
    recipe |= dict(grid_samples=round(0.32 * SAMPLING_RATE), seed=0)
    cuts = [dict(rank=rank, num_ranks=n, micro_batch_samples=200 * SAMPLING_RATE) for rank, n in ((0, 1), (5, 8))]
    uninterrupted = []
    for cut in cuts:
        updates: list[list[MicroBatchPlan]] = []
        for plan in PlanStream(EffectiveBatches(lengths, **recipe), Cursor(), range(num_updates), **cut):
            if plan.update == len(updates):
                updates.append([])
            updates[-1].append(plan)
        uninterrupted.append(updates)
    different, seconds = 0, []
    for _ in range(num_resumes):
        which, update = int(rng.integers(len(cuts))), int(rng.integers(1, num_updates))
        cursor = uninterrupted[which][update - 1][0].following
        started = time.perf_counter()
        stream = PlanStream(EffectiveBatches(lengths, **recipe), cursor, range(update, num_updates), **cuts[which])
        plans = next_update(stream)
        seconds.append(time.perf_counter() - started)
        different += not same(plans, uninterrupted[which][update])
    return {
        "resumes": num_resumes,
        "different": different,
        "mean_ms": 1000 * float(np.mean(seconds)),
        "max_ms": 1000 * max(seconds),
        "updates": num_updates,
        "epochs": uninterrupted[0][-1][0].following.epoch + 1,
        "utterances": num_utterances,
    }


def run(args) -> bool:
    """Whether nothing grew and every resume went on as it must."""
    if args.minutes < 0 or args.resumes < 0 or not args.minutes + args.resumes or not args.interval > 0:
        raise UserError("give --minutes or --resumes, greater than 0")
    found = {}
    if args.resumes:
        found["resumes"] = resumed = resume_often(args.resumes)
        print(f"{resumed['resumes']:,} resumes, {resumed['different']} went on otherwise; first plan after {resumed['mean_ms']:.1f} ms on "
              f"average, {resumed['max_ms']:.1f} ms at most")  # fmt: skip
    if args.minutes:
        with tempfile.TemporaryDirectory(prefix="soak_") as folder:
            try:
                found["run"] = soak(args, Path(folder))
            except Failed as error:
                print(f"failed        {error}", flush=True)
                return False
    json_line({"benchmark": "soak", **found, **environment()})
    return not found.get("run", {}).get("grows") and not found.get("resumes", {}).get("different")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--minutes", type=float, default=0, help="of one run, start included (default: no run)")
    parser.add_argument("--resumes", type=int, default=0, help="of the sampler alone (default: %(default)s)")
    parser.add_argument("--interval", type=float, default=5, help="seconds between two samples (default: %(default)s)")
    parser.add_argument("--num_workers", type=int, default=1, help="of the loader (default: %(default)s)")
    parser.add_argument("--manifest", help="what pretrain.py takes as --train_data (default: synthesized audio)")
    parser.add_argument("--data_root", help="folder that relative audio paths and $data_root stand for")
    args = parser.parse_args(argv)
    passed = False

    def measure() -> None:
        nonlocal passed
        passed = run(args)

    return exit_status(parser.prog, measure) or int(not passed)


if __name__ == "__main__":
    sys.exit(main())
