"""An effective batch → pieces, one a micro-batch; pieces → ranks.

The utterances of a piece lie side by side, so it costs the sum of their sizes. Pieces are about equal: a run computes
all of them in one size, and the ranks finish together.

Shapes: n utterances, P pieces, K utterances of the piece that has most.
"""

import heapq
import math

import numpy as np

CUT_VERSION = 2  # dropout and Gumbel noise follow the cut; 1 were sorted, padded pieces
MOST_TURNS = 24  # of exchanges; few are needed
COMPARED = 16  # utterances of a piece that an exchange chooses from


def cut(sizes: np.ndarray, num_ranks: int, budget: int) -> tuple[int, list[np.ndarray]]:
    """Cut an effective batch for `num_ranks` devices into m rounds, each of one piece a rank.

    m is the fewest rounds whose fullest piece is within `budget`, as `pack` fills them. Beyond a thousand rounds, which
    a large validation set has, it may be a few in a thousand more. An utterance beyond the budget stands alone.

    Args:
        sizes: (n,) int64, largest first, in the unit of `budget`.

    Returns: m, and at most m × num_ranks pieces, the fullest first: rising indices into `sizes`.
    """
    budget, most = max(budget, int(sizes[0])), math.ceil(len(sizes) / num_ranks)  # rounds, with a piece an utterance
    rounds = math.ceil(int(sizes.sum()) / (num_ranks * budget))
    while True:
        table, load = pack(sizes, min(rounds * num_ranks, len(sizes)))
        if load.max() <= budget:
            break
        rounds = min(rounds + 1 + rounds // 1_000, most)
    fullest_first = np.sort(table[np.argsort(-load, kind="stable")])
    counts = (fullest_first < len(sizes)).sum(1).tolist()
    return rounds, [row[:count] for row, count in zip(fullest_first, counts, strict=True)]


def pack(sizes: np.ndarray, num_pieces: int) -> tuple[np.ndarray, np.ndarray]:
    """Fill pieces evenly: the largest first, each into the emptiest piece (Graham 1969), and then by exchanges.

    sizes: (n,) largest first, n ≥ P → (P, K) utterances of each piece, n in free places, and (P,) the pieces' sums
    """
    # 1. Longest processing time first. An entry of the heap is sum · P + piece.
    heap, piece = list(range(num_pieces)), []
    for size in (sizes * num_pieces).tolist():
        piece.append(heap[0] % num_pieces)
        heapq.heapreplace(heap, heap[0] + size)
    # 2. A table of them, with a free place at each end.
    counts = np.bincount(piece, minlength=num_pieces)
    table = np.full((num_pieces, int(counts.max()) + 1), len(sizes))
    table[np.arange(table.shape[1]) < counts[:, None]] = np.argsort(piece, kind="stable")
    return table, exchange(table, np.append(sizes, 0))


def exchange(table: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Even out the pieces of `table`, in place, and return their sums.

    In a turn, every piece of the fuller half exchanges an utterance with one of the emptier half: the fullest with the
    emptiest and so on, in every second turn the fullest with the middle one. They take the two utterances that bring
    them closest; one of them may be a free place.
    """
    load, half = sizes[table].sum(1), len(table) // 2
    columns = np.unique(np.linspace(0, table.shape[1] - 1, COMPARED).astype(int))  # (k,)
    idle = 0
    for turn in range(MOST_TURNS if half else 0):
        order = np.argsort(-load, kind="stable")
        more, less = order[:half], order[-half:]  # (P / 2,) each
        less = less if turn % 2 else less[::-1]
        gap = (load[more] - load[less])[:, None, None]
        moved = sizes[table[more][:, columns]][:, :, None] - sizes[table[less][:, columns]][:, None]  # (P / 2, k, k)
        gain = np.minimum(moved, gap - moved).reshape(half, -1)
        best = gain.argmax(1)
        pairs = np.flatnonzero(gain[np.arange(half), best] > 0)
        more, less, best = more[pairs], less[pairs], best[pairs]
        out, back = columns[best // len(columns)], columns[best % len(columns)]
        table[more, out], table[less, back] = table[less, back], table[more, out]
        before, load = load.max(), sizes[table].sum(1)
        idle = 0 if load.max() < before else idle + 1
        if idle == 2:
            break
    return load


def deal(num_rounds: int, num_ranks: int, rank: int) -> list[int]:
    """Numbers of the pieces that a rank runs, one a round; every second round is dealt from the last rank on."""
    turns = (rank, num_ranks - 1 - rank)
    return [number * num_ranks + turns[number % 2] for number in range(num_rounds)]
