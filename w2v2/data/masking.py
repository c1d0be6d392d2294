"""Latent lengths, mask spans, distractors and layerdrop, for all rows of a micro-batch at once.

All are pure functions of an utterance's key and length: the utterances beside it do not matter. Source: wav2vec
2.0, sections 3.1 and 3.2. The number of spans follows `transformers`, with one rounding an utterance.

Shapes: B utterances, T latent frames of the longest, M masked frames of the one that has most, K distractors.
"""

from collections.abc import Sequence

import torch

from w2v2.data.hashing import DISTRACTOR, LAYERDROP, MASK, below, derive, positive, uniform

SLOTS = 16  # M is a multiple of it, which gives few distinct shapes


def latent_lengths(num_samples: torch.Tensor, kernels: Sequence[int], strides: Sequence[int]) -> torch.Tensor:
    """Frames that the convolutions make of `num_samples` samples (any shape); never negative."""
    for kernel, stride in zip(kernels, strides, strict=True):
        num_samples = torch.div(num_samples - kernel, stride, rounding_mode="floor") + 1
    return num_samples.clamp_min(0)


def inside_rows(counts: torch.Tensor, size: int) -> torch.Tensor:
    """(B,) numbers → (B, size) bool: the first slots of each row, as many as it has of its own."""
    return torch.arange(size, device=counts.device) < counts[:, None]


def least_samples(frames: int, kernels: Sequence[int], strides: Sequence[int]) -> int:
    """Fewest samples of which the convolutions make so many latent frames."""
    for kernel, stride in zip(reversed(kernels), reversed(strides), strict=True):
        frames = (frames - 1) * stride + kernel
    return frames


def mask_spans(keys: torch.Tensor, frames: torch.Tensor, prob: float, length: int, min_spans: int = 2) -> torch.Tensor:
    """Which latent frames are masked.

    A row of t frames gets floor(prob · t / length + u) spans of `length` frames, u uniform in [0, 1): at least
    `min_spans`, at most t // length, and at most one a start. The starts are uniform without replacement; spans may
    overlap. A `prob` of 0.65 and a `length` of 10 mask about 49 % of the frames.

    keys, frames (B,) int64: one key an utterance and epoch, and the row's latent frames → (B, T) bool, T = frames.max()
    """
    # 1. How many spans each row gets: (B,).
    starts = (frames - length + 1).clamp_min(0)  # positions where a span can begin
    rounding = uniform(derive(keys, MASK, 0))
    spans = (prob * frames.double() / length + rounding).long().clamp_min(min_spans)
    spans = torch.minimum(torch.minimum(spans, frames // length), starts)

    # 2. Where they begin: the positions with the smallest hashes.
    T = int(frames.max())
    position = torch.arange(T, device=keys.device)
    rank = positive(derive(keys[:, None], MASK, 1 + position))  # (B, T)
    rank = rank.masked_fill(position >= starts[:, None], torch.iinfo(torch.int64).max)
    most = int(spans.max())
    chosen = rank.topk(most, dim=1, largest=False).indices  # (B, most) the spans' starts
    taken = torch.arange(most, device=keys.device) < spans[:, None]  # (B, most)

    # 3. Which frames they cover: +1 where a span begins, -1 past its end, summed along the row.
    edges = torch.zeros(len(keys), T + length + 1, dtype=torch.int32, device=keys.device)
    edges.scatter_add_(1, chosen, taken.int())
    edges.scatter_add_(1, chosen + length, -taken.int())
    return edges.cumsum(1)[:, :T] > 0


def group_alike(num_masked: list[int]) -> tuple[tuple[slice, int], ...]:
    """Consecutive utterances none of which has less than three quarters of the group's M masked frames, M a multiple of
    `SLOTS`: their pairs of masked frames then fill a (b, M, M) array.
    """
    groups, begin = [], 0
    while begin < len(num_masked):
        most = num_masked[begin]
        end = begin + 1
        while end < len(num_masked) and 0.75 * most <= num_masked[end] <= most:
            end += 1
        groups.append((slice(begin, end), -(-most // SLOTS) * SLOTS))
        begin = end
    return tuple(groups)


def distractors(keys: torch.Tensor, counts: torch.Tensor, num_slots: int, num_negatives: int) -> torch.Tensor:
    """Distractors of each masked frame: uniform, with replacement, from the *other* masked frames of its utterance.

    keys, counts (B,) int64: `counts` are the masked frames of each row. The only one of a row draws itself, which is a
    collision and no distractor. `num_slots` is M, on the host. → (B, M, K) numbers of the utterance's masked frames
    """
    frame = torch.arange(num_slots, device=keys.device)[:, None]  # (M, 1)
    draw = torch.arange(num_negatives, device=keys.device)  # (K,)
    h = derive(keys[:, None, None], DISTRACTOR, frame * num_negatives + draw)  # (B, M, K)
    j = below(h, (counts - 1).clamp_min(1)[:, None, None])  # one of the count - 1 other frames
    return (j + (j >= frame)) % counts.clamp_min(1)[:, None, None]  # step over the frame itself


def kept_rows(keys: torch.Tensor, num_layers: int, layerdrop: float) -> torch.Tensor:
    """Layerdrop: which utterances each transformer layer is computed for, (layers, B) bool."""
    layer = torch.arange(num_layers, device=keys.device)[:, None]  # (layers, 1)
    return uniform(derive(keys[None], LAYERDROP, layer)) >= layerdrop
