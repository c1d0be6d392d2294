"""Triton kernels of what a layer does frame by frame: bias and GELU; bias, dropout, addition and layer norm.

Each reads and writes every element once a pass. The library's kernels are several times as many. Backward kernels sum
the gradients of biases and of the norm's weight on the way: every program its own rows, then one sum over programs, so
that a result never depends on who came first. Whatever is computed is computed in float32.

Dropout compares a hash of (seed, number of the element) with a threshold, and the backward pass computes it again. The
seed stays on the device and comes from torch's generator there. So it follows `seed_noise`, and the replays of a CUDA
graph have new ones.

Shapes: N frames, D columns.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import nn
from torch.autograd.function import once_differentiable

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # TRITON_INTERPRET=1: NumPy in the place of a GPU
ROWS, COLUMNS = 16, 256  # of a block of GELU
STEPS = 8  # blocks that a program of its backward pass goes through
WARPS = 4
MOST_PROGRAMS = 1056  # of the norm's backward pass: eight on each multiprocessor of an H100 or H200
LEAST_ROWS = 16  # of one of them: its sums cost as much as two rows


def available(x: torch.Tensor) -> bool:
    """Whether the kernels take this tensor: on an NVIDIA GPU, or wherever Triton interprets them."""
    has_device = x.device.type == "cuda" and torch.version.cuda is not None
    return (has_device or bool(INTERPRETED)) and x.dtype in (torch.bfloat16, torch.float16, torch.float32)


@triton.jit
def _tail(x):
    """Of the normal distribution: probability beyond |x| to 8e-8, and e^(−x²/2), its density at x times √(2π).

    Abramowitz and Stegun, 7.1.26, takes one exponential and one division.
    """
    power = x * (x * -0.7213475204444817)  # −x²/2 · log2(e)
    scale = 1.0 + 0.2316418882663604 * tl.abs(x)
    if INTERPRETED:
        bell, t = tl.exp2(power), 1.0 / scale
    else:  # Without these instructions each call would treat denormal numbers apart.
        bell = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [power], tl.float32, is_pure=True, pack=1
        )
        t = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [scale], tl.float32, is_pure=True, pack=1)
    series = 0.127414796 + t * (-0.142248368 + t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145)))
    return bell * (t * series), bell


@triton.jit
def _gelu_forward(x_ptr, bias_ptr, out_ptr, N, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    first, columns = tl.program_id(0) * ROWS, tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    rows, inside = tl.arange(0, ROWS), columns < D
    here = first.to(tl.int64) * D + rows[:, None] * D + columns[None]
    mask = (rows < N - first)[:, None] & inside[None]
    x = tl.load(x_ptr + here, mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + columns, inside, other=0.0).to(tl.float32)[None]
    tail, _ = _tail(x)
    x = tl.maximum(x, 0.0) - tl.abs(x) * tail  # x · Φ(x)
    tl.store(out_ptr + here, x.to(out_ptr.dtype.element_ty), mask)


@triton.jit
def _gelu_backward(
    d_out_ptr, x_ptr, bias_ptr, d_x_ptr, sums_ptr, N,
    D: tl.constexpr, STEPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A program goes down STEPS blocks of ROWS frames. sums: (programs, D), of the gradient, which is the bias's too."""
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    rows, inside = tl.arange(0, ROWS), columns < D
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for step in range(STEPS):
        first = (tl.program_id(0) * STEPS + step) * ROWS
        here = first.to(tl.int64) * D + rows[:, None] * D + columns[None]
        mask = (rows < N - first)[:, None] & inside[None]
        x = tl.load(x_ptr + here, mask, other=0.0).to(tl.float32)
        d_out = tl.load(d_out_ptr + here, mask, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            x += tl.load(bias_ptr + columns, inside, other=0.0).to(tl.float32)[None]
        tail, bell = _tail(x)
        d_x = d_out * (tl.where(x < 0, tail, 1.0 - tail) + x * (bell * 0.3989422804014327))  # Φ(x) + x · φ(x)
        tl.store(d_x_ptr + here, d_x.to(d_x_ptr.dtype.element_ty), mask)
        total += d_x
    if bias_ptr is not None:
        tl.store(sums_ptr + tl.program_id(0).to(tl.int64) * D + columns, tl.sum(total, 0), inside)


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias):
        N, D = x.shape
        out, grid = torch.empty_like(x), (triton.cdiv(N, ROWS), triton.cdiv(D, COLUMNS))
        _gelu_forward[grid](x, bias, out, N, D, ROWS, COLUMNS, num_warps=WARPS)
        ctx.save_for_backward(x, bias)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        x, bias = ctx.saved_tensors
        N, D = x.shape
        d_x, grid = torch.empty_like(x), (triton.cdiv(N, ROWS * STEPS), triton.cdiv(D, COLUMNS))
        sums = None if bias is None else x.new_empty(grid[0], D, dtype=torch.float32)
        _gelu_backward[grid](d_out.contiguous(), x, bias, d_x, sums, N, D, STEPS, ROWS, COLUMNS, num_warps=WARPS)
        return d_x, None if bias is None else sums.sum(0)


def gelu(x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """GELU, x · Φ(x), of x (…, D) plus bias (D); its absolute error is below 3e-7."""
    return _Gelu.apply(x.flatten(0, -2).contiguous(), bias).view(x.shape)


@triton.jit
def _is_kept(seed_ptr, numbers, LEAST: tl.constexpr):
    """Whether each element (its number, uint32) stays: with probability 1 − LEAST / 2³².

    Three rounds of shift, exclusive or and product (their numbers: github.com/skeeto/hash-prospector), keyed with both
    halves of the seed (int64). Triton's own generator takes about eight times as many instructions.
    """
    seed = tl.load(seed_ptr)
    x = numbers * 0x9E3779B1 + seed.to(tl.uint32)
    x = (x ^ (x >> 16)) * 0x21F0AAAD + (seed >> 32).to(tl.uint32)
    x = (x ^ (x >> 15)) * 0x735A2D97
    return (x ^ (x >> 15)) * 0x2C1B3C6D >= LEAST


@triton.jit
def _add_forward(
    x_ptr, bias_ptr, residual_ptr, seed_ptr, weight_ptr, offset_ptr, sum_ptr, normed_ptr, stats_ptr, scale, eps,
    LEAST: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program takes one frame."""
    row, columns = tl.program_id(0), tl.arange(0, BLOCK)
    inside, here = columns < D, tl.program_id(0).to(tl.int64) * D + columns
    x = tl.load(x_ptr + here, inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + columns, inside, other=0.0).to(tl.float32)
    if LEAST > 0:
        x = tl.where(_is_kept(seed_ptr, (row * D + columns).to(tl.uint32), LEAST), x * scale, 0.0)
    x += tl.load(residual_ptr + here, inside, other=0.0).to(tl.float32)
    total = x.to(sum_ptr.dtype.element_ty)
    tl.store(sum_ptr + here, total, inside)
    if weight_ptr is not None:
        x = total.to(tl.float32)  # what the backward pass will find
        mean = tl.sum(x, 0) / D
        centred = tl.where(inside, x - mean, 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / D + eps)
        normed = centred * rstd * tl.load(weight_ptr + columns, inside, other=0.0).to(tl.float32)
        normed += tl.load(offset_ptr + columns, inside, other=0.0).to(tl.float32)
        tl.store(normed_ptr + here, normed.to(normed_ptr.dtype.element_ty), inside)
        tl.store(stats_ptr + row, mean)
        tl.store(stats_ptr + tl.num_programs(0) + row, rstd)


@triton.jit
def _add_backward(
    d_sum_ptr, d_normed_ptr, sum_ptr, seed_ptr, weight_ptr, stats_ptr, d_residual_ptr, d_x_ptr, sums_ptr, N,
    num_rows, scale, LEAST: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program takes `num_rows` frames. sums: (3, programs, D), of the gradients of bias, norm's weight and norm's bias."""
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    nothing = tl.zeros([BLOCK], tl.float32)
    d_bias, d_weight, d_offset = nothing, nothing, nothing
    if d_normed_ptr is not None:
        weight = tl.load(weight_ptr + columns, inside, other=0.0).to(tl.float32)
    first = tl.program_id(0).to(tl.int64) * num_rows
    for step in range(0, tl.minimum(num_rows, N - first)):
        row = first + step
        here = row * D + columns
        d = nothing
        if d_normed_ptr is not None:
            mean, rstd = tl.load(stats_ptr + row), tl.load(stats_ptr + N + row)
            unit = (tl.load(sum_ptr + here, inside, other=0.0).to(tl.float32) - mean) * rstd
            d_normed = tl.load(d_normed_ptr + here, inside, other=0.0).to(tl.float32)
            d_weight += d_normed * unit
            d_offset += d_normed
            d = d_normed * weight
            d = (d - tl.sum(d, 0) / D - unit * (tl.sum(d * unit, 0) / D)) * rstd
        if d_sum_ptr is not None:
            d += tl.load(d_sum_ptr + here, inside, other=0.0).to(tl.float32)
        if d_normed_ptr is not None:
            tl.store(d_residual_ptr + here, d.to(d_residual_ptr.dtype.element_ty), inside)
        if LEAST > 0:
            d = tl.where(_is_kept(seed_ptr, (row * D + columns).to(tl.uint32), LEAST), d * scale, 0.0)
        tl.store(d_x_ptr + here, d.to(d_x_ptr.dtype.element_ty), inside)
        d_bias += d
    size = tl.num_programs(0).to(tl.int64) * D
    here = tl.program_id(0).to(tl.int64) * D + columns
    tl.store(sums_ptr + here, d_bias, inside)
    if d_normed_ptr is not None:
        tl.store(sums_ptr + size + here, d_weight, inside)
        tl.store(sums_ptr + 2 * size + here, d_offset, inside)


class Dropout(NamedTuple):
    """Dropout with probability p. The seed is int64 on the device, drawn by its generator."""

    p: float
    seed: torch.Tensor


class _AddDropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, residual, dropout, weight, offset, eps):
        ctx.set_materialize_grads(False)  # of an output that nobody used
        (N, D), (p, seed) = x.shape, dropout
        scale, least = 1.0 / (1.0 - p) if p < 1.0 else 0.0, min(round(p * 2**32), 2**32 - 1)
        total, normed, stats = torch.empty_like(residual), None, None
        if weight is not None:
            normed, stats = torch.empty_like(x), x.new_empty(2, N, dtype=torch.float32)  # mean, 1 / standard deviation
        tensors = x, bias, residual, seed, weight, offset, total, normed, stats
        _add_forward[N,](*tensors, scale, eps, least, D, triton.next_power_of_2(D), num_warps=WARPS)
        ctx.save_for_backward(total, seed, weight, stats)
        ctx.dropped, ctx.dtype, ctx.has_bias = (scale, least), x.dtype, bias is not None
        return total, normed

    @staticmethod
    @once_differentiable
    def backward(ctx, d_total, d_normed):
        total, seed, weight, stats = ctx.saved_tensors
        (N, D), (scale, least) = total.shape, ctx.dropped
        num_rows = max(LEAST_ROWS, triton.cdiv(N, MOST_PROGRAMS))
        programs, block = triton.cdiv(N, num_rows), triton.next_power_of_2(D)
        d_total, d_normed = (None if d is None else d.contiguous() for d in (d_total, d_normed))
        d_x = torch.empty_like(total, dtype=ctx.dtype)
        d_residual = d_total if d_normed is None else torch.empty_like(total)
        sums = total.new_empty(3, programs, D, dtype=torch.float32)
        tensors = d_total, d_normed, total, seed, weight, stats, d_residual, d_x, sums
        _add_backward[programs,](*tensors, N, num_rows, scale, least, D, block, num_warps=WARPS)
        d_bias = sums[0].sum(0) if ctx.has_bias else None
        d_weight, d_offset = (None, None) if d_normed is None else sums[1:].sum(1)
        return d_x, d_bias, d_residual, None, d_weight, d_offset, None


def add_dropped(
    x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor, dropout: Dropout, norm: nn.LayerNorm | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """residual + dropout(x + bias), (N, D) in the type of the residual, and its norm in the type of x."""
    weights = (None, None, 0.0) if norm is None else (norm.weight, norm.bias, norm.eps)
    return _AddDropped.apply(x.contiguous(), bias, residual.contiguous(), dropout, *weights)
