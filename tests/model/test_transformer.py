"""The transformer's functions against the stock modules whose parameters they use."""

import shutil

import pytest
import torch
from conftest import make_batch, tiny_config
from parity import assert_same_function, gradients, pair

from w2v2.model import transformer
from w2v2.model.attention import Rows
from w2v2.model.transformer import after_attention, layer, positional

pytestmark = pytest.mark.usefixtures("large_model_kernels")

NINES = Rows([9, 9], torch.tensor([0, 9, 18], dtype=torch.int32))


@pytest.mark.parametrize(
    "changes", [{}, dict(large=True), dict(large=True, adapter_attn_dim=4)], ids=["post-norm", "pre-norm", "adapter"]
)
def test_a_layer_is_the_stock_layer(changes):
    model, _ = pair(tiny_config(**changes), torch.float64)
    module = model.wav2vec2.encoder.layers[0]
    hidden = torch.randn(2, 9, 32, dtype=torch.float64, requires_grad=True)
    ours = layer(module, hidden.flatten(0, 1), NINES, torch.float64).view_as(hidden)
    assert_same_function(ours, module(hidden), [hidden, *module.parameters()], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("frames", [1, 7, 8, 23, 40])
@pytest.mark.parametrize(("taps", "groups", "block"), [(16, 2, 8), (5, 4, 3), (128, 16, 8), (4, 1, 1)])
def test_positional_convolution_in_blocks_is_the_stock_one(monkeypatch, frames, taps, groups, block):
    monkeypatch.setattr(transformer, "BLOCK", block)
    config = tiny_config(num_conv_pos_embeddings=taps, num_conv_pos_embedding_groups=groups)
    model, _ = pair(config, torch.float64)
    module = model.wav2vec2.encoder.pos_conv_embed
    hidden = torch.randn(3, frames, 32, dtype=torch.float64, requires_grad=True)
    for in_blocks in (True, False):
        ours, inputs = positional(module, hidden, in_blocks), [hidden, *module.parameters()]
        assert_same_function(ours, module(hidden), inputs, rtol=1e-10, atol=1e-11)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("large", [False, True], ids=["base", "large"])
def test_compiled_layers_change_nothing_and_need_one_graph(large):
    config = tiny_config(large, layerdrop=0.3)
    model, _ = pair(config)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(after_attention, dynamic=True, fullgraph=True)
    for lengths in ([16_400, 9_000, 9_000], [24_000] * 2, [16_400] * 3):
        batch = make_batch(config, lengths)
        found = []
        for rest in (None, compiled):
            model.zero_grad()
            model._after_attention = rest
            torch.manual_seed(1)
            loss = model(batch).loss
            loss.backward()
            found.append((loss.detach(), gradients(model)))
        torch.testing.assert_close(found[0], found[1], rtol=2e-4, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # whatever the lengths
