"""The model against the stock forward: the same loss and the same gradient, for any masks, distractors and lengths."""

import pytest
import torch
from conftest import NO_DROPOUT, make_batch, tiny_config
from parity import as_rows, assert_same_gradients, distance, fix_codes, gradients, pair, passes
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from w2v2.data.masking import distractors
from w2v2.model import objective
from w2v2.model.feature_encoder import stock_features
from w2v2.model.pretraining import PretrainingModel

pytestmark = pytest.mark.usefixtures("large_model_kernels")

TEMPERATURE = 1.3


def stock_negatives(batch, mask, num_negatives):
    """Our distractors as the flat (row · T + frame) indices of all frames that the stock forward wants. mask (B, T)."""
    B, T = mask.shape
    chosen = distractors(batch.keys, batch.masked_rows.frames, T, num_negatives)  # (B, T, K)
    out = torch.zeros(B, T, num_negatives, dtype=torch.long)
    for row in range(B):
        frames = mask[row].nonzero()[:, 0]
        out[row, frames] = frames[chosen[row, : len(frames)]]
    return out + torch.arange(B)[:, None, None] * T


def shared_noise(monkeypatch, batch, config):
    """The same Gumbel noise (B, T, G, V) on each frame for both models."""
    generator = torch.Generator().manual_seed(5)
    _, mask = as_rows(batch)
    shape = (*mask.shape, config.num_codevector_groups, config.num_codevectors_per_group)
    noise = -torch.empty(shape, dtype=torch.float64).exponential_(generator=generator).log()
    monkeypatch.setattr(objective, "gumbel_noise", lambda logits: noise[mask].to(logits.dtype))
    give_stock(monkeypatch, noise)
    return noise


def give_stock(monkeypatch, noise):
    """Let the stock quantizer take this noise (…, V) in place of its own."""

    def gumbel_softmax(logits, tau, hard):
        soft = ((logits + noise.reshape(logits.shape).to(logits.dtype)) / tau).softmax(-1)
        one_hot = torch.zeros_like(soft).scatter_(-1, soft.argmax(-1, keepdim=True), 1.0)
        return one_hot + (soft - soft.detach())

    monkeypatch.setattr(torch.nn.functional, "gumbel_softmax", gumbel_softmax)


def run_stock(stock, batch):
    """The stock forward with our mask and our distractors."""
    waveforms, mask = as_rows(batch)
    negatives = stock_negatives(batch, mask, stock.config.num_negatives)
    return stock(waveforms, mask_time_indices=mask, sampled_negative_indices=negatives)


@pytest.mark.parametrize("large", [False, True], ids=["base", "large"])
@pytest.mark.parametrize("trial", range(4))
def test_equal_lengths_give_the_stock_loss_and_gradient(monkeypatch, large, trial):
    config = tiny_config(large, num_negatives=5 + 20 * trial)
    ours, stock = (model.train(trial < 3) for model in pair(config))
    stock.quantizer.temperature = TEMPERATURE
    rows, length = [(2, 16_400), (3, 9_000 + 1), (1, 24_000), (2, 16_400)][trial]
    batch = make_batch(config, [length] * rows, seed=trial)
    shared_noise(monkeypatch, batch, config)

    sums = ours(batch, TEMPERATURE)
    expected = run_stock(stock, batch)
    torch.testing.assert_close(sums.contrastive, expected.contrastive_loss, rtol=1e-5, atol=1e-6)
    if trial == 3:  # evaluation: codes without noise
        hard = sums.codes_hard / sums.num_masked
        return torch.testing.assert_close(objective.perplexity(hard), expected.codevector_perplexity)
    sums.loss.backward()
    expected.loss.backward()
    torch.testing.assert_close(sums.diversity, expected.diversity_loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sums.loss, expected.loss, rtol=1e-5, atol=1e-6)
    mean_codes = sums.codes_soft / sums.num_masked
    torch.testing.assert_close(objective.perplexity(mean_codes), expected.codevector_perplexity, rtol=1e-5, atol=1e-5)
    assert_same_gradients(gradients(ours), gradients(stock), rtol=1e-5 if not large else 1e-4)


@pytest.mark.parametrize("temperature", [0.1, 0.01, 0.001])
def test_a_cold_contrast_is_finite_and_the_stock_models(monkeypatch, temperature):
    config = tiny_config(contrastive_logits_temperature=temperature)
    ours, stock = pair(config)
    stock.quantizer.temperature = TEMPERATURE
    batch = make_batch(config, [16_400] * 2)
    shared_noise(monkeypatch, batch, config)
    sums, expected = ours(batch, TEMPERATURE), run_stock(stock, batch)
    assert sums.contrastive.isfinite()
    torch.testing.assert_close(sums.contrastive, expected.contrastive_loss, rtol=1e-5, atol=1e-6)
    sums.loss.backward()
    expected.loss.backward()
    assert_same_gradients(gradients(ours), gradients(stock), rtol=1e-6 / temperature)


@pytest.mark.parametrize("large", [False, True], ids=["base", "large"])
@pytest.mark.parametrize("path", ["flat", "stock", "blocks", "recomputed"])
def test_mixed_lengths_give_the_sum_of_the_stock_losses(monkeypatch, large, path):
    config = tiny_config(large)
    if path == "stock":
        monkeypatch.setattr("w2v2.model.pretraining.encoder_of", lambda config: stock_features)
    ours, stock = pair(config, torch.float64)
    ours.positional_in_blocks = path == "blocks"
    if path == "recomputed":
        ours.recomputed = frozenset(["convs", "encoder"])
    lengths = [9_999, 24_000, 5_440, 16_400]
    batch = make_batch(config, lengths, dtype=torch.float64)
    ours.config.diversity_loss_weight = stock.config.diversity_loss_weight = 0.0  # its statistics are a micro-batch's
    stock.quantizer.temperature = TEMPERATURE
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self)  # keeps the stock forward in float64
    noise = shared_noise(monkeypatch, batch, config)

    sums = ours(batch, TEMPERATURE)
    sums.loss.backward()
    total = 0.0
    for row, length in enumerate(lengths):
        alone = make_batch(config, [length], first=row, dtype=torch.float64)
        give_stock(monkeypatch, noise[row, : alone.rows.lengths[0]])
        out = run_stock(stock, alone)
        out.loss.backward()
        total += out.loss.item()
    assert sums.loss.item() == pytest.approx(total, rel=1e-10)
    assert_same_gradients(gradients(ours), gradients(stock), rtol=1e-9)


def test_a_dummy_adds_nothing_to_sums_or_gradient():
    config = tiny_config(layerdrop=0.3)
    model, _ = pair(config, feature_penalty_weight=10.0)
    batch = make_batch(config, [9_000], weight=0.0)
    batch.samples.zero_()
    sums = model(batch)
    sums.loss.backward()
    assert not any(x.any() for x in sums)
    assert not any(g.any() for g in gradients(model).values())


def test_conv_gradient_is_scaled_and_no_other():
    config = tiny_config()
    batch = make_batch(config, [16_400] * 2)
    found = []
    for scale in (1.0, 0.1):
        torch.manual_seed(1)
        model, _ = pair(config, feature_grad_mult=scale, feature_penalty_weight=10.0)
        torch.manual_seed(2)
        model(batch).loss.backward()
        found.append(gradients(model))
    for name in found[0]:
        factor = 0.1 if "feature_extractor" in name else 1.0
        torch.testing.assert_close(found[1][name], found[0][name] * factor, rtol=1e-4, atol=1e-6, msg=name)


def test_feature_penalty_is_that_of_the_convs_output():
    config = tiny_config()
    model, stock = pair(config, feature_penalty_weight=10.0)
    lengths = [16_400, 9_123]
    sums = model(make_batch(config, lengths))
    expected = 0.0
    for row, n in enumerate(lengths):
        alone = make_batch(config, [n], first=row)
        expected += stock.wav2vec2.feature_extractor(as_rows(alone)[0]).pow(2).mean() * len(alone.masked)
    torch.testing.assert_close(sums.penalty, expected.detach(), rtol=1e-5, atol=1e-6)


def test_a_layer_dropped_for_all_is_the_identity():
    config = tiny_config(layerdrop=1.0)
    model, _ = pair(config)
    batch = make_batch(config, [16_400, 9_000, 9_000])
    normed = model.wav2vec2.feature_projection.layer_norm(model._features(batch))
    with_layers = model._context(normed, batch)
    model.wav2vec2.encoder.layers = torch.nn.ModuleList()
    torch.testing.assert_close(with_layers, model._context(normed, batch)[batch.masked])


@pytest.mark.parametrize("large", [False, True], ids=["base", "large"])
@pytest.mark.parametrize("skips", [True, False])
def test_layerdrop_is_that_of_each_utterance_alone(monkeypatch, large, skips):
    """Each layer leaves out other ones of seven utterances, in the middle and at the ends. Loss and gradient add up."""
    monkeypatch.setattr(objective, "gumbel_noise", torch.zeros_like)
    config = tiny_config(large, layerdrop=0.5, num_hidden_layers=4, diversity_loss_weight=0.0)
    model, _ = pair(config, torch.float64)
    lengths = [16_400, 9_999, 5_440, 24_000, 9_999, 16_400, 9_000]
    batch = make_batch(config, lengths, dtype=torch.float64)
    monkeypatch.setattr("w2v2.model.pretraining.skips_rows", lambda x: skips)
    assert all(0 < kept.sum() < len(lengths) for kept in batch.kept)
    sums = model(batch, TEMPERATURE)
    sums.loss.backward()
    found = gradients(model)
    assert set(found) == {name for name, _ in model.named_parameters()}
    model.zero_grad()
    total = 0.0
    for row, length in enumerate(lengths):
        alone = model(make_batch(config, [length], first=row, dtype=torch.float64), TEMPERATURE).loss
        alone.backward()
        total += alone.item()
    assert sums.loss.item() == pytest.approx(total, rel=1e-10)
    assert_same_gradients(found, gradients(model), rtol=1e-9)


def test_gradient_checkpointing_changes_nothing():
    config = tiny_config(**{k: 0.1 for k in NO_DROPOUT})
    batch = make_batch(config, [16_400, 9_000])
    found = []
    model, _ = pair(config)
    for model.recomputed in (frozenset(), frozenset(["convs", "encoder"])):
        model.zero_grad()
        torch.manual_seed(3)
        model(batch).loss.backward()
        found.append(gradients(model))
    assert_same_gradients(*found, rtol=1e-5)


@pytest.mark.parametrize("large", [False, True], ids=["base", "large"])
@pytest.mark.parametrize("in_blocks", [False, True], ids=["stock", "blocks"])
def test_neither_pass_asks_the_device_for_a_value(monkeypatch, large, in_blocks):
    """Tensors without values stand in for a busy device: whatever would wait for a value raises here."""
    monkeypatch.setattr("w2v2.model.pretraining.skips_rows", lambda x: False)
    config = tiny_config(large, **{name: 0.1 for name in NO_DROPOUT})
    batch = make_batch(config, [24_000, 16_400, 16_400, 9_000])
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        model = PretrainingModel(config).train()
        model.positional_in_blocks = in_blocks
        fake = batch.map(mode.from_tensor)
        sums = model(fake)
        sums.loss.backward()
        with pytest.raises(DataDependentOutputException):
            sums.loss.item()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("recomputed", [(), ("convs", "encoder")], ids=["kept", "recomputed"])
@pytest.mark.parametrize("large", [False, True], ids=["base", "large"])
def test_training_in_16_bits_stays_close_to_float32(monkeypatch, large, recomputed, dtype):
    """Both passes, with layerdrop and several lengths."""
    fix_codes(monkeypatch)
    config = tiny_config(large, layerdrop=0.4)
    batch = make_batch(config, [24_000, 16_400, 16_400, 9_000])
    model, _ = pair(config, feature_penalty_weight=1.0)
    model.positional_in_blocks, model.recomputed = True, frozenset(recomputed)
    (exact, expected), (rough, close) = (passes(model, batch, torch.device("cpu"), low) for low in (None, dtype))
    assert rough == pytest.approx(exact, rel=2e-2)
    assert 0 < distance(close, expected) < 0.1
