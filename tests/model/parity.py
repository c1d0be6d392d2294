"""Ours against the stock model: a pair with equal weights, and equality of values and gradients."""

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import Wav2Vec2ForPreTraining

from w2v2.model import objective
from w2v2.model.pretraining import PretrainingModel


def pair(config, dtype=torch.float32, **attributes):
    """Our model and the stock one with equal weights; codes collide often, so that the collision rule counts."""
    ours = PretrainingModel(config).to(dtype).train()
    with torch.no_grad():
        ours.quantizer.weight_proj.bias.normal_(std=3.0)
        norm = getattr(ours.wav2vec2.feature_extractor.conv_layers[0], "layer_norm", None)
        if norm is not None:
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_(std=0.3)
    ours.feature_grad_mult, ours.feature_penalty_weight = 1.0, 0.0
    for name, value in attributes.items():
        setattr(ours, name, value)
    stock = Wav2Vec2ForPreTraining(config).to(dtype).train()
    stock.load_state_dict(ours.state_dict())
    # The stock forward finds collisions by comparing projected vectors bit by bit. A matrix product may round equal
    # rows differently by their place in the matrix. This form does not.
    project = stock.project_q
    project.forward = lambda x: (x[..., None, :] * project.weight).sum(-1) + project.bias
    return ours, stock


def as_rows(batch):
    """A micro-batch of ours as the stock model takes it: waveforms (B, S) and masked frames (B, T), padded."""
    slot, rows = len(batch.samples) // len(batch.rows.row), batch.rows
    waveforms = [batch.samples[f * slot :][:n] for f, n in zip(rows.first.tolist(), batch.num_samples, strict=True)]
    mask = rows.split(torch.zeros(len(rows.row), dtype=torch.bool).index_fill(0, batch.masked, True))
    return [pad_sequence(x, batch_first=True) for x in (waveforms, mask)]


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(ours, theirs, rtol):
    assert ours.keys() == theirs.keys()
    scale = max(g.abs().max() for g in theirs.values())
    for name in theirs:
        error = (ours[name] - theirs[name]).norm()
        assert error <= rtol * theirs[name].norm() + 1e-7 * scale, name


def assert_same_function(ours, theirs, inputs, **tolerance):
    """Equal outputs, and equal gradients of the same random weighting of them in `inputs`."""
    inputs, weight = list(inputs), torch.randn_like(theirs)
    torch.testing.assert_close(ours, theirs, **tolerance)
    found = [torch.autograd.grad((out * weight).sum(), inputs, retain_graph=True) for out in (ours, theirs)]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def passes(model, batch, device, dtype=None):
    """(loss, gradient) of one micro-batch on this device, under autocast where a type is given."""
    model.zero_grad()
    model.to(device)
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        loss = model(batch.to(device), 1.3).loss
    assert dtype is None or loss.dtype == torch.float32
    loss.backward()
    return loss.item(), {name: g.cpu().double() for name, g in gradients(model).items()}


def distance(found, expected) -> float:
    """Of two whole gradients, relative to the second."""
    assert found.keys() == expected.keys()
    error = sum(float((found[name] - g).pow(2).sum()) for name, g in expected.items())
    return (error / sum(float(g.pow(2).sum()) for g in expected.values())) ** 0.5


def fix_codes(monkeypatch):
    """Codes that no rounding flips, which would change the loss, from the same Gumbel noise on every device."""
    choose, generator = objective.choose_codes, torch.Generator()

    def noise(logits):
        draws = torch.empty(logits.shape, dtype=torch.float64).exponential_(generator=generator.manual_seed(5))
        return -draws.log().to(logits)

    def chosen(logits, temperature):
        given = torch.randint(0, 12, logits.shape[:-1], generator=generator.manual_seed(0)).to(logits.device)
        return choose(logits + 50.0 * F.one_hot(given, logits.shape[-1]), temperature)

    monkeypatch.setattr(objective, "gumbel_noise", noise)
    monkeypatch.setattr(objective, "choose_codes", chosen)
