"""An effective batch's lengths → padded pieces, one a micro-batch; pieces → ranks.

A piece costs its padded size: rows × its longest row, in samples. Lengths are always sorted, longest first.
"""

import math

import numpy as np

MOST_IDLE = 0.06  # unevenness that is worth another round
EFFICIENT_SAMPLES = 40 * 16_000  # a smaller piece costs about as much overhead as it saves
MOST_EXCHANGES = 1_000  # of pieces between ranks: updates need a few, validation sets of 100,000 utterances gain little


def greedy_starts(lengths: np.ndarray, budget: int) -> list[int]:
    """Where pieces begin whose padded size is within `budget`, or of one row that is longer than that."""
    following = (np.arange(len(lengths)) + np.maximum(1, budget // lengths)).tolist()
    starts, first = [], 0
    while first < len(lengths):
        starts.append(first)
        first = following[first]
    return starts


def cut(lengths: np.ndarray, num_ranks: int, micro_batch_samples: int) -> tuple[int, list[slice]]:
    """Cut an effective batch for `num_ranks` devices into m rounds, each of one piece a rank.

    m is the fewest rounds whose pieces fit into `micro_batch_samples`. For that m, the smallest padded budget is taken
    that gives at most m × num_ranks greedy pieces, so the pieces are as even as they can be. Where a piece has few
    rows, the ranks can still be uneven (64 ranks share 1.6 h as six utterances each). Up to twice the rounds are then
    tried, as long as the pieces stay large enough to keep a device busy.

    Returns: m, and at most m × num_ranks pieces.
    """
    fewest = math.ceil(len(greedy_starts(lengths, micro_batch_samples)) / num_ranks)
    for rounds in range(fewest, 2 * fewest + 1):
        budget = smallest_budget(lengths, rounds * num_ranks, micro_batch_samples)
        starts = greedy_starts(lengths, budget)
        pieces = [slice(*ends) for ends in zip(starts, [*starts[1:], len(lengths)], strict=True)]
        if rounds == fewest:
            found = rounds, pieces
        elif budget < EFFICIENT_SAMPLES:
            break
        if idle_fraction(padded_sizes(lengths, pieces, rounds * num_ranks), num_ranks) <= MOST_IDLE:
            return rounds, pieces
    return found


def smallest_budget(lengths: np.ndarray, num_pieces: int, enough: int) -> int:
    """The smallest budget that gives at most `num_pieces` greedy pieces, by bisection; `enough` is one that does."""
    low, high = max(int(lengths[0]), -(-int(lengths.sum()) // num_pieces)), enough  # pieces hold all of the samples
    while low < high:
        middle = (low + high) // 2
        if len(greedy_starts(lengths, middle)) <= num_pieces:
            high = middle
        else:
            low = middle + 1
    return high


def idle_fraction(sizes: np.ndarray, num_ranks: int) -> float:
    """Share of the time for which the average rank waits for the busiest at the end of an update."""
    load = sizes[deal(sizes, num_ranks)].sum(1)  # (num_ranks, m) → (num_ranks,)
    return float(1.0 - load.mean() / load.max())


def padded_sizes(lengths: np.ndarray, pieces: list[slice], num_slots: int) -> np.ndarray:
    """Cost of each piece, int64 of shape (num_slots,). Slots beyond the pieces are dummies of one row, the shortest."""
    sizes = [(piece.stop - piece.start) * int(lengths[piece.start]) for piece in pieces]
    return np.array(sizes + [int(lengths[-1])] * (num_slots - len(pieces)), dtype=np.int64)


def deal(sizes: np.ndarray, num_ranks: int) -> np.ndarray:
    """Numbers of the pieces that each rank runs, shape (num_ranks, m), so that the ranks finish an update together.

    A round holds pieces of about the same size, because a sharded model makes the ranks wait for each other in it.
    Within a round, the largest piece goes to the rank with the smallest load so far. Then the ranks with the largest
    and the smallest load exchange pieces of a round for as long as that brings them closer.

    Args:
        sizes: (m · num_ranks,) padded sizes, dummies included.
    """
    rounds = np.argsort(-sizes, kind="stable").reshape(-1, num_ranks)  # (m · ranks,) → (m, ranks)
    if num_ranks == 1:
        return rounds.T
    # 1. Deal each round, the largest piece to the smallest load.
    dealt, load = np.empty((num_ranks, len(rounds)), dtype=np.int64), np.zeros(num_ranks, dtype=np.int64)
    for column, pieces in enumerate(rounds):
        least_first = np.argsort(load, kind="stable")
        dealt[least_first, column] = pieces
        load[least_first] += sizes[pieces]
    # 2. Exchange.
    for _ in range(MOST_EXCHANGES):
        most, least = int(load.argmax()), int(load.argmin())
        moved = sizes[dealt[most]] - sizes[dealt[least]]  # (m,) by an exchange in each of the rounds
        gain = np.minimum(moved, load[most] - load[least] - moved)
        column = int(gain.argmax())
        if gain[column] <= 0:
            break
        dealt[[most, least], column] = dealt[[least, most], column]
        load[[most, least]] += np.array([-1, 1]) * moved[column]
    return dealt
