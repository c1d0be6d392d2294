"""Attention of utterances of different lengths without a mask: each run of equal rows goes to the library's kernel by itself.

A mask of any form keeps the fast kernels away (flash, cuDNN). Micro-batches are sorted by length, and lengths lie on a grid, so a
micro-batch is a few runs of equal rows; the frames past a row's end are then not even computed.

Shapes: B utterances, T latent frames of the longest, M frames asked from, H heads, d width of a head.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
import torch.nn.functional as F

from w2v2.products import draw_kept


def runs(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Consecutive rows of equal length: (number of rows, length)."""
    return [(len(list(group)), length) for length, group in groupby(lengths)]


def attend(projections: torch.Tensor, lengths: Sequence[int], dropout: float = 0.0) -> torch.Tensor:
    """Scaled dot-product attention of each row over its own frames, (B, T, 3, H, d) → (B, T, H, d); zero past a row's end.

    Args:
        projections: query, key and value of each frame.
        lengths: frames of each row, on the host.
        dropout: probability with which an attention weight is zeroed.
    """
    T, outputs = projections.shape[1], []
    for part, length in _parts(projections, lengths):
        out = _attention(*part[:, :length].unbind(2), dropout)
        outputs.append(F.pad(out, (0, 0, 0, 0, 0, T - length)) if length < T else out)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def attend_from(
    query: torch.Tensor, keys_values: torch.Tensor, lengths: Sequence[int], dropout: float = 0.0
) -> torch.Tensor:
    """The same from some frames alone: query (B, M, H, d), keys and values of all frames (B, T, 2, H, d) → (B, M, H, d)."""
    sizes = [rows for rows, _ in runs(lengths)]
    queries = query.split(sizes) if len(sizes) > 1 else [query]
    parts = zip(queries, _parts(keys_values, lengths), strict=True)
    outputs = [_attention(own, *part[:, :length].unbind(2), dropout) for own, (part, length) in parts]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _parts(x: torch.Tensor, lengths: Sequence[int]) -> list[tuple[torch.Tensor, int]]:
    """Each run's rows with their length. Split at once: a slice of each would fill its gradient up with zeros."""
    found = runs(lengths)
    parts = x.split([rows for rows, _ in found]) if len(found) > 1 else [x]
    return [(part, length) for part, (_, length) in zip(parts, found, strict=True)]


def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout: float) -> torch.Tensor:
    """Query (B, M, H, d), key and value (B, T, H, d) → (B, M, H, d): all rows have T frames."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    if dropout == 0.0 or has_kernel(query.device):
        out = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
    else:
        out = _AttentionInBlocks.apply(query, key, value, dropout)
    return out.transpose(1, 2)


def has_kernel(device: torch.device) -> bool:
    """Whether the library has a fused kernel for attention with dropout."""
    return device.type != "cpu"


class _AttentionInBlocks(torch.autograd.Function):
    """Attention with dropout on the CPU, where the library has no fused kernel for it: as many heads at a time as there are threads.

    As in flash attention (Dao et al., 2022, algorithm 4) the weights are computed again in the backward pass instead of being kept, and
    the softmax's gradient needs only D = (output · its gradient) of each query. What is kept beside the inputs is one byte a weight, which
    says whether it was dropped. The buffers stay in the cache and are used again for the next heads.
    """

    @staticmethod
    def forward(ctx, query, key, value, dropout):  # (B, H, M, d), twice (B, H, T, d)
        B, H, M, d = query.shape
        query, key, value = (x.reshape(B * H, -1, d) for x in (query * d**-0.5, key, value))
        out, kept = torch.empty_like(query), torch.empty(B * H, M, value.shape[1], dtype=torch.bool)
        weights, factor = _buffers(query, value, 2)
        for heads in _blocks(B * H, len(weights)):
            p, f = weights[: len(query[heads])], factor[: len(query[heads])]
            _softmax_scores(query[heads], key[heads], p)
            draw_kept(kept[heads], dropout)
            torch.bmm(p.mul_(f.copy_(kept[heads])), value[heads], out=out[heads])
        out *= 1.0 / (1.0 - dropout)
        ctx.save_for_backward(query, key, value, out, kept)
        ctx.dropout = dropout
        return out.view(B, H, M, d)

    @staticmethod
    def backward(ctx, gradient):
        query, key, value, out, kept = ctx.saved_tensors
        B, H, M, d = gradient.shape
        gradient = gradient.reshape(B * H, M, d)
        shift = (gradient * out).sum(-1, keepdim=True)  # (B·H, M, 1)
        scaled = gradient * (1.0 / (1.0 - ctx.dropout))
        d_query, d_key, d_value = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        weights, d_weights, factor = _buffers(query, value, 3)
        for heads in _blocks(B * H, len(weights)):
            p, dp, f = (x[: len(query[heads])] for x in (weights, d_weights, factor))
            _softmax_scores(query[heads], key[heads], p)
            f.copy_(kept[heads])
            torch.bmm(scaled[heads], value[heads].transpose(1, 2), out=dp)
            dp.mul_(f).sub_(shift[heads]).mul_(p)
            torch.bmm(p.mul_(f).transpose(1, 2), scaled[heads], out=d_value[heads])
            torch.bmm(dp, key[heads], out=d_query[heads])
            torch.bmm(dp.transpose(1, 2), query[heads], out=d_key[heads])
        d_query *= d**-0.5
        return d_query.view(B, H, M, d), d_key.view(B, H, -1, d), d_value.view(B, H, -1, d), None


def _buffers(query: torch.Tensor, key: torch.Tensor, number: int) -> list[torch.Tensor]:
    """Attention weights (n, M, T) of the heads of query (B·H, M, d) that are computed together."""
    together = min(len(query), torch.get_num_threads())
    return [query.new_empty(together, query.shape[1], key.shape[1]) for _ in range(number)]


def _blocks(total: int, size: int) -> Iterator[slice]:
    return (slice(first, min(first + size, total)) for first in range(0, total, size))


def _softmax_scores(query: torch.Tensor, key: torch.Tensor, out: torch.Tensor) -> None:
    torch.bmm(query, key.transpose(1, 2), out=out)
    torch.softmax(out, -1, out=out)
