"""What planning costs, at up to 100 million utterances, and what the updates that it plans are like beside other ways to batch.

    python benchmarks/plan.py [--scales 281241 10000000 100000000] [--trials 5] [--updates 580]

The lengths are synthetic, shaped like LibriSpeech's 960 hours (ways_to_batch.py). Recipe of BASE: an effective batch of 1.6 h, crops of at
most 15.38 s on a grid of 0.32 s, 200 s in a micro-batch. Every time is of fresh processes, which have imported everything and read the
lengths, but not planned anything yet; memory is the growth of the peak resident set in a process of its own, lengths included. The
manifest is no part of it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from report import environment, json_line, median_spread, print_table
from ways_to_batch import effective_batches, fixed_counts, measure, quantile_buckets, speech_lengths

from w2v2.data.audio import SAMPLING_RATE
from w2v2.data.batching import Cursor, EffectiveBatches, plan_update
from w2v2.data.utterances import Utterances
from w2v2.train.plan import build_batches, identity, make_plan

LIBRISPEECH = 281_241
PAPER_CROP_SECONDS = 15.6
RECIPE = SimpleNamespace(
    batch_hours=1.6, crop_seconds=15.38, length_grid_seconds=0.32, micro_batch_seconds=200.0, seed=0, max_steps=400_000,
    warmup_steps=32_000, validation_data=["dev"], mask_time_prob=0.65, mask_time_length=10, mask_time_min_masks=2,
)  # fmt: skip
BUDGET = round(RECIPE.micro_batch_seconds * SAMPLING_RATE)
BATCH = round(RECIPE.batch_hours * 3600 * SAMPLING_RATE)
RANKS = (1, 8, 64)
NUM_CURSORS = 50
SHORT = {281_241: "281k", 10_000_000: "10m", 100_000_000: "100m"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scales", type=int, nargs="+", default=list(SHORT), help="numbers of utterances")
    parser.add_argument("--trials", type=int, default=5, help="fresh processes that each time is taken in")
    parser.add_argument("--updates", type=int, default=580, help="updates measured; 580 are about an epoch of 960 h")
    parser.add_argument("--trial", nargs=2, metavar=("KIND", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.trial:
        kind, file = args.trial
        print(json.dumps({"times": times, "memory": memory}[kind](file)))
        return
    scales = {n: measure_scale(n, args.trials) for n in args.scales}
    lengths = speech_lengths(LIBRISPEECH)
    ways = compare(lengths, args.updates)
    report(scales, lengths, ways)
    json_line(summary(scales, lengths, ways))


# -- cost


def times(file: str) -> dict:
    """Of one process: the first update, then everything else that a run asks of its plan before and during training."""
    lengths = np.load(file)
    start = time.perf_counter()
    batches = build_batches(Utterances(None, lengths, {}), RECIPE)
    crops, cursor = batches.draw(Cursor())
    plan_update(crops, 0, cursor, rank=0, num_ranks=8, micro_batch_samples=BUDGET)
    first = time.perf_counter() - start
    found = {"first_update": first, "identity": 0.0, "make_plan": 0.0}
    data = Utterances(None, lengths, {})
    for name, call in (("identity", identity), ("make_plan", lambda *_: make_plan(data, batches, RECIPE, 8))):
        start = time.perf_counter()
        call(RECIPE, data)
        found[name] = time.perf_counter() - start
    rng, cursors = np.random.default_rng(0), []
    for epoch, position in zip(
        rng.integers(0, 1_000, NUM_CURSORS), rng.integers(0, len(lengths), NUM_CURSORS), strict=True
    ):
        start = time.perf_counter()
        batches.draw(Cursor(int(epoch), int(position)))
        cursors.append(1e3 * (time.perf_counter() - start))
    found |= {"cursor_ms": float(np.median(cursors)), "cursor_ms_worst": max(cursors)}
    return found | {f"update_ms_{ranks}": update_ms(batches, ranks) for ranks in RANKS}


def update_ms(batches: EffectiveBatches, num_ranks: int, count: int = 30) -> float:
    cursor, start = Cursor(), time.perf_counter()
    for update in range(count):
        crops, cursor = batches.draw(cursor)
        plan_update(crops, update, cursor, rank=0, num_ranks=num_ranks, micro_batch_samples=BUDGET)
    return 1e3 * (time.perf_counter() - start) / count


def memory(file: str) -> dict:
    """Growth of the resident set while the lengths are read and everything is planned, at its peak and afterwards, in bytes.

    The same is done with a hundredth part first, so that what the libraries need for themselves is not counted. Linux alone.
    """
    plan_everything(np.load(file)[::100].copy())
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    held = plan_everything(np.load(file))
    return {"peak": status("VmHWM") - before, "steady": status("VmRSS") - before, "arrays": held.num_samples.nbytes}


def plan_everything(lengths: np.ndarray) -> EffectiveBatches:
    data = Utterances(None, lengths, {})
    batches = build_batches(data, RECIPE)
    identity(RECIPE, data)
    make_plan(data, batches, RECIPE, 8)
    crops, cursor = batches.draw(Cursor(7, len(lengths) // 2))
    plan_update(crops, 0, cursor, rank=0, num_ranks=8, micro_batch_samples=BUDGET)
    return batches


def status(name: str) -> int:
    """A line of this process's status, in bytes; its peak by `getrusage` would begin at that of the process which started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def measure_scale(n: int, num_trials: int) -> dict:
    """`times` of fresh processes as medians with their spread, and `memory` per utterance."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "lengths.npy")
        np.save(file, speech_lengths(n))
        trials = [run_trial("times", file) for _ in range(num_trials)]
        found = {name: median_spread([trial[name] for trial in trials]) for name in trials[0]}
        return found | {f"{name}_bytes": size / n for name, size in run_trial("memory", file).items()}


def run_trial(kind: str, file: Path) -> dict:
    command = [sys.executable, __file__, "--trial", kind, str(file)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


# -- quality


def compare(lengths: np.ndarray, num_updates: int) -> dict[tuple[str, int], dict]:
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


def lost_to_the_grid(lengths: np.ndarray) -> dict[str, float]:
    """Share of the audio that the grid takes beyond the crop limit, and what both take beyond the paper's crop limit."""
    batches = build_batches(Utterances(None, lengths, {}), RECIPE)
    limits = {
        "cropped_fraction": round(RECIPE.crop_seconds * SAMPLING_RATE),
        "cropped_fraction_from_paper": round(PAPER_CROP_SECONDS * SAMPLING_RATE),
    }
    heard = batches.heard_samples
    return {name: 1 - heard / int(np.minimum(lengths, limit).sum(dtype=np.int64)) for name, limit in limits.items()}


# -- what is printed


def report(scales: dict[int, dict], lengths: np.ndarray, ways: dict) -> None:
    rows = []
    for n, found in scales.items():
        first = found["first_update"]
        update = [found[f"update_ms_{ranks}"]["median"] for ranks in RANKS]
        rows.append(
            [n, first["median"], first["min"], first["max"], found["identity"]["median"], found["make_plan"]["median"]]
        )
        rows[-1] += [found["cursor_ms"]["median"], found["cursor_ms_worst"]["max"], *update]
        rows[-1] += [found["peak_bytes"], found["steady_bytes"], found["arrays_bytes"]]
    headers = ["utterances", "first update s", "min", "max", "identity s", "make_plan s", "cursor ms", "worst"]
    headers += [f"update ms {ranks} ranks" for ranks in RANKS]
    print_table(rows, [*headers, "peak B/utt.", "steady", "arrays"])
    seconds = lengths / SAMPLING_RATE
    print(f"\n{len(lengths):,} utterances, {seconds.sum() / 3600:.1f} h, {seconds.min():.1f} to {seconds.max():.1f} s, mean "
          f"{seconds.mean():.2f} s, {((seconds > 11) & (seconds < 17)).mean():.0%} between 11 and 17 s")  # fmt: skip
    lost = lost_to_the_grid(lengths)
    print(f"lost to the grid: {lost['cropped_fraction']:.2%} beyond the crop limit of {RECIPE.crop_seconds} s; grid and limit: "
          f"{lost['cropped_fraction_from_paper']:.2%} beyond the paper's limit of {PAPER_CROP_SECONDS} s\n")  # fmt: skip
    names = list(next(iter(ways.values())))
    print_table([[ranks, way, *(values[name] for name in names)] for (way, ranks), values in ways.items()],
                ["ranks", "way", *names])  # fmt: skip
    print("\n(rank_imbalance: idle share of device time, ranks meeting once an update; alikeness: 1 is a random draw; definitions in "
          "ways_to_batch.py)")  # fmt: skip


def summary(scales: dict[int, dict], lengths: np.ndarray, ways: dict) -> dict:
    here = environment()
    values = {"benchmark": "plan", "machine": f"{here['cpu']}, {here['cores']} cores", **here}
    for n, found in scales.items():
        values[f"seconds_{SHORT.get(n, n)}"] = found["first_update"]["median"]
    values |= lost_to_the_grid(lengths)
    ours = ways["ours", 8]
    values |= {name: ours[name] for name in ("padded_fraction", "rank_imbalance", "alikeness", "hours_spread")}
    values |= {"rank_imbalance_64": ways["ours", 64]["rank_imbalance"]}
    values |= {"bytes_per_utterance": scales[max(scales)]["peak_bytes"]}
    values |= {"scales": {SHORT.get(n, str(n)): found for n, found in scales.items()}}
    return values | {"ways": {f"{way}, {ranks} ranks": found for (way, ranks), found in ways.items()}}


if __name__ == "__main__":
    main()
