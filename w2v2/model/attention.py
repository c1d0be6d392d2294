"""Attention of utterances of different lengths, without a mask or padding, on their concatenated frames.

A mask keeps the fast kernels away. On a GPU in 16 bits one call of the flash kernel takes utterances of any lengths.
Elsewhere each run of equal lengths goes to the library's kernel by itself. There are few runs, because micro-batches
are sorted by length and lengths lie on a grid.

Shapes: B utterances, N frames of all of them, T frames of one, M frames of each that ask, H heads, d width of a head.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F

from w2v2.model.cpu import attend_in_blocks

# The function behind nested tensors' `scaled_dot_product_attention`. It is differentiable and has dropout, which the
# public `torch.nn.attention.varlen` lacks. Nested tensors would cost the host some hundred microseconds a call.
_FLASH = torch.ops.aten._flash_attention_forward.default


class Rows(NamedTuple):
    """Where each utterance lies in the concatenated frames."""

    lengths: Sequence[int]  # frames of each, on the host
    bounds: torch.Tensor  # (B + 1,) int32, where each begins, and the end, on the device


def runs(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Consecutive utterances of equal length: (number of them, length)."""
    return [(len(list(group)), length) for length, group in groupby(lengths)]


def attend(projections: torch.Tensor, rows: Rows, dropout: float = 0.0) -> torch.Tensor:
    """Attention among the frames of each utterance: query, key and value (N, 3, H, d) → (N, H, d)."""
    if takes_any_lengths(projections):
        bounds = rows.bounds, max(rows.lengths)
        return _flash(*projections.unbind(1), bounds, bounds, dropout)
    parts = _split_runs(projections, rows.lengths)  # each (B, T, 3, H, d)
    out = [_attend_alike(*part.unbind(2), dropout).flatten(0, 1) for part in parts]
    return out[0] if len(out) == 1 else torch.cat(out)


def attend_from(query: torch.Tensor, keys_values: torch.Tensor, rows: Rows, dropout: float = 0.0) -> torch.Tensor:
    """Likewise, but M frames of each utterance ask: query (B, M, H, d), keys and values (N, 2, H, d) → (B, M, H, d)."""
    if takes_any_lengths(keys_values):
        B, M = query.shape[:2]
        bounds = torch.arange(0, (B + 1) * M, M, dtype=torch.int32, device=query.device)
        key, value = keys_values.unbind(1)
        out = _flash(query.flatten(0, 1), key, value, (bounds, M), (rows.bounds, max(rows.lengths)), dropout)
        return out.unflatten(0, (B, M))  # (B · M, H, d) -> (B, M, H, d)
    queries = query.split([number for number, _ in runs(rows.lengths)])
    parts = _split_runs(keys_values, rows.lengths)  # each (B, T, 2, H, d)
    out = [_attend_alike(q, *part.unbind(2), dropout) for q, part in zip(queries, parts, strict=True)]
    return out[0] if len(out) == 1 else torch.cat(out)


def takes_any_lengths(x: torch.Tensor) -> bool:
    """Whether the flash kernel takes (…, H, d) of different lengths: in 16 bits, on an NVIDIA GPU since Ampere."""
    if x.device.type != "cuda" or x.dtype not in (torch.bfloat16, torch.float16):
        return False
    # Not every device has the backward pass of wider heads.
    fits = x.shape[-1] % 8 == 0 and x.shape[-1] <= 192 and torch.cuda.get_device_capability(x.device) >= (8, 0)
    return fits and torch.version.cuda is not None and torch.backends.cuda.is_flash_attention_available()


def _flash(query, key, value, asking, attended, dropout) -> torch.Tensor:
    """Query (n, H, d), key and value (m, H, d) → (n, H, d). `asking`, `attended`: bounds and longest length."""
    (bounds_q, longest_q), (bounds_k, longest_k) = asking, attended
    return _FLASH(query, key, value, bounds_q, bounds_k, longest_q, longest_k, dropout, False, False)[0]


def _split_runs(x: torch.Tensor, lengths: Sequence[int]) -> list[torch.Tensor]:
    """(N, …) → for each run (B, T, …). One split, because each slice would fill its gradient up with zeros."""
    found = runs(lengths)
    parts = x.split([number * length for number, length in found])
    return [part.unflatten(0, run) for part, run in zip(parts, found, strict=True)]


def _attend_alike(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout: float) -> torch.Tensor:
    """Query (B, M, H, d), key and value (B, T, H, d) → (B, M, H, d): utterances of equal length."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # (B, M or T, H, d) -> (B, H, M or T, d)
    if dropout == 0.0 or has_kernel(query.device):
        out = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
    else:
        out = attend_in_blocks(query, key, value, dropout)
    return out.transpose(1, 2)  # (B, H, M, d) -> (B, M, H, d)


def has_kernel(device: torch.device) -> bool:
    """Whether the library has a fused kernel for attention with dropout."""
    return device.type != "cpu"
