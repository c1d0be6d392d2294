"""What only a CPU needs: faster products, dropout and attention with dropout, and settings of the allocator.

On x86 PyTorch sends float32 products to MKL. oneDNN, which it brings along, was 7 to 18 % faster at this model's shapes
on an AMD processor, in the forward pass and for the input's gradient. oneDNN keeps what it compiles for each shape, so
small models, which gain nothing, stay with MKL. On other devices these functions fall back to the stock ones.

Shapes: P frames that ask, M of an utterance; N frames that are attended to, T of an utterance; H heads, d width of a head.
"""

import ctypes

import torch
import torch.nn.functional as F

from w2v2.data.rows import Rows

_ONE_DNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
SMALLEST_WEIGHT = 2**17  # elements: below the narrowest projection of BASE, above the widest of `configs/models/small`


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (…, K) times weight (N, K) plus bias (N) → (…, N), as `F.linear`."""
    if _has_kernel(x, weight) and not torch.compiler.is_compiling():
        return _Linear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The same without bias and without gradient: x (…, K) times weight (N, K), of any strides → (…, N)."""
    return _ONE_DNN(x, weight, None, "none", [], "") if _has_kernel(x, weight) else F.linear(x, weight)


def _has_kernel(x: torch.Tensor, weight: torch.Tensor) -> bool:
    fits = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    return _ONE_DNN is not None and fits and weight.numel() >= SMALLEST_WEIGHT


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return _ONE_DNN(x, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        flat = gradient.reshape(-1, gradient.shape[-1])  # (…, N) -> (rows, N)
        d_x = product(flat, weight.T).view(x.shape) if ctx.needs_input_grad[0] else None
        d_weight = flat.T @ x.reshape(-1, x.shape[-1]) if ctx.needs_input_grad[1] else None  # MKL is faster at this one
        return d_x, d_weight, flat.sum(0) if ctx.has_bias and ctx.needs_input_grad[2] else None


def dropout(x: torch.Tensor, p: float, training: bool) -> torch.Tensor:
    """As `F.dropout`; on a CPU p is rounded to a multiple of 2⁻¹⁶."""
    if not training or p == 0.0:
        return x
    if x.device.type != "cpu" or p == 1.0 or torch.compiler.is_compiling():
        return F.dropout(x, p, training)
    return _Dropout.apply(x, p)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, p):
        kept = torch.empty(x.shape, dtype=torch.bool)
        draw_kept(kept, p)
        ctx.save_for_backward(kept)
        ctx.scale = 1.0 / (1.0 - p)
        return (x * kept).mul_(ctx.scale)

    @staticmethod
    def backward(ctx, gradient):
        (kept,) = ctx.saved_tensors
        return (gradient * kept).mul_(ctx.scale), None


def draw_kept(kept: torch.Tensor, p: float) -> None:
    """Fill `kept` (n, …), a bool tensor, with true with probability 1 − p; row by row, however many in one call."""
    # PyTorch's Bernoulli generator takes about 5 ns an element. Here each 64-bit draw holds four decisions of 16 bits.
    number = kept[0].numel()
    draws = torch.empty(len(kept), -(-number // 4), dtype=torch.int64).random_(-(2**63), None)
    draws = draws.view(torch.int16)[:, :number].view(kept.shape)  # (n, number / 4) -> (n, …)
    torch.ge(draws, round(p * 65_536) - 32_768, out=kept)


def attend_with_library(query, key, value, asking: Rows, attended: Rows, dropout: float) -> torch.Tensor:
    """Attention within each utterance, one after another: query (P, H, d), key and value (N, H, d) → (P, H, d)."""
    found = []
    for part in zip(asking.split(query), attended.split(key), attended.split(value), strict=True):
        q, k, v = (x.transpose(0, 1)[None] for x in part)  # (M or T, H, d) -> (1, H, M or T, d)
        found.append(F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)[0].transpose(0, 1))
    return asking.join(found)


class _AttentionInBlocks(torch.autograd.Function):
    """Computes as many heads of an utterance at a time as there are threads, so that their weights stay in the cache.

    As in flash attention (Dao et al., 2022, algorithm 4), the backward pass computes the weights again. One byte a
    weight is kept: whether it was dropped.
    """

    @staticmethod
    def forward(ctx, query, key, value, asking, attended, dropout):
        out, masks = query.new_zeros(query.shape), []
        for part in zip(*map(asking.split, (query, out)), *map(attended.split, (key, value)), strict=True):
            q, o, k, v = (x.transpose(0, 1) for x in part)  # (M or T, H, d) -> (H, M or T, d)
            masks.append(torch.empty(len(q), q.shape[1], k.shape[1], dtype=torch.bool))
            for heads, (p, f) in _blocks(q, k, 2):
                _weigh(q[heads], k[heads], out=p)
                draw_kept(masks[-1][heads], dropout)
                torch.bmm(p.mul_(f.copy_(masks[-1][heads])), v[heads], out=o[heads])
        out *= 1.0 / (1.0 - dropout)
        ctx.save_for_backward(query, key, value, out, *masks)
        ctx.rows, ctx.dropout = (asking, attended), dropout
        return out

    @staticmethod
    def backward(ctx, gradient):
        query, key, value, out, *masks = ctx.saved_tensors
        shift = (gradient * out).sum(-1, keepdim=True)  # (P, H, 1)
        scaled = gradient * (1.0 / (1.0 - ctx.dropout))
        d_query, d_key, d_value = (x.new_zeros(x.shape) for x in (query, key, value))
        asking, attended = ctx.rows
        own, others = (query, d_query, scaled, shift), (key, d_key, value, d_value)
        for kept, *part in zip(masks, *map(asking.split, own), *map(attended.split, others), strict=True):
            q, d_q, g, s, k, d_k, v, d_v = (x.transpose(0, 1) for x in part)
            for heads, (p, dp, f) in _blocks(q, k, 3):
                # 1. The weights again, and which of them were kept.
                _weigh(q[heads], k[heads], out=p)
                f.copy_(kept[heads])
                # 2. Through dropout and softmax to the gradient of the scores.
                torch.bmm(g[heads], v[heads].transpose(1, 2), out=dp)
                dp.mul_(f).sub_(s[heads]).mul_(p)
                # 3. The gradients of value, query and key.
                torch.bmm(p.mul_(f).transpose(1, 2), g[heads], out=d_v[heads])
                torch.bmm(dp, k[heads], out=d_q[heads])
                torch.bmm(dp.transpose(1, 2), q[heads], out=d_k[heads])
        scale = query.shape[-1] ** -0.5
        return d_query.mul_(scale), d_key.mul_(scale), d_value, None, None, None


attend_in_blocks = _AttentionInBlocks.apply  # as `attend_with_library`, which has no kernel for dropout on a CPU


def _weigh(query: torch.Tensor, key: torch.Tensor, out: torch.Tensor) -> None:
    """Attention weights of query (h, M, d) and key (h, T, d): (h, M, T)."""
    scale = query.shape[-1] ** -0.5
    torch.softmax(torch.baddbmm(out, query, key.transpose(1, 2), beta=0, alpha=scale, out=out), -1, out=out)


def _blocks(query: torch.Tensor, key: torch.Tensor, number: int):
    """The heads of query (H, M, d) and key (H, T, d) that are computed together, with buffers (heads, M, T)."""
    together = min(len(query), torch.get_num_threads())
    buffers = [query.new_empty(together, query.shape[1], key.shape[1]) for _ in range(number)]
    for first in range(0, len(query), together):
        yield slice(first, first + together), [x[: len(query) - first] for x in buffers]


def keep_freed() -> None:
    """Let the C library (glibc) keep what a micro-batch freed for the next one, as a GPU's allocator does.

    By default it maps, clears and unmaps every activation. What is kept has gaps, into which the largest tensors never
    fit: these are still mapped. Micro-batches of many lengths leave more gaps: call `give_back` from time to time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is not None:
        mallopt(-3, 16 << 20)  # M_MMAP_THRESHOLD, in bytes: 6 MB take 4 % of the speed, 32 MB 2 to 8 % more memory
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never


def give_back() -> None:
    """Let glibc return freed memory to the system, which `keep_freed` prevents."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
