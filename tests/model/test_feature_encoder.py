"""The convs against the stock layers; a first convolution in 16 bits; padding hidden from fine-tuning."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import make_batch, tiny_config
from parity import as_rows, assert_same_function, assert_same_gradients, gradients, pair
from transformers import Wav2Vec2ForCTC

from w2v2.finetune.ctc_data import collate_speech
from w2v2.model.feature_encoder import (
    _affine,
    flat_features,
    hide_padding,
    is_flat,
    min_samples,
    num_frames,
    stock_features,
)

pytestmark = pytest.mark.usefixtures("large_model_kernels")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_product_in_halves_loses_only_the_rounding(dtype):
    generator = torch.Generator().manual_seed(0)
    # Low-pass: neighbouring samples are alike.
    waveforms = torch.cumsum(torch.randn(3, 2_000, generator=generator), 1) * 0.02
    weight = torch.randn(3, 8, 10, generator=generator, dtype=torch.float64)
    weight -= weight.mean(-1, keepdim=True)  # band-pass: most of each product cancels
    offset = torch.randn(3, 8, generator=generator, dtype=torch.float64)
    windows = F.pad(waveforms, (0, 5)).unfold(1, 10, 5)  # (3, 400, 10)
    exact = _affine(windows.double(), weight, offset, torch.eye(3), torch.float64)
    found = _affine(windows, weight, offset, torch.eye(3), dtype)
    assert found.dtype == dtype
    # What the bits left over are relative to.
    size = windows.double().abs() @ weight.abs().transpose(1, 2) + offset.abs()[:, None]
    eps = torch.finfo(dtype).eps
    assert ((found.double() - exact).abs() <= eps / 2 * exact.abs() + 4 * eps**2 * size).all()
    plain = windows.to(dtype).double() @ weight.to(dtype).double().transpose(1, 2) + offset[:, None]
    assert (plain - exact).abs().mean() > 3 * (found.double() - exact).abs().mean()
    leaves = [weight.requires_grad_(), offset.requires_grad_()]
    gradients = [
        torch.autograd.grad(_affine(windows, *leaves, torch.eye(3), d).double().sum(), leaves)
        for d in (torch.float64, dtype)
    ]
    for exact, rough in zip(*gradients, strict=True):
        torch.testing.assert_close(rough, exact, rtol=2e-2, atol=2e-2 * float(exact.abs().max()))


@pytest.mark.parametrize("lengths", [[16_400] * 3, [9_123, 16_400, 16_081]], ids=["equal", "mixed"])
@pytest.mark.parametrize("changes", [{}, dict(large=True, conv_bias=False), dict(large=True)], ids=str)
def test_flat_convs_and_their_gradients_are_the_stock_ones(lengths, changes):
    config = tiny_config(**changes)
    assert is_flat(config)
    model, _ = pair(config, torch.float64)
    batch = make_batch(config, lengths, dtype=torch.float64)
    extractor = model.wav2vec2.feature_extractor
    inputs = batch.samples, batch.rows, batch.num_samples, extractor
    flat, stock = (encode(*inputs)[batch.rows.inside] for encode in (flat_features, stock_features))
    waveforms = as_rows(batch)[0]
    alone = [extractor(waveforms[i : i + 1, :n])[0].T for i, n in enumerate(lengths)]
    torch.testing.assert_close(stock, torch.cat(alone))
    assert_same_function(flat, stock, extractor.parameters(), rtol=1e-9, atol=1e-10)


def test_other_convolutions_stay_with_the_stock_layers():
    kernels, strides = [10, 3, 3, 3, 3, 2, 4], [5, 2, 2, 2, 2, 2, 1]
    for changes in (dict(conv_kernel=kernels), dict(conv_stride=strides), dict(conv_bias=True)):
        assert is_flat(tiny_config()) and not is_flat(tiny_config(**changes))


def test_frames_are_the_stock_models():
    config = tiny_config()
    stock = Wav2Vec2ForCTC(config)
    for samples in range(400, 2_000, 37):
        assert num_frames(config, samples) == stock._get_feat_extract_output_lengths(samples)
    assert min_samples(config) == 400
    assert (num_frames(config, 400), num_frames(config, 399)) == (1, 0)


def ctc_models(large=False, **changes):
    """The stock model, and the same one with padding hidden."""
    head = dict(vocab_size=8, pad_token_id=0, ctc_zero_infinity=True, ctc_loss_reduction="mean", final_dropout=0.0)
    stock = Wav2Vec2ForCTC(tiny_config(large, **(head | changes)))
    return stock, hide_padding(copy.deepcopy(stock))


def utterances():
    generator = torch.Generator().manual_seed(0)
    noise = (torch.randn(n, generator=generator).numpy() for n in (16_000, 9_123, 4_000, 700))
    return [{"input_values": x, "labels": [3, 4]} for x in noise]


@pytest.mark.parametrize("large", [False, True])
def test_padded_utterances_come_out_as_alone_in_the_stock_model(large):
    stock, ours = (model.eval() for model in ctc_models(large))
    assert type(ours) is Wav2Vec2ForCTC and ours.state_dict().keys() == stock.state_dict().keys()
    items = utterances()
    with torch.no_grad():
        together = ours(**collate_speech(items)).logits
        for row, item in enumerate(items):
            alone = stock(torch.tensor(item["input_values"])[None]).logits[0]
            torch.testing.assert_close(together[row, : len(alone)], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("large", [False, True])
def test_a_padded_batch_has_the_mean_of_the_stock_gradients(large):
    stock, ours = (model.train() for model in ctc_models(large, mask_time_prob=0.0))
    items = utterances()
    ours(**collate_speech(items)).loss.backward()
    for item in items:
        (stock(**collate_speech([item])).loss / len(items)).backward()
    assert_same_gradients(gradients(ours), gradients(stock), rtol=1e-3)


def test_a_batch_shorter_than_a_mask_span_trains_unmasked():
    stock, ours = (model.train() for model in ctc_models(mask_time_length=10))
    batch = collate_speech(utterances()[-1:])
    with pytest.raises(ValueError, match="mask_length"):
        stock(**batch)
    assert ours(**batch).loss.isfinite()
    _, ours = ctc_models(mask_time_prob=0.0, mask_feature_prob=0.0)
    assert ours.train()(**batch).loss.isfinite()


def test_freezing_the_convs_holds_after_padding_is_hidden():
    _, ours = ctc_models()
    ours.freeze_feature_encoder()
    ours.train()(**collate_speech(utterances()[:2])).loss.backward()
    assert all(p.grad is None for p in ours.wav2vec2.feature_extractor.parameters())
    assert ours.wav2vec2.feature_projection.projection.weight.grad is not None
