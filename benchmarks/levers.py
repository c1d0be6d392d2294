"""What a GPU's kernels and products take alone at the shapes of BASE, a step of `gpu_session.py`.

Each line is a lever of the program, or one that it could have, beside the library's way. Its rate is that of the bytes
which have to be moved, or of the operations. Predictions for an H200: GELU at 4 TB/s both ways; dropout, addition and
norm in 60 % of the library's time.

Shapes: N slots, T frames of an utterance, D width, C conv channels, H heads.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from w2v2.data.rows import Rows
from w2v2.model.feature_encoder import _PairsWithNext
from w2v2.model.transformer import attend

D, INNER, C, H, LAYERS = 768, 3072, 512, 12, 12
REPEATS = 7


class Line(NamedTuple):
    what: str
    call: Callable[[], object]
    number: int  # of such calls for a micro-batch
    moved: float = 0.0  # bytes
    operations: float = 0.0


def measure(device: torch.device, seconds: float, frames: int = 720) -> list[list]:
    """Each lever's name, µs a call, µs for each second of audio in micro-batches of so many seconds, and rate.

    frames: of an utterance.
    """
    N, found = int(50 * seconds) // frames * frames, []
    for lines in (
        products(N, device),
        gelus(N, device),
        norms(N, device),
        attentions(N, frames, device),
        convs(N, device),
    ):
        for line in lines:
            us = median_us(line.call, device)
            rate = f"{line.moved / us / 1e6:.2f} TB/s" if line.moved else f"{line.operations / us / 1e6:.0f} TFLOP/s"
            found.append([line.what, us, us * line.number / seconds, rate])
    return found


def median_us(call: Callable[[], object], device: torch.device) -> float:
    found = []
    for _ in range(REPEATS + 2):  # the first two warm up
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - started)
    return 1e6 * statistics.median(found[2:])


def noise(device: torch.device, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=device, dtype=torch.bfloat16, requires_grad=True)


def passes(function: Callable, *inputs: torch.Tensor) -> Callable[[], object]:
    """Forward and backward pass of `function`."""
    leaves = [x for x in inputs if x.requires_grad]
    gradient = torch.ones_like(function(*inputs))
    return lambda: torch.autograd.grad(function(*inputs), leaves, gradient)


def has_kernels(device: torch.device) -> bool:
    return device.type == "cuda"


def products(N: int, device: torch.device) -> Iterator[Line]:
    """The ceilings, and the gradient of a weight in 16 bits or added up in float32."""
    x, gradient = noise(device, N, D).detach(), noise(device, N, INNER).detach()
    weight, total = noise(device, INNER, D).detach(), torch.zeros(INNER, D, device=device)
    size = 2.0 * N * D * INNER
    yield Line("copy", lambda: gradient.clone(), 1, moved=4.0 * gradient.numel())
    yield Line("product, first of the FFN", lambda: F.linear(x, weight), LAYERS, operations=size)
    yield Line("its weight's gradient", lambda: total.add_(gradient.T @ x), LAYERS, operations=size)
    if device.type == "cuda":
        add = torch.addmm
        yield Line("the same, added by the product", lambda: add(total, gradient.T, x, out_dtype=torch.float32), LAYERS,
                   operations=size)  # fmt: skip


def gelus(N: int, device: torch.device) -> Iterator[Line]:
    """Forward: one reading, one writing. Backward: two readings, one writing."""
    for what, shape, number in (("FFN", (N, INNER), LAYERS), ("first conv", (64 * N, C), 1)):
        x, bias = noise(device, *shape), noise(device, shape[1])
        moved = 10.0 * x.numel()
        yield Line(f"GELU and bias, {what}", passes(lambda x, bias: F.gelu(x + bias), x, bias), number, moved)
        if has_kernels(device):
            from w2v2.model.kernels import gelu

            yield Line(f"GELU and bias, {what}, kernel", passes(gelu, x, bias), number, moved)


def norms(N: int, device: torch.device) -> Iterator[Line]:
    """Bias, dropout, addition, norm: forward three readings and writings, backward five."""
    x, bias, residual = noise(device, N, D), noise(device, D), noise(device, N, D)
    norm, moved = nn.LayerNorm(D, device=device), 16.0 * N * D

    def library(x, bias, residual):
        total = residual + F.dropout(x + bias, 0.1)
        return F.layer_norm(total, (D,), norm.weight.to(x.dtype), norm.bias.to(x.dtype))

    yield Line("dropout, addition, norm", passes(library, x, bias, residual), 2 * LAYERS, moved)
    if has_kernels(device):
        from w2v2.model.kernels import Dropout, add_dropped

        dropout = Dropout(0.1, torch.zeros(1, dtype=torch.int64, device=device))
        kernel = passes(lambda *own: add_dropped(*own, dropout, norm)[1], x, bias, residual)
        yield Line("dropout, addition, norm, kernel", kernel, 2 * LAYERS, moved)


def attentions(N: int, T: int, device: torch.device) -> Iterator[Line]:
    frames = torch.full((N // T,), T)
    rows = Rows.build(frames, torch.zeros_like(frames)).map(lambda x: x.to(device))
    qkv, operations = [noise(device, N, H, D // H) for _ in range(3)], 3.5 * 4.0 * N * T * D
    for p in (0.1, 0.0):
        call = passes(lambda *own, p=p: attend(*own, rows, rows, p), *qkv)
        yield Line(f"attention, dropout {p}", call, LAYERS, operations=operations)


def convs(N: int, device: torch.device) -> Iterator[Line]:
    """The second conv: two products of which one adds; even and odd frames apart; the library's."""
    x, weight = noise(device, 64 * N, C), noise(device, C, C, 3)
    image = x.detach().T[None, :, None].requires_grad_()  # (1, C, 1, 64 · N), channels last in memory
    flat = weight.detach()[:, :, None].to(memory_format=torch.channels_last).requires_grad_()
    ways = {
        "two products": passes(_PairsWithNext.apply, x, weight),
        "even and odd": lambda: even_and_odd(x.detach(), weight.detach()),
        "the library's": passes(lambda image, flat: F.conv2d(image, flat, stride=(1, 2)), image, flat),
    }
    for way, call in ways.items():
        yield Line(f"second conv, {way}", call, 1, operations=3 * 2.0 * 32 * N * 3 * C * C)


def even_and_odd(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A conv of kernel 3 and stride 2 on (N, C), and its gradients where that of the output is the output itself.

    The windows of even outputs do not overlap, those of odd ones neither.
    """
    (N, C), weight = x.shape, weight.transpose(1, 2).flatten(1)  # (O, C, 3) -> (O, 3 · C)
    out, d_x, d_weight = x.new_zeros(N // 2, len(weight)), torch.zeros_like(x), 0.0
    for first in (0, 1):
        own = out[first : N // 2 - 1 : 2]
        windows, gradients = (
            y.view(-1)[2 * first * C :].as_strided((len(own), 3 * C), (4 * C, 1)) for y in (x, d_x)
        )  # the next window begins four frames later
        torch.mm(windows, weight.T, out=own)
        gradients.addmm_(own, weight)
        d_weight = d_weight + own.T @ windows
    return out, d_x, d_weight.unflatten(1, (3, C)).transpose(1, 2)
