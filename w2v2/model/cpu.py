"""Matrix products and dropout through the fastest kernels that the library has for them on a CPU; elsewhere the stock functions.

On x86 PyTorch sends float32 products to MKL. oneDNN, which it brings along for other uses, was 7 to 18 % faster at the shapes of this
model on an AMD processor in the forward pass and for the input's gradient; for the weight's gradient MKL is kept. PyTorch's bernoulli
generator takes about 5 ns an element; a quarter of a 64-bit draw decides as well.

oneDNN keeps what it has compiled for each shape (up to 1,024 of them). Small models gain nothing from it, hear batches of many shapes, and
would grow by that: theirs stay with MKL.
"""

import torch
import torch.nn.functional as F

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
        flat = gradient.reshape(-1, gradient.shape[-1])
        d_x = product(flat, weight.T).view(x.shape) if ctx.needs_input_grad[0] else None
        d_weight = flat.T @ x.reshape(-1, x.shape[-1]) if ctx.needs_input_grad[1] else None
        return d_x, d_weight, flat.sum(0) if ctx.has_bias and ctx.needs_input_grad[2] else None


def dropout(x: torch.Tensor, p: float, training: bool) -> torch.Tensor:
    """As `F.dropout`, from torch's generator of the device; on a CPU p is rounded to a multiple of 2⁻¹⁶."""
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
    """Fill `kept` (n, …) (bool, on the CPU) with what dropout of probability p leaves: true with probability 1 − p.

    Its rows draw one after the other, so that it does not matter how many are drawn at a time.
    """
    number = kept[0].numel()
    draws = torch.empty(len(kept), -(-number // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    torch.ge(draws[:, :number].view(kept.shape), round(p * 65_536) - 32_768, out=kept)
