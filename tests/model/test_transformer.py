"""The transformer's functions against the stock modules whose parameters they use."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import make_batch, tiny_config
from parity import assert_same_function, gradients, pair

from w2v2.data.rows import Rows
from w2v2.model import transformer
from w2v2.model.cpu import attend_in_blocks
from w2v2.model.transformer import after_attention, attend, layer, positional

pytestmark = pytest.mark.usefixtures("large_model_kernels")


def rows_of(lengths, gaps):
    return Rows.build(torch.tensor(lengths), torch.tensor(gaps))


@pytest.mark.parametrize(
    "changes", [{}, dict(large=True), dict(large=True, adapter_attn_dim=4)], ids=["post-norm", "pre-norm", "adapter"]
)
def test_a_layer_is_the_stock_layer(changes):
    model, _ = pair(tiny_config(**changes), torch.float64)
    module = model.wav2vec2.encoder.layers[0]
    hidden = torch.randn(2, 9, 32, dtype=torch.float64, requires_grad=True)
    ours = layer(module, hidden.flatten(0, 1), rows_of([9, 9], [0, 0]), torch.float64).view_as(hidden)
    assert_same_function(ours, module(hidden), [hidden, *module.parameters()], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("frames", [1, 7, 8, 23, 40])
@pytest.mark.parametrize(("taps", "groups", "block"), [(16, 2, 8), (5, 4, 3), (128, 16, 8), (4, 1, 1)])
def test_positional_convolution_in_blocks_is_the_stock_one(monkeypatch, frames, taps, groups, block):
    monkeypatch.setattr(transformer, "BLOCK", block)
    config = tiny_config(num_conv_pos_embeddings=taps, num_conv_pos_embedding_groups=groups)
    model, _ = pair(config, torch.float64)
    module = model.wav2vec2.encoder.pos_conv_embed
    lengths = [frames, 12, frames + 3]
    rows = rows_of(lengths, [1, 2, 1])
    alone = [torch.randn(n, 32, dtype=torch.float64, requires_grad=True) for n in lengths]
    expected = torch.cat([module(x[None])[0] for x in alone])
    for in_blocks in (True, False):
        ours = torch.cat(rows.split(positional(module, rows.join(alone), rows, in_blocks)))
        assert_same_function(ours, expected, [*alone, *module.parameters()], rtol=1e-10, atol=1e-11)


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


def inputs(B, T, H=3, d=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, T, H, d, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(3)]


@pytest.mark.parametrize("asked", ["all", "some"])
@pytest.mark.parametrize("lengths", [[7, 7], [5, 7, 2, 5], [3, 7, 3, 3]])
def test_each_row_attends_to_its_own_frames_alone(lengths, asked):
    query, key, value = inputs(len(lengths), 7)
    gaps = [1 + i % 2 for i in range(len(lengths))]
    rows, own = rows_of(lengths, gaps), rows_of([1 + n // 2 for n in lengths], [0] * len(lengths))
    own = rows if asked == "all" else own
    q, k, v = (
        place.join([row[:n] for row, n in zip(x, place.lengths, strict=True)])
        for x, place in ((query, own), (key, rows), (value, rows))
    )
    out = torch.cat(own.split(attend(q, k, v, own, rows)))
    inside = torch.arange(7) < torch.tensor(lengths)[:, None]  # (B, T)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=inside[:, None, None]).transpose(1, 2)
    expected = torch.cat([row[:n] for row, n in zip(expected, own.lengths, strict=True)])
    assert_same_function(out, expected, [query, key, value])


def test_dropout_zeroes_weights_after_the_softmax():
    """With the dropped weights read from what is kept for the backward pass, the output is the textbook's."""
    lengths, rows = [6, 4], rows_of([6, 4], [1, 2])
    q, k, v = (rows.join([x[:n] for x, n in zip(own, lengths, strict=True)]) for own in inputs(2, 6, seed=1))
    out = attend_in_blocks(q, k, v, rows, rows, 0.4)
    masks, parts = out.grad_fn.saved_tensors[4:], [rows.split(x) for x in (q, k, v, out)]
    for dropped, *part in zip(masks, *parts, strict=True):
        q, k, v, o = (x.transpose(0, 1) for x in part)  # (T, H, d) -> (H, T, d)
        weights = (q @ k.transpose(1, 2) / 2.0).softmax(-1) * dropped / 0.6
        torch.testing.assert_close(o, weights @ v)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_gradient_with_dropout_for_any_number_of_threads(monkeypatch, threads):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    rows, own = rows_of([4, 2], [1, 2]), rows_of([2, 1], [0, 0])
    q, k, v = (x.detach()[0].requires_grad_() for x in inputs(1, 9, H=6, seed=2))

    def attention(*x):
        torch.manual_seed(7)
        return attend_in_blocks(*x, own, rows, 0.3)

    query = q.detach()[:3].requires_grad_()
    assert torch.autograd.gradcheck(attention, (query, k, v))
    found = attention(query, k, v)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert torch.equal(found, attention(query, k, v))
