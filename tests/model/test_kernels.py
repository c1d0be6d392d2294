"""The Triton kernels against the library in float64: on a GPU as they are, elsewhere in Triton's interpreter."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_batch, tiny_config
from parity import distance, fix_codes, pair, passes
from torch import nn
from torch.utils.checkpoint import checkpoint

from w2v2.errors import UserError
from w2v2.model import transformer

pytest.importorskip("triton", reason="the package triton is not installed")
from w2v2.model import fused, kernels
from w2v2.model.kernels import Dropout, add_dropped, gelu

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SEED = 0x1234_5678_9ABC_DEF0
WITHIN = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # of the norm: a few roundings
TYPES = pytest.mark.parametrize("dtype", WITHIN, ids=lambda dtype: str(dtype).removeprefix("torch."))


def noise(*shape, dtype=torch.float32, scale=1.0):
    return (torch.randn(shape) * scale).to(DEVICE, dtype).requires_grad_()


class Counted:
    """A kernel that writes down its launches."""

    def __init__(self, kernel, calls):
        self.kernel, self.calls = kernel, calls

    def __getitem__(self, grid):
        self.calls.append(grid)
        return self.kernel[grid]


def exact(*tensors):
    return [t.detach().cpu().double().requires_grad_() for t in tensors]


def assert_same(outputs, inputs, expected, references, within):
    """Equal values, and equal gradients of the same random weighting of them."""
    weights = [torch.randn(out.shape).to(out.dtype) for out in outputs]
    found = torch.autograd.grad(outputs, inputs, [w.to(DEVICE) for w in weights])
    reference = torch.autograd.grad(expected, references, [w.double() for w in weights])
    for ours, theirs in zip([*outputs, *found], [*expected, *reference], strict=True):
        assert torch.dist(ours.detach().cpu().double(), theirs.detach()) < within * theirs.detach().norm()


def kept(shape, p, seed=SEED):
    """What dropout keeps of a tensor, by the hash written anew in NumPy."""
    x = np.arange(np.prod(shape), dtype=np.uint64)
    x = (x * 0x9E3779B1 + (seed & 0xFFFFFFFF)) % 2**32
    x = ((x ^ x >> 16) * 0x21F0AAAD + (seed >> 32)) % 2**32
    x = ((x ^ x >> 15) * 0x735A2D97) % 2**32
    x = ((x ^ x >> 15) * 0x2C1B3C6D) % 2**32
    return torch.from_numpy(x >= p * 2**32).reshape(shape)


def test_gelu_is_exact_to_rounding():
    x = torch.linspace(-9, 9, 30_000, device=DEVICE).view(10, 30, 100).requires_grad_()
    (a,) = exact(x)
    ours, theirs = gelu(x), F.gelu(a)
    found, reference = (torch.autograd.grad(out.sum(), inputs)[0].cpu() for out, inputs in ((ours, x), (theirs, a)))
    assert float(((ours.cpu() - theirs).abs() / theirs.abs().clamp_min(1)).detach().max()) < 2.5e-7
    assert float((found - reference).abs().max()) < 3e-7


@TYPES
@pytest.mark.parametrize("shape", [(37, 96), (1, 1), (131, 300)], ids=str)
def test_gelu_of_a_biased_product(shape, dtype):
    x, bias = noise(*shape, dtype=dtype, scale=2.0), noise(shape[1])
    a, b = exact(x, bias)
    assert_same([gelu(x, bias)], [x, bias], [F.gelu(a + b)], [a, b], WITHIN[dtype])


@TYPES
@pytest.mark.parametrize("p", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("kind", ["post-norm", "pre-norm", "no norm"])
def test_addition_of_a_dropped_product(kind, p, dtype):
    N, D = 37, 96
    wide = dtype if kind == "post-norm" else torch.float32
    norm = nn.LayerNorm(D).to(DEVICE)
    x, bias, residual = noise(N, D, dtype=dtype), noise(D), noise(N, D, dtype=wide)
    weight, offset = nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    seed = torch.tensor([SEED], device=DEVICE)
    outputs = add_dropped(x, bias, residual, Dropout(p, seed), None if kind == "no norm" else norm)

    a, b, r, w, o = exact(x, bias, residual, weight, offset)
    total = r + (a + b) * kept((N, D), p) / (1 - p)
    expected = total, F.layer_norm(total, (D,), w, o, norm.eps)
    assert (outputs[0].dtype, outputs[1] is None) == (wide, kind == "no norm")
    used, inputs = {"post-norm": (slice(1, 2), 5), "pre-norm": (slice(0, 2), 5), "no norm": (slice(0, 1), 3)}[kind]
    ours, theirs = (x, bias, residual, weight, offset)[:inputs], (a, b, r, w, o)[:inputs]
    assert_same(outputs[used], ours, expected[used], theirs, WITHIN[dtype])


def test_what_dropout_keeps_is_random():
    """The share kept, and the correlation with neighbours, with rows above and with other seeds, within four deviations."""
    n, p = 2**20, 0.1
    first = kept((n,), p).double() - (1 - p)
    z = [float(first.sum())]
    z += [float(first[lag:] @ first[:-lag]) / (p * (1 - p)) ** 0.5 for lag in (1, 2, 7, 8, 256, 768, 1024, 3072, 2**16)]
    others = (kept((n,), p, SEED ^ (1 << bit)).double() - (1 - p) for bit in range(0, 63, 3))
    z += [float(first @ other) / (p * (1 - p)) ** 0.5 for other in others]
    assert max(map(abs, z)) / (n * p * (1 - p)) ** 0.5 < 4


@pytest.mark.parametrize("large", [False, True], ids=["base", "large"])
def test_dropout_follows_the_generator(large):
    """One seed, one outcome, in a recomputed pass too; another seed, another outcome; none in evaluation."""
    module = pair(tiny_config(large, hidden_dropout=0.4))[0].wav2vec2.encoder.layers[0].to(DEVICE)
    hidden, attended = noise(3, 32), noise(3, 32)

    def run(seed, recomputed=False):
        torch.manual_seed(seed)
        arguments = module, hidden, attended, large
        out = (
            checkpoint(fused.after_attention, *arguments, use_reentrant=False)
            if recomputed
            else fused.after_attention(*arguments)
        )
        return [out, *torch.autograd.grad(out.pow(2).sum(), [hidden, attended, module.final_layer_norm.weight])]

    first, again, other = run(1), run(1, recomputed=True), run(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(not torch.allclose(a, b) for a, b in zip(first, other, strict=True))
    module.eval()
    torch.testing.assert_close(run(1), run(2), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("large", "dtype", "within"),
    [(False, None, 1e-5), (True, None, 1e-5), (True, torch.bfloat16, 0.1)],
    ids=["base", "large", "large in bf16"],
)
def test_a_model_with_kernels_is_the_model_without(monkeypatch, large, dtype, within):
    fix_codes(monkeypatch)
    config = tiny_config(large, layerdrop=0.3)
    model, batch = pair(config, feature_penalty_weight=1.0)[0], make_batch(config, [9_000, 6_000])
    expected, reference = passes(model, batch, DEVICE)
    fused.fuse(model)
    calls = []
    monkeypatch.setattr(kernels, "_gelu_forward", Counted(kernels._gelu_forward, calls))
    found, gradient = passes(model, batch, DEVICE, dtype)
    assert len(calls) == 10  # seven convs, positions, two layers
    assert found == pytest.approx(expected, rel=within)
    assert distance(gradient, reference) < within


def test_what_the_kernels_do_not_take_goes_to_the_library():
    module = pair(tiny_config(), torch.float64)[0].wav2vec2.encoder.layers[0].to(DEVICE)
    hidden, attended = (torch.randn(5, 32, dtype=torch.float64, device=DEVICE) for _ in range(2))
    ours, theirs = (f(module, hidden, attended, False) for f in (fused.after_attention, transformer.after_attention))
    assert torch.equal(ours, theirs)
    assert torch.equal(fused.Gelu()(hidden), F.gelu(hidden))


def test_other_activations_are_refused():
    with pytest.raises(UserError, match="computes gelu, and the model's hidden_act is relu"):
        fused.fuse(pair(tiny_config(hidden_act="relu"))[0])


@pytest.mark.skipif(sys.platform != "linux", reason="the compiler's tools come with the package for Linux")
def test_an_h200_gets_them_without_spilled_registers(tmp_path):
    script = Path(__file__).with_name("compile_kernels.py")
    environment = os.environ | dict(TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    done = subprocess.run([sys.executable, script, "768"], env=environment, capture_output=True, text=True, check=True)
    found = re.findall(r"(\d+) instructions.* STACK:(\d+) .* LOCAL:(\d+)", done.stdout)
    assert len(found) == 10 and all(int(n) > 100 and stack == local == "0" for n, stack, local in found), done.stdout


# -- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("large", [False, True], ids=["base", "large"])
def test_a_captured_layer_draws_anew_and_repeats(large):
    """A CUDA graph of both passes: new dropout at each replay, the same after the same seed, to the bit."""
    config = tiny_config(large, hidden_dropout=0.3, hidden_size=768, num_attention_heads=12, intermediate_size=3072)
    module = pair(config)[0].wav2vec2.encoder.layers[0].to(DEVICE)
    dtype = torch.float32 if large else torch.bfloat16
    hidden, attended = noise(5_000, 768, dtype=dtype), noise(5_000, 768, dtype=torch.bfloat16)
    inputs = [hidden, attended, *module.feed_forward.parameters(), *module.final_layer_norm.parameters()]

    def run():
        out = fused.after_attention(module, hidden, attended, large)
        return [out, *torch.autograd.grad(out.float().pow(2).sum(), inputs)]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()
    found = []
    for seed in (1, None, 1):
        if seed is not None:
            torch.cuda.manual_seed(seed)
        graph.replay()
        found.append([out.clone() for out in outputs])
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[2], strict=True))
    assert all(not torch.equal(a, b) for a, b in zip(found[0], found[1], strict=True))
    torch.cuda.manual_seed(1)
    for eager, captured in zip(run(), found[0], strict=True):
        torch.testing.assert_close(eager, captured)
