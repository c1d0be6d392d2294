"""What planning costs, at up to 100 million utterances, and what the updates that it plans are like beside other ways
to batch.

    python benchmarks/plan.py [--scales 281241 10000000 100000000] [--trials 5] [--updates 580]
    python benchmarks/plan.py --rows 10000000 --format parquet    # the start of a run alone, its manifest read

The lengths are synthetic, shaped like LibriSpeech's 960 hours. Recipe of BASE: an effective batch of 1.6 h, crops of
at most 15.38 s on a grid of 0.32 s, 200 s in a micro-batch. Every time is of fresh processes, which have imported
everything and read the lengths, but not planned anything yet. Memory is the growth of the resident set in a process
of its own, lengths included, the manifest left out. The rivals are described in ways_to_batch.py.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from common import (
    LIBRISPEECH,
    environment,
    fresh_process,
    make_parser,
    median_spread,
    print_json,
    print_table,
    speech_lengths,
)
from start_up import FORMATS, measure_start, write_manifest
from ways_to_batch import (
    effective_batches,
    fixed_counts,
    measure,
    measure_size,
    packed_size,
    padded_size,
    quantile_buckets,
)

from w2v2.audio.crops import SAMPLING_RATE
from w2v2.data.batching import Cursor, EffectiveBatches, find_size, plan_update
from w2v2.data.sampling import build_batches
from w2v2.data.utterances import Utterances
from w2v2.plan.plan import make_plan
from w2v2.train.identity import identity

PAPER_CROP_SECONDS = 15.6
RECIPE = SimpleNamespace(
    batch_hours=1.6, crop_seconds=15.38, length_grid_seconds=0.32, micro_batch_seconds=200.0, seed=0, max_steps=400_000,
    warmup_steps=32_000, validation_data=["dev"], eval_split_name=None, mask_time_prob=0.65, mask_time_length=10, mask_time_min_masks=2,
    cuda_graph=False,
)  # fmt: skip
BUDGET = round(RECIPE.micro_batch_seconds * SAMPLING_RATE)
BATCH = round(RECIPE.batch_hours * 3600 * SAMPLING_RATE)
RANKS = (1, 8, 64)
SIZES = ((1, 800), (1, 200), (8, 800), (8, 200), (16, 400), (32, 200), (64, 100), (64, 90), (128, 50))  # ranks, seconds
NUM_CURSORS, NUM_UPDATES = 50, 30
SHORT = {LIBRISPEECH: "281k", 10_000_000: "10m", 100_000_000: "100m"}


# -- cost


def measure_scale(n: int, num_trials: int) -> dict:
    """`take_times` of fresh processes as medians with their spread, and `measure_memory` in bytes an utterance."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "lengths.npy")
        np.save(file, speech_lengths(n))
        *trials, memory = (run_fresh(work, file) for work in (*[take_times] * num_trials, measure_memory))
    found = {name: median_spread(trial[name] for trial in trials) for name in trials[0]}
    return found | {f"{name}_bytes": size / n for name, size in memory.items()}


def run_fresh(work: Callable[..., dict], *arguments) -> dict:
    with fresh_process() as process:
        return process.submit(work, *arguments).result()


def measure_rows(n: int, format: str, num_trials: int) -> dict[str, dict]:
    """Median and spread of what the start of a run takes with a manifest of n rows, over fresh processes."""
    with tempfile.TemporaryDirectory() as folder:
        path, small = (Path(folder, f"{name}.{format}") for name in ("many", "few"))
        write_manifest(path, n)
        write_manifest(small, n // 10)  # so that what the libraries keep for themselves is not counted
        trials = [run_fresh(measure_start, path, RECIPE, small) for _ in range(num_trials)]
    return {name: median_spread(trial[name] for trial in trials) for name in trials[0]}


def take_times(file: Path) -> dict[str, float]:
    """Of one process: the first update, then everything else that a run asks of its plan."""
    lengths, found = np.load(file), {}
    data = Utterances(None, lengths, {})
    found["first_update"] = seconds(lambda: plan_one(build_batches(data, RECIPE), Cursor(), num_ranks=8))
    found["identity"] = seconds(lambda: identity(RECIPE, data))
    batches = build_batches(data, RECIPE)
    found["make_plan"] = seconds(lambda: make_plan(data, batches, RECIPE, 8, RECIPE.micro_batch_seconds))
    # Random places, far into a run: a resume costs no more than the next update.
    rng = np.random.default_rng(0)
    cursors = rng.integers(0, (1_000, len(lengths)), (NUM_CURSORS, 2)).tolist()
    draws = [1e3 * seconds(lambda place=place: batches.draw(Cursor(*place))) for place in cursors]
    found |= {"cursor_ms": float(np.median(draws)), "cursor_ms_worst": max(draws)}
    for ranks in RANKS:
        started, cursor = time.perf_counter(), Cursor()
        for _ in range(NUM_UPDATES):
            cursor = plan_one(batches, cursor, ranks)
        found[f"update_ms_{ranks}"] = 1e3 * (time.perf_counter() - started) / NUM_UPDATES
    return found


def seconds(action: Callable) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def plan_one(batches: EffectiveBatches, cursor: Cursor, num_ranks: int) -> Cursor:
    """Draw one update and cut it; returns where the next begins."""
    crops, cursor = batches.draw(cursor)
    plan_update(crops, 0, cursor, rank=0, num_ranks=num_ranks, micro_batch_samples=BUDGET)
    return cursor


def measure_memory(file: Path) -> dict[str, int]:
    """Growth of the resident set while all is planned, at its peak and after, lengths included, in bytes. Linux alone.

    The same is done with a hundredth part first, so that what the libraries keep for themselves is not counted.
    """
    lengths = np.load(file)
    plan_run(lengths[::100].copy())
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = read_status("VmRSS") - lengths.nbytes
    held = plan_run(lengths)
    peak, steady = read_status("VmHWM") - before, read_status("VmRSS") - before
    return {"peak": peak, "steady": steady, "arrays": held.num_samples.nbytes}


def plan_run(lengths: np.ndarray) -> EffectiveBatches:
    """All that a run asks of its plan, up to an update of its eighth epoch."""
    data = Utterances(None, lengths, {})
    batches = build_batches(data, RECIPE)
    identity(RECIPE, data)
    make_plan(data, batches, RECIPE, 8, RECIPE.micro_batch_seconds)
    plan_one(batches, Cursor(7, len(lengths) // 2), num_ranks=8)
    return batches


def read_status(name: str) -> int:
    """A line of this process's status, in bytes; the peak of `getrusage` would begin at the parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


# -- quality


def compare_ways(lengths: np.ndarray, num_updates: int) -> dict[str, dict]:
    """Every way of batching on every number of ranks; the rivals crop to the same limit, without a grid."""
    cropped = np.minimum(lengths, round(RECIPE.crop_seconds * SAMPLING_RATE))
    batches = build_batches(Utterances(None, lengths, {}), RECIPE)
    found = {}
    for ranks in RANKS:
        ways = {
            "ours": effective_batches(batches, ranks, BUDGET, num_updates),
            "random padding": fixed_counts(cropped, ranks, BUDGET, BATCH, grouped=False),
            "length grouping": fixed_counts(cropped, ranks, BUDGET, BATCH, grouped=True),
            "quantile buckets": quantile_buckets(cropped, ranks, BUDGET, BATCH),
        }
        for way, steps in ways.items():
            found[f"{way}, {ranks} ranks"] = measure(steps, ranks, packed_size if way == "ours" else padded_size)
    return found


def compare_sizes(lengths: np.ndarray, num_updates: int) -> dict[str, dict]:
    """Our micro-batches in the one size that a run gives them, by ranks and seconds of a micro-batch."""
    batches, found = build_batches(Utterances(None, lengths, {}), RECIPE), {}
    for ranks, seconds in SIZES:
        steps = effective_batches(batches, ranks, seconds * SAMPLING_RATE, num_updates)
        size = find_size(batches, ranks, seconds * SAMPLING_RATE)
        found[f"{ranks} ranks, {seconds} s"] = measure_size(steps, ranks, size)
    return found


def lost_to_grid(lengths: np.ndarray) -> dict[str, float]:
    """Share of the audio lost to the grid beyond the crop limit, and to both beyond the paper's crop limit."""
    heard = build_batches(Utterances(None, lengths, {}), RECIPE).heard_samples
    limits = {"cropped_fraction": RECIPE.crop_seconds, "cropped_fraction_from_paper": PAPER_CROP_SECONDS}
    samples = {name: np.minimum(lengths, round(limit * SAMPLING_RATE)) for name, limit in limits.items()}
    return {name: 1 - heard / int(cropped.sum(dtype=np.int64)) for name, cropped in samples.items()}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--scales", type=int, nargs="+", default=list(SHORT), help="numbers of utterances")
    parser.add_argument("--trials", type=int, default=5, help="fresh processes that each time is taken in")
    parser.add_argument("--updates", type=int, default=580, help="updates measured; 580 are about an epoch of 960 h")
    parser.add_argument("--rows", type=int, help="measure the start of a run with a manifest of so many rows instead")
    parser.add_argument("--format", choices=FORMATS, default="parquet", help="of that manifest")
    args = parser.parse_args()
    if args.rows:
        found, here = measure_rows(args.rows, args.format, args.trials), environment()
        print_table([[name, *spread.values()] for name, spread in found.items()], ["", "median", "min", "max"])
        machine = f"{here['cpu']}, {here['cores']} cores"
        return print_json({"benchmark": "start_up", "machine": machine, **here, "format": args.format, **found})
    scales = {n: measure_scale(n, args.trials) for n in args.scales}
    costs = [{k: v["median"] if isinstance(v, dict) else v for k, v in found.items()} for found in scales.values()]
    print_table([[n, *cost.values()] for n, cost in zip(scales, costs, strict=True)], ["utterances", *costs[0]])

    lengths = speech_lengths(LIBRISPEECH)
    hours, lost = lengths.sum(dtype=np.int64) / SAMPLING_RATE / 3600, lost_to_grid(lengths)
    grid, both = lost.values()
    print(f"\n{len(lengths):,} utterances, {hours:.1f} h; lost to the grid {grid:.2%}, with the crop limit {both:.2%} "
          f"of what the paper's limit of {PAPER_CROP_SECONDS} s leaves\n")  # fmt: skip
    ways, here = compare_ways(lengths, args.updates), environment()
    ours = ways["ours, 8 ranks"]
    print_table([[way, *found.values()] for way, found in ways.items()], ["", *ours])
    sizes = compare_sizes(lengths, args.updates)
    print_table([[name, *one.values()] for name, one in sizes.items()], ["", *sizes["1 ranks, 800 s"]])
    print_json({
        "benchmark": "plan", "machine": f"{here['cpu']}, {here['cores']} cores", **here,
        **{f"seconds_{SHORT.get(n, n)}": found["first_update"]["median"] for n, found in scales.items()}, **lost,
        **{name: ours[name] for name in ("padded_fraction", "rank_imbalance", "alikeness", "hours_spread")},
        "rank_imbalance_64": ways["ours, 64 ranks"]["rank_imbalance"],
        "bytes_per_utterance": scales[max(scales)]["peak_bytes"],
        "scales": {SHORT.get(n, str(n)): found for n, found in scales.items()}, "ways": ways,
        "sizes": sizes,
    })  # fmt: skip


if __name__ == "__main__":
    main()
