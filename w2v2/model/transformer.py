"""The transformer as functions over the stock modules' parameters: positional convolution, layers, attention.

They compute what the stock modules compute, in the type that they are given; norms and softmax are float32 inside.

Utterances lie side by side, each followed by a gap of a slot or two. On a GPU in 16 bits one call of the flash kernel
takes utterances of any lengths; a gap attends to itself, which nobody hears. Elsewhere each utterance goes to the
library's kernel by itself. A mask would keep the fast kernels away.

Shapes: B utterances, N slots, P masked frames, D width, H heads, d width of a head; G groups of the positional
convolution, k its taps, R frames that a block of its product gives, Q blocks.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from w2v2.data.rows import Rows
from w2v2.model import cpu
from w2v2.model.cpu import attend_in_blocks, attend_with_library, dropout

BLOCK = 8  # R
# The function behind nested tensors' `scaled_dot_product_attention`. It is differentiable and has dropout, which the
# public `torch.nn.attention.varlen` lacks. Nested tensors would cost the host some hundred microseconds a call.
_FLASH = torch.ops.aten._flash_attention_forward.default


def positional(module: nn.Module, hidden: torch.Tensor, rows: Rows, in_blocks: bool | None) -> torch.Tensor:
    """Convolutional position embedding (N, D) → (N, D), of each utterance alone; a gap's is that of zeros.

    in_blocks: None where it pays, on an accelerator.
    """
    conv = module.conv
    weight, bias = conv.weight.to(hidden.dtype), conv.bias.to(hidden.dtype)
    if hidden.device.type != "cpu" if in_blocks is None else in_blocks:
        return module.activation(_ConvolveInBlocks.apply(hidden, weight, find_blocks(rows, weight.shape[-1])) + bias)
    found = []
    for x in rows.split(hidden):
        out = F.conv1d(x.T[None], weight, bias, padding=conv.padding, groups=conv.groups)  # (1, D, T or T + 1)
        found.append(out[0, :, : len(x)].T)
    return module.activation(rows.join(found))


def find_blocks(rows: Rows, k: int) -> torch.Tensor:
    """The slots of each R frames of an utterance, with k / 2 before and behind; N beyond it: (Q, k + R) int64."""
    device, N = rows.row.device, len(rows.row)
    # 1. The utterance of each block, and the slot where its window begins: (Q,). There may be fewer blocks than Q.
    ends = (-(-rows.frames // BLOCK)).cumsum(0)  # (B,) numbers of blocks
    number = torch.arange(N // BLOCK + len(ends), device=device)
    row = torch.searchsorted(ends, number, right=True).clamp_max(len(ends) - 1)
    begin = rows.first[row] + (number - F.pad(ends, (1, 0))[row]) * BLOCK - k // 2
    # 2. The slots from there on, unless they lie beyond the utterance.
    slots, first = begin[:, None] + torch.arange(k + BLOCK, device=device), rows.first[row, None]
    return torch.where((slots >= first) & (slots < first + rows.frames[row, None]), slots, N)


class _ConvolveInBlocks(torch.autograd.Function):
    """Grouped convolution (N, D) as one product a group; libraries are slow at it with groups of 48 channels.

    R neighbouring outputs share a window of k + R frames, of which a band matrix makes all R. The input's gradient
    is the same convolution of the output's, with the taps in reverse order.
    """

    @staticmethod
    def forward(ctx, x, weight, slots):  # weight (D, D / G, k)
        taps = weight.unflatten(0, (x.shape[1] // weight.shape[1], -1)).permute(0, 3, 2, 1)  # -> (G, k, in, out)
        windows = _take_windows(x, slots, len(taps))
        ctx.save_for_backward(windows, taps, slots)
        return _put_blocks(windows @ _band(taps, 0), slots, taps.shape[1], len(x))

    @staticmethod
    def backward(ctx, gradient):
        windows, taps, slots = ctx.saved_tensors
        G, k, _, width = taps.shape
        around = _take_windows(gradient, slots, G)
        # 1. The taps': each output frame's share of the band.
        own = around[..., k // 2 * width : (k // 2 + BLOCK) * width]  # (G, Q, R · out)
        product = (windows.transpose(1, 2) @ own).view(G, k + BLOCK, -1, BLOCK, width)  # (G, k + R, in, R, out)
        d_taps = sum(product[:, r : r + k, :, r] for r in range(BLOCK))  # (G, k, in, out)
        d_weight = d_taps.permute(0, 3, 2, 1).flatten(0, 1)  # -> (D, D / G, k)
        # 2. The input's. An even number of taps hears one frame more before its output than behind it.
        reverse = _band(taps.flip(1).transpose(2, 3), 1 - k % 2)
        return _put_blocks(around @ reverse, slots, k, len(gradient)), d_weight, None


def _band(taps: torch.Tensor, later: int) -> torch.Tensor:
    """Taps (G, k, in, out), shifted by one frame for each of R outputs: (G, (k + R) · in, R · out)."""
    shifted = [F.pad(taps, (0, 0, 0, 0, later + r, BLOCK - later - r)) for r in range(BLOCK)]
    return torch.stack(shifted, dim=3).flatten(1, 2).flatten(2)


def _take_windows(x: torch.Tensor, slots: torch.Tensor, groups: int) -> torch.Tensor:
    """Frames (N, D) at `slots` (Q, width), zeros at N: (G, Q, width · D / G)."""
    x = F.pad(x, (0, 0, 0, 1)).unflatten(1, (groups, -1)).transpose(0, 1).contiguous()  # (G, N + 1, D / G)
    return x.index_select(1, slots.flatten()).view(groups, len(slots), -1)


def _put_blocks(out: torch.Tensor, slots: torch.Tensor, k: int, number: int) -> torch.Tensor:
    """Blocks of frames (G, Q, R · D / G) in the middle of their `slots` (Q, k + R): (N, D), zeros elsewhere."""
    frames = out.unflatten(2, (BLOCK, -1)).permute(1, 2, 0, 3).flatten(2).flatten(0, 1)  # (Q · R, D)
    own = slots[:, k // 2 : k // 2 + BLOCK].flatten()
    return frames.new_zeros(number + 1, frames.shape[1]).index_copy(0, own, frames)[:number]


def layer(
    module: nn.Module,
    hidden: torch.Tensor,
    rows: Rows,
    dtype: torch.dtype,
    rest: Callable | None = None,
    asked: tuple[torch.Tensor, Rows] | None = None,
) -> torch.Tensor:
    """One transformer layer, post-norm (BASE) or pre-norm (LARGE): (N, D) → (N, D).

    Args:
        dtype: of the products, and of the post-norm residual. The pre-norm residual, a sum over layers, keeps its own.
        rest: `after_attention`, perhaps compiled.
        asked: (P,) int64, the slots whose output is asked for, (P, D), and whose they are. The others are only
            attended to.
    """
    attention, before = module.attention, hasattr(module, "adapter_layer")  # pre-norm layers alone have that
    x = norm(module.layer_norm, hidden).to(dtype) if before else hidden
    dropped = attention.dropout if module.training else 0.0
    if asked is None:
        qkv = _project(x, attention.num_heads, attention.q_proj, attention.k_proj, attention.v_proj)  # (N, 3, H, d)
        attended = attend(*qkv.unbind(1), rows, rows, dropped)  # (N, H, d)
    else:
        slots, own = asked
        query = _project(x.index_select(0, slots), attention.num_heads, attention.q_proj)  # (P, 1, H, d)
        keys_values = _project(x, attention.num_heads, attention.k_proj, attention.v_proj)  # (N, 2, H, d)
        attended = attend(query[:, 0], *keys_values.unbind(1), own, rows, dropped)  # (P, H, d)
        hidden = hidden.index_select(0, slots)
    attended = attended.flatten(-2)  # (N or P, H, d) -> (N or P, D)
    return (rest or after_attention)(module, hidden, attended, before)


def after_attention(module: nn.Module, hidden: torch.Tensor, attended: torch.Tensor, before: bool) -> torch.Tensor:
    """The part of a layer that works frame by frame, (…, D) → (…, D): what a compiler can fuse. `before`: pre-norm."""
    training, forward = module.training, module.feed_forward
    attended = linear(module.attention.out_proj, attended)
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


def _project(x: torch.Tensor, num_heads: int, *modules: nn.Linear) -> torch.Tensor:
    """Several linear layers of the same input as one product: (…, D) → (…, layers, H, d)."""
    weight, bias = (torch.cat([getattr(m, name) for m in modules]) for name in ("weight", "bias"))
    out = cpu.linear(x, weight.to(x.dtype), bias.to(x.dtype))  # (…, layers · H · d)
    return out.unflatten(-1, (len(modules), num_heads, -1))


def linear(module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return cpu.linear(x, module.weight.to(x.dtype), module.bias.to(x.dtype))


def norm(module: nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, module.normalized_shape, module.weight.to(x.dtype), module.bias.to(x.dtype), module.eps)


def attend(query, key, value, asking: Rows, attended: Rows, dropout: float = 0.0) -> torch.Tensor:
    """Attention within each utterance: query (P, H, d), key and value (N, H, d) → (P, H, d). Gaps get any values."""
    if takes_any_lengths(query):
        bounds = asking.bounds, attended.bounds, asking.longest, attended.longest
        return _FLASH(query, key, value, *bounds, dropout, False, False)[0]
    way = attend_in_blocks if dropout > 0.0 and query.device.type == "cpu" else attend_with_library
    return way(query, key, value, asking, attended, dropout)


def takes_any_lengths(x: torch.Tensor) -> bool:
    """Whether the flash kernel takes (…, H, d) of different lengths: in 16 bits, on an NVIDIA GPU since Ampere."""
    if x.device.type != "cuda" or x.dtype not in (torch.bfloat16, torch.float16):
        return False
    # Not every device has the backward pass of wider heads.
    fits = x.shape[-1] % 8 == 0 and x.shape[-1] <= 192 and torch.cuda.get_device_capability(x.device) >= (8, 0)
    return fits and torch.version.cuda is not None and torch.backends.cuda.is_flash_attention_available()


def skips_rows(x: torch.Tensor) -> bool:
    """Whether layers are computed for the utterances that keep them alone, and not for all in one shape."""
    return x.device.type == "cpu"
