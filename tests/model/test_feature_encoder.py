"""The first convolution in a 16-bit type: as exact as the type of its output, where a plain product is not."""

import pytest
import torch
from conftest import make_batch, tiny_config
from test_pretraining import pair

from w2v2.model import feature_encoder
from w2v2.model.feature_encoder import _affine, _windows, is_flat

pytestmark = pytest.mark.usefixtures("large_model_kernels")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_product_in_halves_loses_no_more_than_the_rounding_of_its_result(dtype):
    generator = torch.Generator().manual_seed(0)
    waveforms = (
        torch.cumsum(torch.randn(3, 2_000, generator=generator), 1) * 0.02
    )  # low-pass: neighbouring samples are alike
    weight = torch.randn(3, 8, 10, generator=generator, dtype=torch.float64)
    weight -= weight.mean(-1, keepdim=True)  # band-pass: most of each product cancels
    offset = torch.randn(3, 8, generator=generator, dtype=torch.float64)
    windows = _windows(waveforms, 10, 5)
    exact = _affine(windows.double(), weight, offset, torch.float64)
    found = _affine(windows, weight, offset, dtype)
    assert found.dtype == dtype
    size = (
        windows.double().abs() @ weight.abs().transpose(1, 2) + offset.abs()[:, None]
    )  # what the bits left over are relative to
    eps = torch.finfo(dtype).eps
    assert ((found.double() - exact).abs() <= eps / 2 * exact.abs() + 4 * eps**2 * size).all()
    plain = windows.to(dtype).double() @ weight.to(dtype).double().transpose(1, 2) + offset[:, None]
    assert (plain - exact).abs().mean() > 3 * (found.double() - exact).abs().mean()


def test_gradients_of_the_product_in_halves_are_those_of_the_product():
    windows = _windows(torch.randn(2, 500), 10, 5)
    weight, offset = torch.randn(2, 4, 10, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    found = []
    for dtype in (torch.float64, torch.bfloat16):
        leaves = [x.clone().requires_grad_() for x in (weight, offset)]
        _affine(windows, *leaves, dtype).double().sum().backward()
        found.append([x.grad for x in leaves])
    for exact, rough in zip(*found, strict=True):
        torch.testing.assert_close(rough, exact, rtol=2e-2, atol=2e-2 * float(exact.abs().max()))


@pytest.mark.parametrize("lengths", [[16_400] * 3, [16_400, 16_081, 9_123]], ids=["equal", "mixed"])
@pytest.mark.parametrize("bias", [False, True])
def test_layer_norm_convs_in_the_flat_layout_are_the_stock_ones(lengths, bias):
    config = tiny_config(large=True, conv_bias=bias)
    assert is_flat(config)
    model, _ = pair(config, torch.float64)
    batch = make_batch(config, lengths, dtype=torch.float64)
    extractor = model.wav2vec2.feature_extractor
    weight = torch.randn(len(lengths), max(batch.lengths), 16, dtype=torch.float64)
    found = []
    for encode in (feature_encoder.flat_features, feature_encoder.stock_features):
        out = encode(batch.waveforms, batch.num_samples, extractor)[:, : max(batch.lengths)]
        inside = torch.arange(out.shape[1]) < batch.frames[:, None]
        out = torch.where(inside[..., None], out, 0.0)
        found.append((out, *torch.autograd.grad((out * weight).sum(), list(extractor.parameters()))))
    for flat, stock in zip(*found, strict=True):
        torch.testing.assert_close(flat, stock, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    "changes",
    [dict(conv_kernel=[10, 3, 3, 3, 3, 2, 4]), dict(conv_stride=[5, 2, 2, 2, 2, 2, 1]), dict(conv_bias=True)],
)
def test_other_convolutions_stay_with_the_stock_layers(changes):
    assert is_flat(tiny_config()) and not is_flat(tiny_config(**changes))
