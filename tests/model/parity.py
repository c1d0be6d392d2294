"""Ours against the stock model: a pair with equal weights, and equality of values and gradients."""

import torch
from transformers import Wav2Vec2ForPreTraining

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
