"""What planning costs, at up to 100 million utterances, and what the updates that it plans are like beside other ways
to batch.

    python benchmarks/plan.py [--scales 281241 10000000 100000000] [--trials 5] [--updates 580]

The lengths are synthetic, shaped like LibriSpeech's 960 hours. Recipe of BASE: an effective batch of 1.6 h, crops of
at most 15.38 s on a grid of 0.32 s, 200 s in a micro-batch. Every time is of fresh processes, which have imported
everything and read the lengths, but not planned anything yet. Memory is the growth of the peak resident set in a
process of its own, lengths included, the manifest left out.
"""

import json
import subprocess
import sys
import tempfile
import time
from argparse import SUPPRESS
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from common import LIBRISPEECH, environment, make_parser, median_spread, print_json, print_table, speech_lengths
from ways_to_batch import effective_batches, fixed_counts, measure, quantile_buckets

from w2v2.data.audio import SAMPLING_RATE
from w2v2.data.batching import Cursor, EffectiveBatches, plan_update
from w2v2.data.utterances import Utterances
from w2v2.train.plan import build_batches, identity, make_plan

PAPER_CROP_SECONDS = 15.6
RECIPE = SimpleNamespace(
    batch_hours=1.6, crop_seconds=15.38, length_grid_seconds=0.32, micro_batch_seconds=200.0, seed=0, max_steps=400_000,
    warmup_steps=32_000, validation_data=["dev"], mask_time_prob=0.65, mask_time_length=10, mask_time_min_masks=2,
)  # fmt: skip
BUDGET = round(RECIPE.micro_batch_seconds * SAMPLING_RATE)
BATCH = round(RECIPE.batch_hours * 3600 * SAMPLING_RATE)
RANKS = (1, 8, 64)
SHORT = {LIBRISPEECH: "281k", 10_000_000: "10m", 100_000_000: "100m"}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--scales", type=int, nargs="+", default=list(SHORT), help="numbers of utterances")
    parser.add_argument("--trials", type=int, default=5, help="fresh processes that each time is taken in")
    parser.add_argument("--updates", type=int, default=580, help="updates measured; 580 are about an epoch of 960 h")
    parser.add_argument("--trial", nargs=2, metavar=("KIND", "FILE"), help=SUPPRESS)
    args = parser.parse_args()
    if args.trial:
        kind, file = args.trial
        print(json.dumps({"times": take_times, "memory": measure_memory}[kind](np.load(file))))
        return
    scales = {n: measure_scale(n, args.trials) for n in args.scales}
    lengths = speech_lengths(LIBRISPEECH)
    ways = compare_ways(lengths, args.updates)
    report(scales, lengths, ways)
    print_json(summary(scales, lengths, ways))


# -- cost


def measure_scale(n: int, num_trials: int) -> dict:
    """`take_times` of fresh processes as medians with their spread, and `measure_memory` per utterance."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "lengths.npy")
        np.save(file, speech_lengths(n))
        trials = [run_trial("times", file) for _ in range(num_trials)]
        found = {name: median_spread([trial[name] for trial in trials]) for name in trials[0]}
        return found | {f"{name}_bytes": size / n for name, size in run_trial("memory", file).items()}


def run_trial(kind: str, file: Path) -> dict:
    command = [sys.executable, __file__, "--trial", kind, str(file)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def take_times(lengths: np.ndarray) -> dict:
    """Of one process: the first update, then everything else that a run asks of its plan."""
    data, start = Utterances(None, lengths, {}), time.perf_counter()
    batches = build_batches(data, RECIPE)
    plan_one(batches, Cursor(), num_ranks=8)
    found = {"first_update": time.perf_counter() - start}
    found["identity"] = seconds(lambda: identity(RECIPE, data))
    found["make_plan"] = seconds(lambda: make_plan(data, batches, RECIPE, 8, RECIPE.micro_batch_seconds))
    # Random places, far into a run: a resume costs no more than the next update.
    rng = np.random.default_rng(0)
    cursors = [Cursor(int(rng.integers(1_000)), int(rng.integers(len(lengths)))) for _ in range(50)]
    draws = [1e3 * seconds(lambda cursor=cursor: batches.draw(cursor)) for cursor in cursors]
    found |= {"cursor_ms": float(np.median(draws)), "cursor_ms_worst": max(draws)}
    return found | {f"update_ms_{ranks}": update_ms(batches, ranks) for ranks in RANKS}


def seconds(action) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def plan_one(batches: EffectiveBatches, cursor: Cursor, num_ranks: int) -> Cursor:
    """Draw one update and cut it; returns where the next begins."""
    crops, cursor = batches.draw(cursor)
    plan_update(crops, 0, cursor, rank=0, num_ranks=num_ranks, micro_batch_samples=BUDGET)
    return cursor


def update_ms(batches: EffectiveBatches, num_ranks: int, count: int = 30) -> float:
    cursor, start = Cursor(), time.perf_counter()
    for _ in range(count):
        cursor = plan_one(batches, cursor, num_ranks)
    return 1e3 * (time.perf_counter() - start) / count


def measure_memory(lengths: np.ndarray) -> dict:
    """Growth of the resident set while everything is planned, at its peak and afterwards, in bytes (lengths
    included). Linux alone.

    The same is done with a hundredth part first, so that what the libraries need for themselves is not counted.
    """
    plan_everything(lengths[::100].copy())
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS") - lengths.nbytes
    held = plan_everything(lengths)
    return {"peak": status("VmHWM") - before, "steady": status("VmRSS") - before, "arrays": held.num_samples.nbytes}


def plan_everything(lengths: np.ndarray) -> EffectiveBatches:
    data = Utterances(None, lengths, {})
    batches = build_batches(data, RECIPE)
    identity(RECIPE, data)
    make_plan(data, batches, RECIPE, 8, RECIPE.micro_batch_seconds)
    plan_one(batches, Cursor(7, len(lengths) // 2), num_ranks=8)
    return batches


def status(name: str) -> int:
    """A line of this process's status, in bytes; the peak of `getrusage` would begin at the parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


# -- quality


def compare_ways(lengths: np.ndarray, num_updates: int) -> dict[tuple[str, int], dict]:
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
        found |= {(way, ranks): measure(steps, ranks) for way, steps in ways.items()}
    return found


def lost_to_grid(lengths: np.ndarray) -> dict[str, float]:
    """Share of the audio lost to the grid beyond the crop limit, and to both beyond the paper's crop limit."""
    heard = build_batches(Utterances(None, lengths, {}), RECIPE).heard_samples
    limits = {"cropped_fraction": RECIPE.crop_seconds, "cropped_fraction_from_paper": PAPER_CROP_SECONDS}
    samples = {name: np.minimum(lengths, round(limit * SAMPLING_RATE)) for name, limit in limits.items()}
    return {name: 1 - heard / int(cropped.sum(dtype=np.int64)) for name, cropped in samples.items()}


# -- what is printed


def report(scales: dict[int, dict], lengths: np.ndarray, ways: dict) -> None:
    medians = ["identity", "make_plan", "cursor_ms", *(f"update_ms_{ranks}" for ranks in RANKS)]
    sizes = ["peak_bytes", "steady_bytes", "arrays_bytes"]
    rows = [
        [n, *found["first_update"].values(), *(found[m]["median"] for m in medians), *(found[size] for size in sizes)]
        for n, found in scales.items()
    ]
    print_table(rows, ["utterances", "first update s", "min", "max", *medians, "peak B/utt.", "steady", "arrays"])
    hours, lost = lengths.sum(dtype=np.int64) / SAMPLING_RATE / 3600, lost_to_grid(lengths)
    grid, both = lost.values()
    print(f"\n{len(lengths):,} utterances, {hours:.1f} h; lost to the grid {grid:.2%}, with the crop limit {both:.2%} "
          f"of what the paper's limit of {PAPER_CROP_SECONDS} s leaves\n")  # fmt: skip
    names = list(next(iter(ways.values())))
    rows = [[ranks, way, *(values[name] for name in names)] for (way, ranks), values in ways.items()]
    print_table(rows, ["ranks", "way", *names])
    print("\n(definitions in ways_to_batch.py)")


def summary(scales: dict[int, dict], lengths: np.ndarray, ways: dict) -> dict:
    here = environment()
    values = {"benchmark": "plan", "machine": f"{here['cpu']}, {here['cores']} cores", **here}
    values |= {f"seconds_{SHORT.get(n, n)}": found["first_update"]["median"] for n, found in scales.items()}
    values |= lost_to_grid(lengths)
    ours = ways["ours", 8]
    values |= {name: ours[name] for name in ("padded_fraction", "rank_imbalance", "alikeness", "hours_spread")}
    values |= {"rank_imbalance_64": ways["ours", 64]["rank_imbalance"]}
    values |= {"bytes_per_utterance": scales[max(scales)]["peak_bytes"]}
    values |= {"scales": {SHORT.get(n, str(n)): found for n, found in scales.items()}}
    return values | {"ways": {f"{way}, {ranks} ranks": found for (way, ranks), found in ways.items()}}


if __name__ == "__main__":
    main()
