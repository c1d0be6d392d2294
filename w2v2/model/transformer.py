"""The transformer as functions over the stock modules' parameters: positional convolution, layers, attention.

They compute what the stock modules compute, in the type that they are given; norms and softmax are float32 inside.

Attention needs no mask and no padding, because it takes concatenated frames; a mask keeps the fast kernels away. On a
GPU in 16 bits one call of the flash kernel takes utterances of any lengths. Elsewhere each run of equal lengths goes to
the library's kernel by itself. There are few runs, because micro-batches are sorted by length and lengths lie on a grid.

Shapes: B utterances, T latent frames of the longest, N frames of all of them, M frames of each whose output is asked
for, D width, H heads, d width of a head, G groups of the positional convolution, k its taps, R frames that a row of its
product gives.
"""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from w2v2.model import cpu
from w2v2.model.cpu import attend_in_blocks, dropout

BLOCK = 8  # R
# The function behind nested tensors' `scaled_dot_product_attention`. It is differentiable and has dropout, which the
# public `torch.nn.attention.varlen` lacks. Nested tensors would cost the host some hundred microseconds a call.
_FLASH = torch.ops.aten._flash_attention_forward.default


class Rows(NamedTuple):
    """Where each utterance lies in the concatenated frames."""

    lengths: Sequence[int]  # frames of each, on the host
    bounds: torch.Tensor  # (B + 1,) int32, where each begins, and the end, on the device


def positional(module: nn.Module, hidden: torch.Tensor, in_blocks: bool) -> torch.Tensor:
    """Convolutional position embedding (B, T, D) → (B, T, D); frames past a row's end have to be zero."""
    conv = module.conv
    if in_blocks:
        return module.activation(_convolve_in_blocks(hidden, conv))
    weight, bias = conv.weight.to(hidden.dtype), conv.bias.to(hidden.dtype)
    out = F.conv1d(hidden.transpose(1, 2), weight, bias, padding=conv.padding, groups=conv.groups)
    return module.activation(out[..., : hidden.shape[1]].transpose(1, 2))  # (B, D, T or T + 1) -> (B, T, D)


def _convolve_in_blocks(x: torch.Tensor, conv: nn.Conv1d) -> torch.Tensor:
    """Grouped convolution (B, T, D) as one product a group; libraries are slow at it with groups of 48 channels.

    R neighbouring outputs share a window of k + R − 1 frames, of which a band matrix makes all R.
    """
    B, T, D = x.shape
    G, k, R = conv.groups, conv.kernel_size[0], BLOCK
    width, blocks = k + R - 1, -(-T // R)

    # 1. The band matrix: the taps, shifted by one frame for each of the R outputs.
    w = conv.weight.to(x.dtype).view(G, D // G, D // G, k).permute(0, 3, 2, 1)  # (G, k, in, out)
    band = torch.stack([F.pad(w, (0, 0, 0, 0, r, R - 1 - r)) for r in range(R)], dim=3)  # (G, k + R - 1, in, R, out)

    # 2. The windows, one for each R frames.
    length = blocks * R + k - 1
    padded = F.pad(x, (0, 0, k // 2, length - T - k // 2)).view(B, length, G, -1)
    padded = padded.permute(2, 0, 1, 3).contiguous()  # (B, length, G, in) -> (G, B, length, in)
    windows = padded.unfold(2, width, R).transpose(-1, -2)  # (G, B, blocks, k + R - 1, in)

    # 3. Their product, back in the order of frames.
    out = windows.reshape(G, B * blocks, -1) @ band.reshape(G, width * (D // G), -1)  # (G, B · blocks, R · out)
    out = out.view(G, B, blocks * R, -1)[:, :, :T]  # (G, B, T, out)
    out = out.permute(1, 2, 0, 3).reshape(B, T, D)
    return out + conv.bias.to(x.dtype)


def layer(
    module: nn.Module,
    hidden: torch.Tensor,
    rows: Rows,
    dtype: torch.dtype,
    rest: Callable | None = None,
    positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """One transformer layer, post-norm (BASE) or pre-norm (LARGE), on concatenated utterances: (N, D) → (N, D).

    Args:
        dtype: of the products, and of the post-norm residual. The pre-norm residual, a sum over layers, keeps its own.
        rest: `after_attention`, perhaps compiled.
        positions: (B, M) int64, the frames whose output is asked for, (B, M, D). The others are only attended to.
    """
    attention, before = module.attention, hasattr(module, "adapter_layer")  # pre-norm layers alone have that
    x = norm(module.layer_norm, hidden).to(dtype) if before else hidden
    dropped = attention.dropout if module.training else 0.0
    if positions is None:
        qkv = _project(x, attention.num_heads, attention.q_proj, attention.k_proj, attention.v_proj)  # (N, 3, H, d)
        attended = attend(qkv, rows, dropped)  # (N, H, d)
    else:
        query = _project(take(x, positions), attention.num_heads, attention.q_proj)  # (B · M, 1, H, d)
        query = query.view(*positions.shape, -1, attention.head_dim)  # (B, M, H, d)
        keys_values = _project(x, attention.num_heads, attention.k_proj, attention.v_proj)  # (N, 2, H, d)
        attended = attend_from(query, keys_values, rows, dropped).flatten(0, 1)  # (B · M, H, d)
        hidden = take(hidden, positions)
    attended = linear(attention.out_proj, attended.flatten(-2))  # (N or B · M, H, d) -> (N or B · M, D)
    out = (rest or after_attention)(module, hidden, attended, before)
    return out if positions is None else out.unflatten(0, positions.shape)  # (N, D), or (B, M, D)


def after_attention(module: nn.Module, hidden: torch.Tensor, attended: torch.Tensor, before: bool) -> torch.Tensor:
    """The part of a layer that works frame by frame, (…, D) → (…, D): what a compiler can fuse. `before`: pre-norm."""
    training, forward = module.training, module.feed_forward
    hidden = hidden + dropout(attended, module.dropout.p, training)
    if not before:
        hidden = norm(module.layer_norm, hidden)
    x = norm(module.final_layer_norm, hidden).to(attended.dtype) if before else hidden
    x = forward.intermediate_act_fn(linear(forward.intermediate_dense, x))
    x = linear(forward.output_dense, dropout(x, forward.intermediate_dropout.p, training))
    hidden = hidden + dropout(x, forward.output_dropout.p, training)
    if not before:
        return norm(module.final_layer_norm, hidden)
    if module.adapter_layer is not None:
        hidden = hidden + module.adapter_layer(hidden)
    return hidden


def ignore(out: torch.Tensor, instead: torch.Tensor) -> torch.Tensor:
    """`instead`, with a gradient of zero for `out`."""
    return torch.where(out.new_zeros((), dtype=torch.bool), out, instead)


def _project(x: torch.Tensor, num_heads: int, *modules: nn.Linear) -> torch.Tensor:
    """Several linear layers of the same input as one product: (…, D) → (…, layers, H, d)."""
    weight, bias = (torch.cat([getattr(m, name) for m in modules]) for name in ("weight", "bias"))
    out = cpu.linear(x, weight.to(x.dtype), bias.to(x.dtype))  # (…, layers · H · d)
    return out.unflatten(-1, (len(modules), num_heads, -1))


def take(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Frames (N, D) at `positions` (B, M) → (B · M, D)."""
    return x.index_select(0, positions.flatten())


def linear(module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return cpu.linear(x, module.weight.to(x.dtype), module.bias.to(x.dtype))


def norm(module: nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, module.normalized_shape, module.weight.to(x.dtype), module.bias.to(x.dtype), module.eps)


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
