"""Recordings that are the same, though their samples differ: another codec, level, rate, or other edges.

After Haitsma and Kalker, "A highly robust audio fingerprinting system" (ISMIR 2002): whether the energy in one band
falls more than in the next, from one frame to the next, is one of 32 bits. Frames overlap by 15/16, so that it matters
little where they begin. Two recordings that share a few whole words at one shift are compared bit by bit.
Limits: recordings below a second, another speed or pitch, and speech mixed with other loud sound are not found.
"""

from collections.abc import Sequence

import numpy as np

FRAME, HOP = 4_096, 256  # samples at 16 kHz: 256 ms every 16 ms
EDGES = np.unique(np.geomspace(300, 3_000, 34) * FRAME / 16_000).astype(int)  # of 33 bands, in bins
NEIGHBOURS = 4  # equal words among which pairs are looked for; copies form chains
MIN_VOTES = 4  # equal words at one shift
MIN_OVERLAP = 48  # words
MAX_ERRORS = 0.25  # share of bits that differ; unrelated recordings differ in half of them


def take_fingerprint(samples: np.ndarray) -> np.ndarray:
    """(S,) at 16 kHz → a 32-bit word for each frame but the first, (T,); 0 where nothing changes, as in silence."""
    samples = np.pad(samples, (0, max(0, FRAME - len(samples))))
    frames = np.lib.stride_tricks.sliding_window_view(samples, FRAME)[::HOP]
    window, energy = np.hanning(FRAME).astype(np.float32), []
    for at in range(0, len(frames), 256):  # few at a time, for memory
        power = np.abs(np.fft.rfft(frames[at : at + 256] * window)) ** 2
        energy.append(np.add.reduceat(power[:, : EDGES[-1]], EDGES[:-1], axis=1))
    falls = -np.diff(np.concatenate(energy), axis=1)  # (T + 1, 32)
    bits = np.diff(falls, axis=0) > 0  # (T, 32)
    return np.packbits(bits, axis=1).view(">u4")[:, 0].astype(np.uint32)


def find_repeated(fingerprints: Sequence[np.ndarray]) -> list[tuple[int, int]]:
    """Pairs of recordings (the earlier one first) that are the same; of many copies, enough pairs to connect them."""
    words = np.concatenate([np.empty(0, np.uint32), *fingerprints])
    owners = np.repeat(np.arange(len(fingerprints)), list(map(len, fingerprints)))
    places = np.concatenate([np.empty(0, int), *(np.arange(len(one)) for one in fingerprints)])
    order = np.argsort(words, kind="stable")
    order = order[words[order] != 0]
    base, width = len(fingerprints), 2 * max(map(len, fingerprints), default=0) + 1
    cases = [np.empty(0, np.int64)]  # first · base · width + second · width + shift: fast to count
    for step in range(1, NEIGHBOURS + 1):
        first, second = order[:-step], order[step:]
        equal = (words[first] == words[second]) & (owners[first] != owners[second])
        first, second = first[equal], second[equal]
        shifts = places[second] - places[first] + width // 2
        cases.append((owners[first] * base + owners[second]) * width + shifts)
    cases, votes = np.unique(np.concatenate(cases), return_counts=True)
    found = set()
    for case in cases[votes >= MIN_VOTES].tolist():
        (first, second), shift = divmod(case // width, base), case % width - width // 2
        if (first, second) not in found and _agree(fingerprints[first], fingerprints[second], shift):
            found.add((first, second))
    return sorted(found)


def _agree(first: np.ndarray, second: np.ndarray, shift: int) -> bool:
    """Whether the common part, `first[n]` beside `second[n + shift]`, is long enough and differs in few bits."""
    first, second = first[max(0, -shift) :], second[max(0, shift) :]
    overlap = min(len(first), len(second))
    if overlap < max(MIN_OVERLAP, min(len(first), len(second)) // 2):
        return False
    first, second = first[:overlap], second[:overlap]
    heard = (first != 0) & (second != 0)
    errors = np.unpackbits((first[heard] ^ second[heard]).view(np.uint8))
    return bool(heard.sum() >= MIN_OVERLAP and errors.mean() <= MAX_ERRORS)


def count_repeated(pairs: Sequence[tuple[int, int]]) -> set[int]:
    """The recordings that repeat an earlier one, of groups that the pairs connect."""
    head: dict[int, int] = {}

    def find(one: int) -> int:
        while one in head:
            one = head[one]
        return one

    for first, second in pairs:
        ends = sorted((find(first), find(second)))
        if ends[0] != ends[1]:
            head[ends[1]] = ends[0]
    return set(head)
