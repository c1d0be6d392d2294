"""An effective batch's lengths → padded pieces, one a micro-batch, and pieces → ranks.

A piece costs its padded size: rows × its longest row, in samples. Lengths are sorted, longest first, throughout.
"""

import math

import numpy as np

MOST_IDLE = 0.06  # unevenness that is worth another round
EFFICIENT_SAMPLES = 40 * 16_000  # a smaller piece costs about as much in overhead as it could save


def greedy_pieces(lengths: np.ndarray, budget: int) -> list[slice]:
    """Cut lengths (longest first) into runs whose padded size, rows × longest, is within `budget` where a single row is."""
    pieces, first = [], 0
    while first < len(lengths):
        rows = max(1, int(budget // lengths[first]))
        pieces.append(slice(first, min(first + rows, len(lengths))))
        first += rows
    return pieces


def cut(lengths: np.ndarray, num_ranks: int, micro_batch_samples: int) -> tuple[int, list[slice]]:
    """Cut an effective batch (lengths sorted, longest first) for `num_ranks` devices.

    For the fewest rounds m upward, the smallest padded budget is found at which the greedy pieces number at most m × num_ranks; the
    first m whose budget is within `micro_batch_samples` is taken, so the pieces are as even as they can be. Where few rows make up a
    piece, the ranks can still be uneven (64 of them share 1.6 h as six utterances each): up to twice the rounds are then tried, as long as
    the pieces stay large enough to keep a device busy.

    Returns: m, and at most m × num_ranks pieces.
    """
    fewest = max(1, math.ceil(lengths.sum() / (num_ranks * micro_batch_samples)))
    while len(greedy_pieces(lengths, micro_batch_samples)) > fewest * num_ranks:
        fewest += 1
    for rounds in range(fewest, 2 * fewest + 1):
        budget = smallest_budget(lengths, rounds * num_ranks, micro_batch_samples)
        pieces = greedy_pieces(lengths, budget)
        if rounds == fewest:
            found = rounds, pieces
        elif budget < EFFICIENT_SAMPLES:
            break
        if idle_fraction(padded_sizes(lengths, pieces, rounds * num_ranks), num_ranks) <= MOST_IDLE:
            return rounds, pieces
    return found


def smallest_budget(lengths: np.ndarray, num_pieces: int, enough: int) -> int:
    """By bisection: the smallest padded size of a piece at which the greedy pieces number at most `num_pieces`; `enough` is one."""
    low, high = int(lengths[0]), enough
    while low < high:
        middle = (low + high) // 2
        if len(greedy_pieces(lengths, middle)) <= num_pieces:
            high = middle
        else:
            low = middle + 1
    return high


def idle_fraction(sizes: np.ndarray, num_ranks: int) -> float:
    """Share of the time for which the average rank waits for the busiest at the end of an update."""
    load = sizes[deal(sizes, num_ranks)].sum(1)
    return float(1.0 - load.mean() / load.max())


def padded_sizes(lengths: np.ndarray, pieces: list[slice], num_slots: int) -> np.ndarray:
    """What each piece costs, int64 of shape (num_slots,); slots beyond the pieces are dummies, one row of the shortest each."""
    sizes = [(piece.stop - piece.start) * int(lengths[piece.start]) for piece in pieces]
    return np.array(sizes + [int(lengths[-1])] * (num_slots - len(pieces)), dtype=np.int64)


def deal(sizes: np.ndarray, num_ranks: int) -> np.ndarray:
    """Which pieces each rank runs, so that the ranks finish an update together: numbers of pieces, shape (num_ranks, m).

    Pieces of about the same size stand in the same round (where a sharded model makes the ranks wait for each other); within each
    round the largest goes to the rank that has least so far, and then the ranks with most and least exchange pieces of a round for as
    long as that brings them closer.

    Args:
        sizes: (m · num_ranks,) padded sizes, dummies included.
    """
    rounds = np.argsort(-sizes, kind="stable").reshape(-1, num_ranks)
    dealt, load = np.empty((num_ranks, len(rounds)), dtype=np.int64), np.zeros(num_ranks, dtype=np.int64)
    for column, pieces in enumerate(rounds):
        least_first = np.argsort(load, kind="stable")
        dealt[least_first, column] = pieces
        load[least_first] += sizes[pieces]
    while True:
        most, least = int(load.argmax()), int(load.argmin())
        moved = sizes[dealt[most]] - sizes[dealt[least]]  # by an exchange in each of the rounds
        gain = np.minimum(moved, load[most] - load[least] - moved)
        column = int(gain.argmax())
        if gain[column] <= 0:
            return dealt
        dealt[[most, least], column] = dealt[[least, most], column]
        load[[most, least]] += np.array([-1, 1]) * moved[column]
