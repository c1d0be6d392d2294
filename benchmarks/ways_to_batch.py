"""Ways to make micro-batches and updates out of the same lengths, and what is measured of each.

A step is a list of micro-batches, each the lengths (in samples) of its rows; the first `num_ranks` of them are one
round, and so on. The rivals are the ideas of well-known samplers, set to bring an update to the same hours.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np
import pandas

from w2v2.audio.crops import SAMPLING_RATE
from w2v2.data.batching import LATENT_STRIDE, Cursor, EffectiveBatches, PieceSize, count_slots
from w2v2.data.cutting import cut, deal

Step = list[np.ndarray]
MEGABATCH = 50  # in updates
NUM_BUCKETS = 50


def effective_batches(batches: EffectiveBatches, num_ranks: int, budget: int, num_steps: int) -> Iterator[Step]:
    """Ours: one draw an update, packed and dealt. Dummies are rows of the shortest, marked by a negative length."""
    cursor = Cursor()
    for _ in range(num_steps):
        crops, cursor = batches.draw(cursor)
        lengths = np.sort(crops.num_samples)[::-1]
        rounds, pieces = cut(count_slots(lengths), num_ranks, count_slots(budget))
        rows = [lengths[piece] for piece in pieces] + [-lengths[-1:]] * (rounds * num_ranks - len(pieces))
        dealt = [deal(rounds, num_ranks, rank) for rank in range(num_ranks)]
        yield [rows[piece] for column in zip(*dealt, strict=True) for piece in column]


def fixed_counts(lengths: np.ndarray, num_ranks: int, budget: int, batch_samples: int, grouped: bool) -> Iterator[Step]:
    """Shuffled utterances, as many to a micro-batch as always fit, in as many rounds as the update needs.

    `grouped`: as `group_by_length` of transformers, megabatches of 50 updates are each sorted by length first.
    """
    rows = batch_samples / lengths.mean() / num_ranks  # of a device in an update
    rounds = math.ceil(rows * lengths.max() / budget)
    count, size = round(rows / rounds), rounds * num_ranks  # of a micro-batch and of an update
    order = np.random.default_rng(0).permutation(len(lengths))
    if grouped:
        parts = np.split(order, range(MEGABATCH * count * rounds, len(order), MEGABATCH * count * rounds))
        order = np.concatenate([part[np.argsort(-lengths[part], kind="stable")] for part in parts])
    num_steps = len(order) // (count * size)  # the rest is no whole update
    for step in order[: num_steps * count * size].reshape(num_steps, size, count):
        yield list(lengths[step])


def quantile_buckets(lengths: np.ndarray, num_ranks: int, budget: int, batch_samples: int) -> Iterator[Step]:
    """As SpeechBrain's DynamicBatchSampler: shuffled utterances fall into buckets of like length and equal number, are
    cut there into micro-batches of as many as the bucket's upper edge allows, and these are shuffled.
    """
    rng = np.random.default_rng(0)
    edges = np.unique(np.quantile(lengths, np.arange(1, NUM_BUCKETS + 1) / NUM_BUCKETS))
    bucket = np.searchsorted(edges, lengths)
    size = num_ranks * math.ceil(1.03 * batch_samples / (num_ranks * budget))  # micro-batches of an update
    order = rng.permutation(len(lengths))
    limit = goal = batch_samples / size
    for _ in range(3):  # find the limit at which a micro-batch holds on average what it should
        micro_batches = []
        for number, edge in enumerate(edges):
            members = lengths[order[bucket[order] == number]]
            count = max(1, int(min(limit, budget) / edge))
            micro_batches += np.split(members, range(count, len(members), count))
        limit *= goal / np.mean([rows.sum() for rows in micro_batches])
    shuffled = [micro_batches[index] for index in rng.permutation(len(micro_batches))]
    for first in range(0, len(shuffled) - size + 1, size):
        yield shuffled[first : first + size]


def padded_size(rows: np.ndarray) -> int:
    """Samples that a micro-batch is computed for: all rows as long as the longest."""
    return len(rows) * int(np.abs(rows).max())


def packed_size(rows: np.ndarray) -> int:
    """Ours: rows side by side, each in whole slots."""
    return LATENT_STRIDE * int(count_slots(np.abs(rows)).sum())


def measure_size(steps: Iterator[Step], num_ranks: int, size: PieceSize) -> dict[str, float]:
    """What is left of the one size that all of our micro-batches are computed in.

    - `filler_fraction`: share of it that no speech fills, dummies included.
    - `idle_fraction`: `rank_imbalance` of `measure`, for where each micro-batch is computed in its own size instead.
    - `larger_fraction`: share of updates with a micro-batch that does not fit into it.
    """
    table = []
    for step in steps:
        slots = np.array([packed_size(rows) // LATENT_STRIDE for rows in step]).reshape(-1, num_ranks)  # (m, ranks)
        rows = [len(rows) for rows in step]
        table.append(dict(
            micro_batches=len(slots), rows=max(rows), larger=slots.max() > size.slots or max(rows) > size.rows,
            heard=sum(int(rows.sum()) for rows in step if rows[0] > 0), computed=slots.size * size.slots * LATENT_STRIDE,
            idle=1 - slots.sum(0).mean() / slots.sum(0).max(),
        ))  # fmt: skip
    mean = pandas.DataFrame(table).mean()
    return {
        "micro_batches": float(mean["micro_batches"]), "seconds": size.slots * LATENT_STRIDE / SAMPLING_RATE,
        "rows": size.rows, "filler_fraction": float(1 - mean["heard"] / mean["computed"]),
        "idle_fraction": float(mean["idle"]), "larger_fraction": float(mean["larger"]),
    }  # fmt: skip


def measure(steps: Iterator[Step], num_ranks: int, cost: Callable = padded_size) -> dict[str, float]:
    """What the steps of a way of batching are like; `cost` of a micro-batch in samples, what pads it included.

    - `padded_fraction`: padding among the samples of all micro-batches, dummies left out.
    - `rank_imbalance`: 1 − mean / max over the ranks of what each computes in an update, in padded samples with
      dummies: the share of device time spent waiting where ranks wait for each other once an update, as under DDP.
    - `round_imbalance`: the same of every round, for where they wait at each micro-batch, as under FSDP.
    - `idle_or_padding`: both together, 1 − speech / (ranks × busiest rank's padded samples).
    - `hours_spread`, `hours_deviation`: largest minus smallest update, and standard deviation, in hours.
    - `alikeness`: variance over the updates of their mean utterance length, over what as many random draws of one
      utterance give; 1 is a random draw, above it the utterances of an update are alike.
    """
    updates, real_rows = [], []
    for step in steps:
        real = np.concatenate([rows for rows in step if rows[0] > 0])
        sizes = np.array([cost(rows) for rows in step]).reshape(-1, num_ranks)
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
