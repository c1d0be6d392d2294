"""What planning costs, at up to 100 million utterances, and what the updates that it plans are like beside other ways
to batch.

    python benchmarks/plan.py [--scales 281241 10000000 100000000] [--trials 5] [--updates 580]

The lengths are synthetic, shaped like LibriSpeech's 960 hours. Recipe of BASE: an effective batch of 1.6 h, crops of
at most 15.38 s on a grid of 0.32 s, 200 s in a micro-batch. Every time is of fresh processes, which have imported
everything and read the lengths, but not planned anything yet. Memory is what Python and NumPy have allocated, lengths
included, the manifest left out.

The rivals take a fixed number of utterances to a micro-batch, with the settings that bring an update to the same
hours. *Random padding* takes them in shuffled order. *Length grouping* does as `group_by_length` of transformers:
shuffled utterances are cut into megabatches of 50 times the rows of a device's update, each sorted by length.
"""

import math
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas
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

from w2v2.data.audio import SAMPLING_RATE
from w2v2.data.batching import Cursor, EffectiveBatches, plan_update
from w2v2.data.cutting import cut, deal, padded_sizes
from w2v2.data.utterances import Utterances
from w2v2.train.plan import build_batches, identity, make_plan

PAPER_CROP_SECONDS = 15.6
RECIPE = SimpleNamespace(
    batch_hours=1.6, crop_seconds=15.38, length_grid_seconds=0.32, micro_batch_seconds=200.0, seed=0, max_steps=400_000,
    warmup_steps=32_000, validation_data=["dev"], mask_time_prob=0.65, mask_time_length=10, mask_time_min_masks=2,
)  # fmt: skip
BUDGET = round(RECIPE.micro_batch_seconds * SAMPLING_RATE)
BATCH = round(RECIPE.batch_hours * 3600 * SAMPLING_RATE)
MEGABATCH = 50  # in updates
Step = list[np.ndarray]
RANKS = (1, 8, 64)
SHORT = {LIBRISPEECH: "281k", 10_000_000: "10m", 100_000_000: "100m"}


# -- cost


def measure_scale(n: int, num_trials: int) -> dict:
    """Seconds to the first update of fresh processes as median with spread, and bytes an utterance."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "lengths.npy")
        np.save(file, speech_lengths(n))
        trials = [run_fresh(time_first_update, file) for _ in range(num_trials)]
        return {"first_update": median_spread(trials), "peak_bytes": run_fresh(measure_memory, file) / n}


def run_fresh(measurement: Callable[[Path], float], file: Path) -> float:
    with fresh_process() as process:
        return process.submit(measurement, file).result()


def time_first_update(file: Path) -> float:
    lengths = np.load(file)
    start = time.perf_counter()
    plan_first_update(lengths)
    return time.perf_counter() - start


def measure_memory(file: Path) -> int:
    """Bytes allocated at the peak of all that a run asks of its plan, lengths included."""
    plan_run(np.load(file)[::100].copy())  # what the libraries keep for themselves is not counted
    tracemalloc.start()
    plan_run(np.load(file))
    return tracemalloc.get_traced_memory()[1]


def plan_first_update(lengths: np.ndarray) -> EffectiveBatches:
    batches = build_batches(Utterances(None, lengths, {}), RECIPE)
    crops, cursor = batches.draw(Cursor())
    plan_update(crops, 0, cursor, rank=0, num_ranks=8, micro_batch_samples=BUDGET)
    return batches


def plan_run(lengths: np.ndarray) -> None:
    data, batches = Utterances(None, lengths, {}), plan_first_update(lengths)
    identity(RECIPE, data)
    make_plan(data, batches, RECIPE, 8, RECIPE.micro_batch_seconds)


# -- quality


# A step is a list of micro-batches, each the lengths (in samples) of its rows; the first `num_ranks` of them are one
# round, and so on.


def effective_batches(batches: EffectiveBatches, num_ranks: int, budget: int, num_steps: int) -> Iterator[Step]:
    """Ours: one draw an update, cut and dealt. Dummies are rows of the shortest, marked by a negative length."""
    cursor = Cursor()
    for _ in range(num_steps):
        crops, cursor = batches.draw(cursor)
        lengths = np.sort(crops.num_samples)[::-1]
        rounds, pieces = cut(lengths, num_ranks, budget)
        rows = [lengths[piece] for piece in pieces] + [-lengths[-1:]] * (rounds * num_ranks - len(pieces))
        dealt = deal(padded_sizes(lengths, pieces, len(rows)), num_ranks)
        yield [rows[piece] for piece in dealt.T.ravel()]


def fixed_counts(lengths: np.ndarray, num_ranks: int, budget: int, batch_samples: int, grouped: bool) -> Iterator[Step]:
    """Random padding, or length grouping: the most rows that always fit, in as many rounds as the update needs."""
    rows = batch_samples / lengths.mean() / num_ranks  # of a device in an update
    rounds = math.ceil(rows * lengths.max() / budget)
    count = round(rows / rounds)
    order = np.random.default_rng(0).permutation(len(lengths))
    if grouped:
        parts = np.split(order, range(MEGABATCH * count * rounds, len(order), MEGABATCH * count * rounds))
        order = np.concatenate([part[np.argsort(-lengths[part], kind="stable")] for part in parts])
    size = rounds * num_ranks  # micro-batches of an update
    num_steps = len(order) // (count * size)  # the rest is no whole update
    for step in order[: num_steps * count * size].reshape(num_steps, size, count):
        yield list(lengths[step])


def measure(steps: Iterator[Step], num_ranks: int) -> dict[str, float]:
    """What the steps of a way of batching are like.

    - `padded_fraction`: padding among the samples of all micro-batches, dummies left out.
    - `rank_imbalance`: 1 − mean / max over the ranks of what each computes in an update, in padded samples with
      dummies, averaged over updates: the share of device time spent waiting where ranks wait for each other once an
      update, as under DDP.
    - `round_imbalance`: the same of every round, for where they wait at each micro-batch, as under FSDP.
    - `idle_or_padding`: both together, 1 − speech / (ranks × busiest rank's padded samples).
    - `hours_spread`, `hours_deviation`: largest minus smallest update, and standard deviation, in hours.
    - `alikeness`: variance over the updates of their mean utterance length, over what as many random draws of one
      utterance give; 1 is a random draw, above it the utterances of an update are alike.
    """
    updates, real_rows = [], []
    for step in steps:
        real = np.concatenate([rows for rows in step if rows[0] > 0])
        sizes = np.array([len(rows) * int(np.abs(rows).max()) for rows in step]).reshape(-1, num_ranks)
        load, heard = sizes.sum(0), int(real.sum(dtype=np.int64))  # (ranks,) samples that each computes
        updates.append(dict(
            micro_batches=len(sizes), heard=heard, padded=sizes.sum() + sum(int(rows[0]) for rows in step if rows[0] < 0),
            rank_imbalance=1 - load.mean() / load.max(), round_imbalance=np.mean(1 - sizes.mean(1) / sizes.max(1)),
            idle_or_padding=1 - heard / (num_ranks * load.max()), mean_length=real.mean(), by_chance=1 / len(real),
        ))  # fmt: skip
        real_rows.append(real)
    table = pandas.DataFrame(updates)
    hours, mean = table["heard"] / SAMPLING_RATE / 3600, table.mean()
    return {
        "updates": len(table),
        "micro_batches": float(mean["micro_batches"]),
        "batch_hours": float(hours.mean()),
        "padded_fraction": float(1 - mean["heard"] / mean["padded"]),
        **mean[["rank_imbalance", "round_imbalance", "idle_or_padding"]].to_dict(),
        "hours_spread": float(np.ptp(hours)),
        "hours_deviation": float(np.std(hours)),
        "alikeness": float(np.var(table["mean_length"]) / (np.concatenate(real_rows).var() * mean["by_chance"])),
    }


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
    rows = [[n, *found["first_update"].values(), found["peak_bytes"]] for n, found in scales.items()]
    print_table(rows, ["utterances", "first update s", "min", "max", "peak bytes an utterance"])
    hours, lost = lengths.sum(dtype=np.int64) / SAMPLING_RATE / 3600, lost_to_grid(lengths)
    grid, both = lost.values()
    print(f"\n{len(lengths):,} utterances, {hours:.1f} h; lost to the grid {grid:.2%}, with the crop limit {both:.2%} "
          f"of what the paper's limit of {PAPER_CROP_SECONDS} s leaves\n")  # fmt: skip
    names = list(next(iter(ways.values())))
    print_table([[ranks, way, *found.values()] for (way, ranks), found in ways.items()], ["ranks", "way", *names])


def summary(scales: dict[int, dict], lengths: np.ndarray, ways: dict) -> dict:
    here, ours = environment(), ways["ours", 8]
    return {
        "benchmark": "plan",
        "machine": f"{here['cpu']}, {here['cores']} cores",
        **here,
        **{f"seconds_{SHORT.get(n, n)}": found["first_update"]["median"] for n, found in scales.items()},
        **lost_to_grid(lengths),
        **{name: ours[name] for name in ("padded_fraction", "rank_imbalance", "alikeness", "hours_spread")},
        "rank_imbalance_64": ways["ours", 64]["rank_imbalance"],
        "bytes_per_utterance": scales[max(scales)]["peak_bytes"],
        "scales": {SHORT.get(n, str(n)): found for n, found in scales.items()},
        "ways": {f"{way}, {ranks} ranks": found for (way, ranks), found in ways.items()},
    }


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--scales", type=int, nargs="+", default=list(SHORT), help="numbers of utterances")
    parser.add_argument("--trials", type=int, default=5, help="fresh processes that each time is taken in")
    parser.add_argument("--updates", type=int, default=580, help="updates measured; 580 are about an epoch of 960 h")
    args = parser.parse_args()
    scales = {n: measure_scale(n, args.trials) for n in args.scales}
    lengths = speech_lengths(LIBRISPEECH)
    ways = compare_ways(lengths, args.updates)
    report(scales, lengths, ways)
    print_json(summary(scales, lengths, ways))


if __name__ == "__main__":
    main()
