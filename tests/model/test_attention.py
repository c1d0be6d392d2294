"""Attention by runs of equal utterances, and the CPU's form with dropout, against the library and the textbook."""

import pytest
import torch
import torch.nn.functional as F
from parity import assert_same_function

from w2v2.model.attention import Rows, attend
from w2v2.model.cpu import attend_in_blocks


def concatenated(x, lengths):
    """Rows (B, T, …) without their padding, (N, …), and where each lies."""
    ends = torch.tensor([0, *lengths]).cumsum(0)
    return torch.cat([row[:n] for row, n in zip(x, lengths, strict=True)]), Rows(lengths, ends.int())


def inputs(B, T, H=3, d=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, T, H, d, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(3)]


@pytest.mark.parametrize("lengths", [[7, 7], [7, 5, 5, 2], [3, 7, 3, 3]])
def test_each_row_attends_to_its_own_frames_alone(lengths):
    query, key, value = inputs(len(lengths), 7)
    packed, rows = concatenated(torch.stack([query, key, value], 2), lengths)
    out = attend(packed, rows)
    inside = torch.arange(7) < torch.tensor(lengths)[:, None]  # (B, T)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=inside[:, None, None]).transpose(1, 2)
    assert_same_function(out, concatenated(expected, lengths)[0], [query, key, value])


def test_dropout_zeroes_weights_after_the_softmax():
    """With the dropped weights read from what is kept for the backward pass, the output is the textbook's."""
    query, key, value = inputs(2, 6, seed=1)
    out = attend(*concatenated(torch.stack([query, key, value], 2), [6, 6]), dropout=0.4)
    function = out.grad_fn
    while "AttentionInBlocks" not in function.name():  # views lie above it
        function = function.next_functions[0][0]
    dropped = function.saved_tensors[-1].view(2, 3, 6, 6)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    weights = (q @ k.transpose(2, 3) / 2.0).softmax(-1) * dropped / 0.6
    torch.testing.assert_close(out, (weights @ v).transpose(1, 2).flatten(0, 1))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_gradient_with_dropout_for_any_number_of_threads(monkeypatch, threads):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    query, key, value = (x.detach().transpose(1, 2).requires_grad_() for x in inputs(2, 5, seed=2))

    def attention(*x):
        torch.manual_seed(7)
        return attend_in_blocks(*x, 0.3)

    assert torch.autograd.gradcheck(attention, (query, key, value))
    found = attention(query, key, value)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert torch.equal(found, attention(query, key, value))
